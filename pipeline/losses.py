"""Training losses on margins. Tensors: y_BK logits, d_KK margin factors, t_B labels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import LossConfig
from pipeline.schedules import Moment

_SHIFT_FLOOR = 0.01  # share of the shift a rival keeps once it beats the label (arXiv 2310.02513)
_DIVISION_FLOOR = 1e-8


def emma_loss(y_BK: Tensor, d_KK: Tensor, t_B: Tensor, eps: Tensor | float, scale: float) -> Tensor:
    """Mean EMMA loss (efficient margin maximisation, arXiv 2310.02513).

    With r_k = y_k - y_t and d_k the Lipschitz constant of r_k, every rival is raised by
    s_k * eps * d_k, s_k = clip(-r_k / (d_k eps), 0.01, 1), detached: the full worst case for a
    rival that is certified, a tie for one that is not, one per cent for one that already wins.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_KK: margin factors, shape (K, K), zero diagonal.
        t_B: labels, int64, shape (B,).
        eps: training radius, l2 in pixels of [0, 1], >= 0.
        scale: inverse temperature of the cross-entropy, > 0. The certificate never sees it.

    Returns:
        Scalar tensor.
    """
    r_BK = y_BK - y_BK.gather(1, t_B[:, None])
    shift_BK = eps * d_KK[t_B]
    with torch.no_grad():
        s_BK = (-r_BK / shift_BK.clamp_min(_DIVISION_FLOOR)).clamp(_SHIFT_FLOOR, 1.0)
    return F.cross_entropy(scale * (r_BK + s_BK * shift_BK), t_B)


def _emma(y_BK: Tensor, d_KK: Tensor, t_B: Tensor, now: Moment, config: LossConfig) -> Tensor:
    return emma_loss(y_BK, d_KK, t_B, now.eps, config.scale)


Loss = Callable[[Tensor, Tensor, Tensor, Moment, LossConfig], Tensor]
"""(logits, margin factors, labels, moment, settings) -> mean loss."""

LOSSES: dict[str, Loss] = {
    "emma": _emma,
}
"""By `LossConfig.kind`."""
