"""Extreme eigenvalues of Hermitian matrices, proved by a Cholesky factorisation that succeeds.

If the factorisation of a matrix A of order n succeeds in floating point, A + E is positive definite
for some E with ||E|| <= gamma_(n+1) / (1 - gamma_(n+1)) trace(A) (Higham, theorem 10.3). It takes
substitution, in whatever order and blocks. Estimates of the eigenvalues need not be accurate.
"""

import math

import torch
from torch import Tensor

from model.certification.rounding import SLACK, U64, gamma

COMPLEX = 4
"""A complex dot product of k terms errs by at most gamma(4 k) times the sum of its terms' sizes."""


def proved_least(gram: Tensor, estimate: Tensor) -> Tensor:
    """A lower bound of every least eigenvalue, or 0 where none was found.

    Args:
        gram: Hermitian matrices, float64 or complex128, shape (..., n, n).
        estimate: of their least eigenvalues, (...).
    """
    s = 0.99 * estimate
    ok = _succeeds(gram - s[..., None, None] * _identity(gram))
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    error = 2 * gamma(COMPLEX * (gram.shape[-1] + 3), U64) * trace
    return torch.where(ok, (s - error) * (1 - 2.0**-50), 0.0).clamp(min=0)


def proved_norm(matrices: Tensor) -> float:
    """An upper bound of the norms of all matrices, float64 or complex128, shape (..., m, n)."""
    m = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mH
    largest = float(m.abs().max())
    if largest == 0:
        return 0.0
    if not 2.0**-100 <= largest <= 2.0**100:
        return math.inf  # squares might overflow or vanish
    rows, n = m.shape[-2:]
    gram = m.mH @ m
    trace = float(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).max())
    s = float(torch.linalg.eigvalsh(gram).max()) * (1 + 2.0**-20)
    if not bool(_succeeds(s * _identity(gram) - gram).all()):
        s = trace
    error = gamma(COMPLEX * (rows + 3), U64) * trace
    error += 2 * gamma(COMPLEX * (n + 3), U64) * n * s
    return math.sqrt(s + error) * SLACK


def _succeeds(matrices: Tensor) -> Tensor:
    result: Tensor = torch.linalg.cholesky_ex(matrices).info == 0
    return result


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
