"""From margins to the distance that the features can move before a margin can reach zero.

The certified radius of an image follows from it in `model/certify.py`, rounding charged.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.errors import ModelError

Radii = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(margins (B, K), slopes, curvature, prediction (B,)) -> distances (B, K); see slope_radii."""


def feature_radius(margins: Tensor, slopes: Tensor, curvature: Tensor) -> Tensor:
    """How far the features can move before a margin m is used up: m = s r + c r^2 / 2.

    Linear heads have constant slopes and no curvature; so have networks whose logits are each
    1-Lipschitz in l-infinity (slope 2).

    Args:
        margins: m, less what rounding may have done; any shape.
        slopes: s >= 0: how fast m falls at the image.
        curvature: c >= 0: how fast s can grow.

    Returns:
        r of the same shape; not positive where m is not; infinite for m > 0 where s = c = 0.
    """
    # 2 m / (s + sqrt(s^2 + 2 c m)): no difference, no square that vanishes.
    least = torch.finfo(slopes.dtype).tiny ** 0.5 * 2.0**10
    bent = (slopes.clamp(min=least).square() + 2 * curvature * margins.clamp(min=0)).sqrt()
    rates = torch.where(curvature > 0, (slopes + bent) / 2, slopes)
    free = torch.where(margins > 0, torch.inf, 0.0)
    return torch.where(rates > 0, margins / rates, free)


def slope_radii(margins: Tensor, slopes: Tensor, curvature: Tensor, prediction: Tensor) -> Tensor:
    """Distances at which the margins of the predictions are used up, each class on its own.

    Args:
        margins: of the prediction over every class, (B, K).
        slopes: how fast differences of logits fall at the image, (B, K, K), or everywhere, (K, K).
        curvature: how fast slopes can grow, (K, K).
        prediction: classes, int64 (B,).

    Returns:
        shape (B, K); what stands at the prediction itself means nothing.

    Raises:
        ModelError: shapes that do not match, or a value that is negative or not finite.
    """
    table = (*margins.shape, margins.shape[1])
    if slopes.shape not in {table, table[1:]}:
        raise ModelError(
            f"margins of shape {tuple(margins.shape)} and factors of shape {tuple(slopes.shape)}; "
            "expected (B, K) and (K, K) or (B, K, K)"
        )
    if curvature.shape != table[1:]:
        raise ModelError(f"curvature of shape {tuple(curvature.shape)}; expected {table[1:]}")
    for name, values in (("margin factors", slopes), ("curvatures", curvature)):
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ModelError(f"{name} must be finite and not negative")
    rows = torch.arange(len(prediction), device=prediction.device)
    own = slopes[prediction] if slopes.ndim == 2 else slopes[rows, prediction]
    return feature_radius(margins, own, curvature[prediction])
