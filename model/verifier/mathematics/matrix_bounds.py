"""Bounds of one matrix: section 3 of docs/explanation/certificate.md in NumPy float64."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.verifier.mathematics.rounding import GUARD, ROUND_UP, Floats, U, gamma


class MatrixBounds(NamedTuple):
    """What section 3 derives from one matrix."""

    upper: float
    lower: float
    absolute: float
    frobenius: float
    condition: float | None = None
    """rho of a matrix whose rows are made orthonormal (docs/explanation/families.md)."""

    def stated(self) -> dict[str, float]:
        """The numbers that the certificate has."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def bounds_of_matrix(matrix: npt.NDArray[np.float32]) -> MatrixBounds:
    """All four numbers of one matrix."""
    A = matrix.astype(np.float64)
    return MatrixBounds(upper_bound(A), lower_bound(A), schur(np.abs(A)), frobenius(A) * ROUND_UP)


def schur(magnitude: Floats) -> float:
    """A number >= ||A|| of a matrix without negative entries: sqrt(||A||_1 ||A||_inf)."""
    return math.sqrt(magnitude.sum(axis=0).max() * magnitude.sum(axis=1).max()) * ROUND_UP


def upper_bound(A: Floats) -> float:
    """A number >= ||A||, by Gram iteration with the rounding of every product accounted for."""
    largest = float(np.abs(A).max(initial=0.0))
    if largest == 0:
        return 0.0
    exponent = 0 if 2.0**-100 <= largest <= 2.0**100 else math.frexp(largest)[1]
    A = np.ldexp(A, -exponent)
    length, order = max(A.shape), min(A.shape)
    G = _symmetric(A.T @ A if A.shape[0] >= A.shape[1] else A @ A.T)
    diagonal = G.diagonal()
    rounding = order * gamma(length, U) * float(diagonal.max()) * (1 + 2.0**-20)
    q = math.inf
    if A.shape[0] == A.shape[1] and diagonal.min() >= 0.5 and diagonal.max() <= 2:
        q = 1 + _squarings(G - np.eye(order), 3)  # this subtraction is exact
    if q > 1.1:
        q = min(q, _squarings(G, 6))
    return scaled(math.sqrt(q + rounding) * (1 + GUARD), exponent)


def scaled(value: float, exponent: int) -> float:
    """Value * 2^exponent; infinite, and no exception, where that overflows."""
    with np.errstate(all="ignore"):
        return float(np.ldexp(value, exponent))


def _squarings(T: Floats, count: int) -> float:
    """Q(T, m) >= ||T|| of a symmetric matrix: ||T||^2 = ||T T||, m times."""
    order = len(T)
    steps = []
    for _ in range(count):
        exponent = math.frexp(float(np.abs(T).max()))[1]  # 0 for a zero matrix
        T = np.ldexp(T, -exponent)
        steps.append((frobenius(T), exponent))
        T = _symmetric(T @ T)
    bound = frobenius(T)
    for norm, exponent in reversed(steps):
        bound = scaled(math.sqrt(bound + gamma(order, U) * norm * norm), exponent)
    return bound * ROUND_UP


def lower_bound(A: Floats) -> float:
    """A number <= ||A||: what A does to the vector of 30 power iterations."""
    v = np.cos(np.arange(1, A.shape[1] + 1, dtype=np.float64))
    v /= np.linalg.norm(v)
    for _ in range(30):
        v = A.T @ (A @ v)
        norm = np.linalg.norm(v)
        if norm == 0:
            return 0.0
        v /= norm
    return float(np.linalg.norm(A @ v) / np.linalg.norm(v)) * (1 - 2.0**-30)


def frobenius(T: Floats) -> float:
    """||T||_F, not rounded up."""
    return math.sqrt(float(np.square(T).sum(axis=1).sum()))


def _symmetric(T: Floats) -> Floats:
    """The lower triangle, copied to the upper one."""
    lower = np.tril(T, -1)
    result = lower + lower.T
    np.fill_diagonal(result, T.diagonal())
    return result
