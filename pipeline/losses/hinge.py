"""Hinges of certified margins plus a cross-entropy whose weight decays (arXiv 2210.01787)."""

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.losses.base import DIVISION_FLOOR, STRICT, RampedLoss, relative_logits


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _HingeLoss(RampedLoss):
    """A hinge, and a cross-entropy whose weight falls exponentially in a part of the run."""

    ce_start: float = Field(default=0.1, gt=0)
    """Weight of the cross-entropy at first."""
    ce_end: float = Field(default=1e-3, gt=0)
    """The same at the end of its exponential decay."""
    ce_from: float = Field(default=1 / 15, ge=0, lt=1)
    """Share of the run after which the weight decays."""
    ce_to: float = Field(default=29 / 30, gt=0, le=1)
    """Share of the run after which the weight stays."""

    def __post_init__(self) -> None:
        """Refuse a decay that ends before it begins."""
        if self.ce_from >= self.ce_to:
            raise PipelineError(f"ce_from={self.ce_from:g} must be less than ce_to={self.ce_to:g}")

    def without_effect(self) -> dict[str, str]:
        """See Loss."""
        found = super().without_effect()
        if self.ce_start == self.ce_end:
            reason = f"ce_start=ce_end={self.ce_end:g}"
            found |= {"ce_from": reason, "ce_to": reason}
        return found

    def ce_weight(self, progress: float) -> float:
        """Weight of the cross-entropy when a share of the run is done, in [0, 1)."""
        done = min(1.0, max(0.0, (progress - self.ce_from) / (self.ce_to - self.ce_from)))
        return float(self.ce_start * (self.ce_end / self.ce_start) ** done)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureLoss(_HingeLoss):
    """Share of samples not certified at the radius, as a clipped hinge, plus a cross-entropy.

    arXiv 2210.01787.
    """

    kind: Literal["mixture"] = "mixture"

    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """See Loss."""
        return mixture_loss(y_BK, d_BK, t_B, eps, self.scale, self.ce_weight(progress))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CeHingeLoss(_HingeLoss):
    """Hinge of the certified margin of correct samples, plus a cross-entropy.

    arXiv 2210.01787.
    """

    kind: Literal["ce_hinge"] = "ce_hinge"

    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """See Loss."""
        return ce_hinge_loss(y_BK, d_BK, t_B, eps, self.scale, self.ce_weight(progress))


def mixture_loss(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: float, scale: float, weight: float
) -> Tensor:
    """Mean clipped hinge of certified margins, plus a weighted cross-entropy (arXiv 2210.01787).

    mean_B max_k clip(1 + (y_k - y_t) / (eps d_k), 0, 1) counts, with a slope, the samples that are
    not certified at eps; the cross-entropy moves those that are far from it.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss; 2 for 1-Lipschitz logits in l-infinity.
        t_B: labels, int64, shape (B,).
        eps: training radius in the network's norm and pixels of [0, 1], > 0.
        scale: inverse temperature of the cross-entropy, > 0; the paper trains it.
        weight: weight of the cross-entropy, >= 0.

    Returns:
        Scalar tensor.
    """
    r_BK = relative_logits(y_BK, t_B)
    hinge_BK = 1 + r_BK / (eps * d_BK).clamp_min(DIVISION_FLOOR)
    # The label's own entry is 1 + 0 / floor = 1: it would make every maximum 1.
    hinge_B = hinge_BK.scatter(1, t_B[:, None], 0.0).amax(1).clamp(0, 1)
    return hinge_B.mean() + weight * F.cross_entropy(scale * y_BK, t_B)


def ce_hinge_loss(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: float, scale: float, weight: float
) -> Tensor:
    """Mean hinge of certified margins of correct samples, plus a weighted cross-entropy.

    mean_B [prediction = t] max(0, 1 + max_{k != t} (y_k - y_t + eps d_k)): a sample whose margin is
    at least 1 all over the radius costs nothing, one that is wrong does not either; the
    cross-entropy moves those (SortNet + MLP, arXiv 2210.01787).

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss.
        t_B: labels, int64, shape (B,).
        eps: training radius in the network's norm and pixels of [0, 1], >= 0.
        scale: inverse temperature of the cross-entropy, > 0; the paper trains it.
        weight: weight of the cross-entropy, >= 0.

    Returns:
        Scalar tensor.
    """
    r_BK = relative_logits(y_BK, t_B)
    worst_B = (r_BK + eps * d_BK).scatter(1, t_B[:, None], -torch.inf).amax(1)
    hinge_B = (1 + worst_B).clamp(min=0)
    correct_B = y_BK.argmax(1) == t_B
    return (correct_B * hinge_B).mean() + weight * F.cross_entropy(scale * y_BK, t_B)
