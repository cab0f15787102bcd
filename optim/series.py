"""FastExp: the exponential of a skew matrix applied to X, by the Frobenius rule of LipNeXt.

The series is evaluated by Horner's rule on X itself (`Y <- X + Y D / i` for i = k..1), so order k
costs k products and no power of D is ever formed. It never pads, batches or communicates, so the
result for one matrix does not depend on what else is updated.
"""

import math

import torch
from torch import Tensor

# (upper limit of ||D||_F, order); from the last limit on, the exponential is exact.
FROBENIUS_RULE = ((0.05, 2), (0.25, 3), (1.0, 4))

# The exact branch takes substeps of at most this spectral norm. Horner's rounding error grows like
# exp(norm), its cost per unit of norm falls slowly; 2 loses less than three bits.
_SUBSTEP_NORM = 2.0


def order_of(norm_F: float) -> int | None:
    """Order of the truncated series for an increment of Frobenius norm `norm_F`.

    Args:
        norm_F: ||D||_F.

    Returns:
        2 below 0.05, 3 below 0.25, 4 below 1, and None (exact exponential) from 1 on. A norm that
        is not finite gives order 2, whose result is not finite either: raising on the one rank
        that owns the matrix would leave the other ranks waiting in their collective.
    """
    if not math.isfinite(norm_F):
        return FROBENIUS_RULE[0][1]
    return next((order for limit, order in FROBENIUS_RULE if norm_F < limit), None)


def apply_exponential(X: Tensor, D: Tensor) -> Tensor:
    """X FastExp(D) for skew D (LipNeXt; ORTH).

    Args:
        X: Matrix (n, n), float32 or float64.
        D: Skew increment (n, n), same dtype and device.

    Returns:
        A new (n, n) tensor; equal to X when D is zero.
    """
    # One host synchronisation for both norms: the order is a branch on the host.
    norm_F, norm_1 = torch.stack(
        (torch.linalg.matrix_norm(D), torch.linalg.matrix_norm(D, ord=1))
    ).tolist()
    order = order_of(norm_F)
    if order is not None:
        return _horner(X, D, order)
    # For skew D both are upper bounds of ||D||_2: singular values come in pairs, and D is normal.
    norm_2 = min(norm_F / math.sqrt(2.0), norm_1)
    substeps = math.ceil(norm_2 / _SUBSTEP_NORM)
    terms = taylor_terms(norm_2 / substeps, D.dtype)
    for _ in range(substeps):
        X = _horner(X, D, terms, scale=1.0 / substeps)
    return X


def taylor_terms(norm: float, dtype: torch.dtype) -> int:
    """Smallest order whose Taylor remainder of exp at spectral norm `norm` is below round-off.

    The remainder after order k is at most `norm^(k+1)/(k+1)! / (1 - norm/(k+2))`; it is compared
    with half the machine epsilon, relative to the norm 1 of an orthogonal factor.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    order, term = 1, norm * norm / 2
    while norm >= order + 2 or term / (1 - norm / (order + 2)) > unit_roundoff:
        order += 1
        term *= norm / (order + 1)
    return order


def _horner(X: Tensor, D: Tensor, order: int, scale: float = 1.0) -> Tensor:
    """X (I + A + ... + A^order / order!) with A = scale D."""
    Y = X
    for i in range(order, 0, -1):
        Y = torch.addmm(X, Y, D, alpha=scale / i)
    return Y
