"""Bounds of stored matrices: proved from above, observed from below.

Section 3 of docs/explanation/certificate.md.

Everything is computed in float64 from the stored entries, which are exact there, and the rounding
of the computation is part of the bound. Power iteration converges from below: it gives `lower`.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.certification.rounding import SLACK, U64, gamma
from model.errors import ModelError

_NEAR_IDENTITY_PRODUCTS = 3
_GENERAL_PRODUCTS = 6
_NEARLY_ORTHOGONAL = 1.1
_POWER_STEPS = 30


@dataclasses.dataclass(frozen=True)
class MatrixBound:
    """What is known of one stored matrix A."""

    name: str
    """Name of the parameter."""
    shape: tuple[int, int]
    """Rows and columns."""
    sha256: str
    """Digest of the entries as little-endian float32, row by row."""
    upper: float
    """Proved: ||A|| is at most this."""
    lower: float
    """Observed: ||A|| is at least this."""
    absolute: float
    """Proved bound of || |A| ||, the norm of the entrywise absolute values."""
    frobenius: float
    """Proved bound of ||A||_F."""


Matrices = Mapping[str, MatrixBound]


def matrix_bound(matrix: Tensor, name: str) -> MatrixBound:
    """Bounds of one matrix, on the device where it lies.

    Costs 4 products of order n for nearly orthogonal matrices, 7 for others.

    Args:
        matrix: shape (m, n), any floating type.
        name: name of the matrix, for the record and the error.

    Raises:
        ModelError: not a matrix, or an entry is not finite.
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ModelError(f"{name} has shape {tuple(matrix.shape)}, a matrix is needed")
    a = matrix.detach().to(torch.float64)
    if not bool(a.isfinite().all()):
        raise ModelError(f"{name} holds values that are not finite")
    rows, columns = a.shape
    scale = _scale(a)
    a = _times_power(a, -scale)
    absolute = a.abs()
    sums = float(absolute.sum(0).max()) * float(absolute.sum(1).max())
    return MatrixBound(
        name=name,
        shape=(rows, columns),
        sha256=tensor_digest(matrix),
        upper=_scaled(_upper(a), scale),
        lower=_scaled(_lower(a), scale),
        absolute=_scaled(math.sqrt(sums) * SLACK, scale),
        frobenius=_scaled(_frobenius(a) * SLACK, scale),
    )


def norm_upper_bound(a: Tensor) -> float:
    """Proved upper bound of ||A||, `upper` of matrix_bound alone.

    Args:
        a: shape (m, n), float64, finite.
    """
    scale = _scale(a)
    return _scaled(_upper(_times_power(a, -scale)), scale)


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of the entries as little-endian float32 in row-major order."""
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(values.astype("<f4", copy=False).tobytes()).hexdigest()


def _scale(a: Tensor) -> int:
    """Exponent to divide by, so that squares of entries neither overflow nor vanish."""
    largest = float(a.abs().max())
    if largest == 0 or 2.0**-100 <= largest <= 2.0**100:
        return 0
    return math.frexp(largest)[1]


def _times_power(a: Tensor, exponent: int) -> Tensor:
    """A * 2^exponent, exactly; in two halves because 2^exponent itself may not be a float64."""
    half = exponent // 2
    return a * 2.0**half * 2.0 ** (exponent - half) if exponent else a


def _scaled(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def _frobenius(a: Tensor) -> float:
    """By rows: the rounding error is gamma_(m + n), not gamma_(m n)."""
    return float(a.norm(dim=1).norm())


def _upper(a: Tensor) -> float:
    """Gram iteration: ||A||^2 = ||G||, and ||T||^2 = ||T^2|| for symmetric T.

    For a nearly orthogonal A, T = G - I: the bound is 1 + ||G - I||, with ||G - I|| bounded by the
    8th root of a Frobenius norm. Otherwise T = G, and the 64th root.
    """
    if a.shape[0] < a.shape[1]:
        a = a.mT
    inner, order = a.shape
    gram = _mirrored(a.mT @ a)
    diagonal = gram.diagonal()
    error = order * gamma(inner, U64) * float(diagonal.max()) * (1 + 2.0**-20)
    square = math.inf
    if order == inner and bool(((diagonal >= 0.5) & (diagonal <= 2)).all()):
        near = gram.clone()
        near.diagonal().sub_(1)  # exact in this range
        square = 1 + _iterated_norm(near, _NEAR_IDENTITY_PRODUCTS)
    if square > _NEARLY_ORTHOGONAL:
        square = min(square, _iterated_norm(gram, _GENERAL_PRODUCTS))
    return math.sqrt(square + error) * (1 + 2.0**-50)


def _iterated_norm(t: Tensor, products: int) -> float:
    """Upper bound of the spectral norm of a symmetric matrix, with `products` squarings.

    ||T_k||^2 <= ||T_(k+1)|| + gamma_n ||T_k||_F^2, back from ||T_last||_F.
    """
    n = t.shape[0]
    frobenius, exponents = [], []
    for _ in range(products):
        largest = float(t.abs().max())
        exponents.append(math.frexp(largest)[1] if largest > 0 else 0)
        t = _times_power(t, -exponents[-1])
        frobenius.append(_frobenius(t))
        t = _mirrored(t @ t)
    bound = _frobenius(t)
    for norm, exponent in zip(reversed(frobenius), reversed(exponents), strict=True):
        bound = math.sqrt(bound + gamma(n, U64) * norm**2) * 2.0**exponent
    return bound * SLACK


def _mirrored(t: Tensor) -> Tensor:
    """The lower triangle copied to the upper one: a computed product need not be symmetric."""
    return t.tril() + t.tril(-1).mT


def _lower(a: Tensor) -> float:
    """Power iteration on A^T A from v_j = cos j; ||A v|| / ||v|| is a lower bound for any v."""
    v = torch.arange(1, a.shape[1] + 1, dtype=torch.float64).cos().to(a.device)
    for _ in range(_POWER_STEPS):
        v = v / v.norm().clamp(min=2.0**-1000)
        v = a.mT @ (a @ v)
    length = float(v.norm())
    return float((a @ v).norm()) / length * (1 - 2.0**-30) if length > 0 else 0.0
