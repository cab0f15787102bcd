"""Cross-entropy less a multiple of the certified radius (arXiv 2108.04062)."""

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses.base import DIVISION_FLOOR, STRICT, Loss


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CertificateLoss(Loss):
    """Cross-entropy less a multiple of the certified radius (arXiv 2108.04062).

    It has no training radius; the slopes of a curved head are those at `eps`.
    """

    kind: Literal["certificate"] = "certificate"
    certificate_weight: float = Field(default=0.5, ge=0)
    """What is taken off the loss per unit of radius."""

    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """See Loss."""
        return certificate_loss(y_BK, d_BK, t_B, self.scale, self.certificate_weight)


def certificate_loss(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, scale: float, weight: float
) -> Tensor:
    """Mean cross-entropy less `weight` times the certified radius (CR, arXiv 2108.04062).

    The radius min_j (y_t - y_j) / d_j counts where it is positive, and is differentiated through
    the logits and the rates.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss.
        t_B: labels, int64, shape (B,).
        scale: inverse temperature of the cross-entropy, > 0.
        weight: what one unit of radius is worth, >= 0.

    Returns:
        Scalar tensor.
    """
    margin_BK = y_BK.gather(1, t_B[:, None]) - y_BK
    r_BK = margin_BK / d_BK.clamp_min(DIVISION_FLOOR)
    r_B = r_BK.scatter(1, t_B[:, None], torch.inf).amin(1)
    return F.cross_entropy(scale * y_BK, t_B) - weight * r_B.relu().mean()
