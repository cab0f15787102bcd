"""Cross-entropy after the label's logit was lowered (arXiv 2208.03160)."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.losses.base import STRICT, Loss, lowered


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OffsetLoss(Loss):
    """Cross-entropy after the label's logit was lowered (arXiv 2208.03160)."""

    kind: Literal["offset"] = "offset"
    offset: float = Field(default=2.0**0.5, ge=0)
    """What the logit of the label is lowered by."""

    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """See Loss."""
        return offset_loss(y_BK, t_B, self.offset, self.scale)


def offset_loss(y_BK: Tensor, t_B: Tensor, offset: float, scale: float) -> Tensor:
    """Mean of CE(scale (y - offset onehot(t))) / scale: a margin of `offset` (arXiv 2208.03160).

    Args:
        y_BK: logits, shape (B, K).
        t_B: labels, int64, shape (B,).
        offset: what the logit of the label is lowered by, >= 0.
        scale: inverse temperature, > 0.

    Returns:
        Scalar tensor.
    """
    lowered_BK = lowered(y_BK, t_B, offset)
    return F.cross_entropy(scale * lowered_BK, t_B) / scale
