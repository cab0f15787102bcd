"""What every loss is: its own options, and the mean over a micro-batch that they define."""

from abc import ABC, abstractmethod

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
DIVISION_FLOOR = 1e-8
"""Smallest divisor: the rate of the label's own column is 0."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Loss(ABC):
    """What all losses have in common; each derives its options from it and defines `mean`."""

    kind: str
    """Name of the loss, a key of `pipeline.losses.registry.LOSSES`."""
    eps: float = Field(default=36 / 255, gt=0)
    """Reference radius, in the network's norm and pixels of [0, 1]: of `train/certified`, and what
    the training radius is a multiple of."""
    scale: float = Field(default=1.0, gt=0)
    """Inverse temperature of the cross-entropy; the certificate never sees it."""

    @abstractmethod
    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """Mean loss of a micro-batch.

        Args:
            y_BK: logits, float32 or wider, shape (B, K).
            d_BK: how fast the margin of the label over each class can fall (CertifiedNetwork.
                logits_and_rates), shape (B, K), 0 for the label.
            t_B: labels, int64, shape (B,).
            eps: training radius of this step, in the network's norm and pixels of [0, 1].
            progress: share of the run that is done, in [0, 1).

        Returns:
            Scalar tensor.
        """

    def training_radius(self, step: int, *, total: int) -> float:
        """Radius at a 0-based step of `total`, in the network's norm and pixels of [0, 1]."""
        return self.eps

    def without_effect(self) -> dict[str, str]:
        """Options that the others leave without effect: name -> the setting that does so."""
        return {}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RampedLoss(Loss):
    """A loss at a training radius that grows (LiResNet++, arXiv 2310.02513)."""

    eps_start: float = Field(default=0.1, ge=0)
    """Multiple of eps at the first step."""
    eps_end: float = Field(default=3.0, gt=0)
    """Multiple of eps after the ramp."""
    eps_ramp: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the radius grows."""

    def training_radius(self, step: int, *, total: int) -> float:
        """Eps * (start + (end - start) * min(1, progress / ramp)); a ramp of 0 starts at the end.

        See Loss.
        """
        share = min(1.0, step / (self.eps_ramp * total)) if self.eps_ramp else 1.0
        return self.eps * (self.eps_start + (self.eps_end - self.eps_start) * share)

    def without_effect(self) -> dict[str, str]:
        """See Loss."""
        if self.eps_start == self.eps_end:
            return {"eps_ramp": f"eps_start=eps_end={self.eps_end:g}"}
        if self.eps_ramp == 0:
            return {"eps_start": "eps_ramp=0"}
        return {}


def relative_logits(y_BK: Tensor, t_B: Tensor) -> Tensor:
    """r_k = y_k - y_t: how far every class lies above the label, shape (B, K)."""
    return y_BK - y_BK.gather(1, t_B[:, None])


def lowered(y_BK: Tensor, t_B: Tensor, offset: float) -> Tensor:
    """The logits, that of the label lowered by `offset`, shape (B, K)."""
    return y_BK.scatter_add(1, t_B[:, None], y_BK.new_full((len(t_B), 1), -offset))
