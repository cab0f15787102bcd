"""Logit annealing after the shift of EMMA (arXiv 2505.15174)."""

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses.base import STRICT, RampedLoss, lowered
from pipeline.losses.emma import shifted_logits


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogitAnnealingLoss(RampedLoss):
    """EMMA lowered by an offset, samples weighted by how far they are from certain.

    arXiv 2505.15174.
    """

    kind: Literal["logit_annealing"] = "logit_annealing"
    offset: float = Field(default=2.0**0.5, ge=0)
    """What the logit of the label is lowered by."""
    temperature: float = Field(default=0.75, gt=0)
    """What the logits are divided by."""
    exponent: float = Field(default=5.0, ge=0)
    """Power of 1 - probability that weights the samples."""

    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """See Loss."""
        return logit_annealing_loss(
            y_BK,
            d_BK,
            t_B,
            eps,
            self.scale,
            offset=self.offset,
            temperature=self.temperature,
            exponent=self.exponent,
        )


def logit_annealing_loss(
    y_BK: Tensor,
    d_BK: Tensor,
    t_B: Tensor,
    eps: Tensor | float,
    scale: float,
    *,
    offset: float,
    temperature: float,
    exponent: float,
) -> Tensor:
    """Logit annealing after the shift of emma_loss (arXiv 2505.15174).

    With z the shifted logits and l = CE((z - offset onehot(t)) / T, t), the mean of
    T (1 - e^-l)^exponent l: samples whose margin exceeds the offset by far no longer count, so that
    capacity goes where margins are small.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss.
        t_B: labels, int64, shape (B,).
        eps: see emma_loss.
        scale: what the shifted logits are multiplied by, > 0; 1 in the paper.
        offset: what the logit of the label is lowered by, >= 0.
        temperature: T > 0.
        exponent: >= 0.

    Returns:
        Scalar tensor.
    """
    z_BK = scale * shifted_logits(y_BK, d_BK, t_B, eps)
    lowered_BK = lowered(z_BK, t_B, offset)
    l_B = F.cross_entropy(lowered_BK / temperature, t_B, reduction="none")
    # expm1 and not 1 - exp: a confident sample has l near 0, where the difference has no digits.
    return (temperature * (-torch.expm1(-l_B)).pow(exponent) * l_B).mean()
