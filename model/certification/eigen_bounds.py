"""Extreme eigenvalues of Hermitian matrices, proved by a Cholesky factor and its residual.

L L^* is positive semidefinite for any L whatever. So A >= -||L L^* - A|| for every computed factor
L of A, and the residual is computed: nothing is assumed of the factorisation, of its library or of
the device, and estimates of the eigenvalues need not be accurate.
"""

import math

import torch
from torch import Tensor

from model.certification.dot_products import COMPLEX, product
from model.certification.rounding import SLACK, U64, gamma


def proved_least(gram: Tensor, estimate: Tensor) -> Tensor:
    """A lower bound of every least eigenvalue, or 0 where none was found.

    Args:
        gram: Hermitian matrices, float64 or complex128, shape (..., n, n).
        estimate: of their least eigenvalues, (...).
    """
    s = 0.99 * estimate
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    ok = _nearly_semidefinite(gram - s[..., None, None] * _identity(gram), trace)
    return torch.where(ok, (s - _charge(gram, trace)) * (1 - 2.0**-50), 0.0).clamp(min=0)


def proved_norm(matrices: Tensor) -> float:
    """An upper bound of the norms of all matrices, float64 or complex128, shape (..., m, n)."""
    m = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mH
    largest = float(m.abs().max())
    if largest == 0:
        return 0.0
    if not 2.0**-100 <= largest <= 2.0**100:
        return math.inf  # squares might overflow or vanish
    rows, n = m.shape[-2:]
    gram = product(m.mH, m)
    trace = float(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).max())
    s = float(torch.linalg.eigvalsh(gram).max()) * (1 + 2.0**-20)
    if not bool(
        _nearly_semidefinite(s * _identity(gram) - gram, gram.new_tensor(n * s).real).all()
    ):
        s = trace
    error = gamma(COMPLEX * (rows + 3), U64) * trace
    error += float(_charge(gram, gram.new_tensor(n * s).real))
    return math.sqrt(s + error) * SLACK


def _charge(matrices: Tensor, trace: Tensor) -> Tensor:
    """What is charged for the residual of a factor, and for making A, relative to its trace."""
    return 2 * gamma(COMPLEX * (matrices.shape[-1] + 3), U64) * trace


def _nearly_semidefinite(matrices: Tensor, trace: Tensor) -> Tensor:
    """Whether ||L L^* - A|| is below the charge, for the factor L that the library returns.

    Args:
        matrices: A, shape (..., n, n).
        trace: at least the trace of A, (...).
    """
    factor = torch.linalg.cholesky_ex(matrices).L
    n = matrices.shape[-1]
    # Of the product that the residual is the difference of: its own rounding.
    rounding = gamma(COMPLEX * (n + 1), U64) * frobenius(factor).square()
    residual = frobenius(product(factor, factor.mH) - matrices) + rounding
    # Not a number, where there is no factor, is no bound.
    return residual * SLACK <= 2 * gamma(COMPLEX * (n + 2), U64) * trace


def frobenius(matrices: Tensor) -> Tensor:
    """Frobenius norms of (..., m, n), by rows: rounding stays below gamma_(m + n)."""
    norms: Tensor = matrices.abs().square().sum(-1).sum(-1).sqrt()
    return norms


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
