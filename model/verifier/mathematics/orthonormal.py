"""Rows made orthonormal: Q = L^-1 X with S = X X^* + eta I = L L^* (docs/families.md).

Q Q^* = I - eta (L^* L)^-1, so ||Q|| < 1 for any X: no norm enters the bound. What has to be proved
is how far a computed Q is from Q. For the evaluator's programs this follows from a bound of
||S^-1||; for the verifier's own Q from residuals alone.
"""

import math
from typing import NamedTuple

import numpy as np

from model.verifier.mathematics.arithmetic import ROUND_UP, Floats, Program, U, combined, gamma
from model.verifier.mathematics.hermitian import (
    Matrices,
    adjoint,
    factor,
    norms,
    smallest_eigenvalues,
    terms,
)

SMALLEST, LARGEST = 2.0**-10, 2.0**40
LARGEST_DEFECT = 0.25


class Rows(NamedTuple):
    """X of one layer, or of every frequency of one."""

    X: Matrices
    """Shape (F, m, k)."""
    share: float
    """eta as a share of the mean of the diagonal of X X^*."""
    size: float
    """M: bounds ||X||_F^2 and the squared sizes of the terms of its entries."""
    entries: float
    """What a transform adds to the relative error of the entries of a computed X, in units of u."""


def entry_error(rows: Rows, program: Program) -> float:
    """delta: error of a computed X in the Frobenius norm by sqrt(M)."""
    u = program.wide
    return combined(program.weights, program.weights, gamma(8, u), rows.entries * u)


def _gram_error(rows: Rows, delta: float, u: float) -> float:
    """a: ||computed S - S||_F <= a M."""
    m, k = rows.X.shape[-2:]
    return 4 * (delta + gamma(terms(rows.X) * (k + m + 4), u) * (1 + delta) ** 2)


def gram(rows: Rows) -> tuple[Matrices, Floats]:
    """S and eta, shapes (F, m, m) and (F,)."""
    X = rows.X
    S = X @ adjoint(X)
    eta = rows.share * np.trace(S, axis1=-2, axis2=-1).real / X.shape[-2]
    return S + eta[:, None, None] * np.eye(X.shape[-2]), eta


def condition(rows: Rows) -> float:
    """Rho >= M ||S^-1||; infinite where nothing can be proved."""
    if not SMALLEST <= rows.size <= LARGEST:
        return math.inf
    S, eta = gram(rows)
    least = float(np.maximum(eta * (1 - 2.0**-20), smallest_eigenvalues(S)).min())
    left = least - _gram_error(rows, combined(gamma(8, U), rows.entries * U), U) * rows.size
    return rows.size / left * ROUND_UP if left > 0 else math.inf


def program_error(rows: Rows, rho: float, program: Program) -> float:
    """Error of the Q of a program in the Frobenius norm, one matrix; infinite if not proved.

    The factor has L' L'^* = S + D, ||D||_F <= (a + 3 gamma) M, so L' = L C with C C^* = I + E and
    ||E||_F <= q; then ||C - I||_F <= q for q <= 1/4.
    """
    m, c, u = rows.X.shape[-2], terms(rows.X), program.wide
    delta = entry_error(rows, program)
    q = rho * (_gram_error(rows, delta, u) + 3 * gamma(c * (m + 1), u))
    if not q <= LARGEST_DEFECT:
        return math.inf
    g = gamma(c * m, u) * math.sqrt(2.2 * rho) / (1 - q)
    if not g <= LARGEST_DEFECT:
        return math.inf
    entries = math.sqrt(rho) * delta / (1 - q)
    return q / (1 - q) + entries + 2 * g * (math.sqrt(m) + entries)


def orthonormal(rows: Rows, rho: float) -> tuple[Matrices, float]:
    """The verifier's own Q, shape (F, m, k), and a bound of its error by residuals.

    With R1 = S - L' L'^* and R2 = X - L' Q': q = ||S^-1|| ||R1||_F takes the place of q above, and
    Q' = L'^-1 (X - R2) is off by another ||L'^-1|| ||R2||_F.
    """
    S, _ = gram(rows)
    Q, worst = np.zeros_like(rows.X), 0.0
    m = S.shape[-1]
    rounding = gamma(terms(rows.X) * (rows.X.shape[-1] + m + 4), U)
    delta = combined(gamma(8, U), rows.entries * U)
    for i, matrix in enumerate(S):
        L = factor(matrix)
        if L is None:
            return Q, math.inf
        Q[i] = np.linalg.solve(L, rows.X[i])
        L_size = float(norms(L)) ** 2
        first = float(norms(matrix - L @ adjoint(L))) + rounding * L_size
        first += _gram_error(rows, delta, U) * rows.size
        second = float(norms(rows.X[i] - L @ Q[i])) + delta * math.sqrt(rows.size)
        second += rounding * math.sqrt(L_size) * float(norms(Q[i]))
        q = rho / rows.size * first
        if not q <= LARGEST_DEFECT:
            return Q, math.inf
        error = q / (1 - q) + math.sqrt(rho / rows.size) / (1 - q) * second
        worst = max(worst, error)
    return Q, worst
