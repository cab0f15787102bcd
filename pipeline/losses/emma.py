"""EMMA: cross-entropy of margins less what the radius can cost (arXiv 2310.02513)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses.base import DIVISION_FLOOR, STRICT, RampedLoss, relative_logits

_SHIFT_FLOOR = 0.01  # share of the shift a rival keeps once it beats the label (arXiv 2310.02513)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmmaLoss(RampedLoss):
    """Cross-entropy of margins less what the radius can cost (arXiv 2310.02513)."""

    kind: Literal["emma"] = "emma"
    radii: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0,), min_length=1)
    """Multiples of the training radius; the loss is the mean over them. Several weigh small radii
    against large ones at no cost: all follow from one forward pass."""

    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """See Loss."""
        losses = [emma_loss(y_BK, d_BK, t_B, eps * radius, self.scale) for radius in self.radii]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def emma_loss(y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: Tensor | float, scale: float) -> Tensor:
    """Mean EMMA loss (efficient margin maximisation, arXiv 2310.02513).

    With r_k = y_k - y_t and d_k the Lipschitz constant of r_k, every rival is raised by
    s_k * eps * d_k, s_k = clip(-r_k / (d_k eps), 0.01, 1), detached: the full worst case for a
    rival that is certified, a tie for one that is not, one per cent for one that already wins.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: how fast the margin of the label over each class can fall (CertifiedNetwork.
            logits_and_rates), shape (B, K), 0 for the label.
        t_B: labels, int64, shape (B,).
        eps: training radius in the network's norm and pixels of [0, 1], >= 0.
        scale: inverse temperature of the cross-entropy, > 0. The certificate never sees it.

    Returns:
        Scalar tensor.
    """
    # The certificate looks at y alone, so scaling here changes the training and no radius.
    return F.cross_entropy(scale * shifted_logits(y_BK, d_BK, t_B, eps), t_B)


def shifted_logits(y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: Tensor | float) -> Tensor:
    """Relative logits r_k + s_k eps d_k of emma_loss, shape (B, K)."""
    r_BK = relative_logits(y_BK, t_B)
    shift_BK = eps * d_BK
    with torch.no_grad():
        s_BK = (-r_BK / shift_BK.clamp_min(DIVISION_FLOOR)).clamp(_SHIFT_FLOOR, 1.0)
    return r_BK + s_BK * shift_BK
