"""Rows made orthonormal: Q = L^-1 X with S = X X^* + eta I = L L^* (docs/explanation/families.md).

Q Q^* = I - eta (L^* L)^-1, so ||Q|| < 1 for any X: no norm enters the bound. What has to be proved
is how far a computed Q is from Q: from a bound of ||S^-1|| and the residuals of the factor and of
the substitution. Those of the evaluator's programs are at most h; the verifier measures its own.
"""

import math
from typing import NamedTuple

import numpy as np

from model.verifier.mathematics.eigen_bounds import (
    Matrices,
    adjoint,
    factor,
    multiply,
    norms,
    smallest_eigenvalues,
    terms,
)
from model.verifier.mathematics.rounding import (
    ROUND_UP,
    VERIFIER,
    Floats,
    Program,
    U,
    combined,
    gamma,
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
    """delta: error of a computed X in the Frobenius norm by sqrt(M); X is computed in float64."""
    return combined(program.weights, program.weights, gamma(8, U), rows.entries * U)


def _gram_error(rows: Rows, delta: float) -> float:
    """a: ||computed S - S||_F <= a M."""
    m, k = rows.X.shape[-2:]
    return 4 * (delta + gamma(terms(rows.X) * (k + m + 4), U) * (1 + delta) ** 2)


def gram(rows: Rows) -> tuple[Matrices, Floats]:
    """S and eta, shapes (F, m, m) and (F,)."""
    X = rows.X
    S = multiply(X, adjoint(X))
    eta = rows.share * np.trace(S, axis1=-2, axis2=-1).real / X.shape[-2]
    return S + eta[:, None, None] * np.eye(X.shape[-2]), eta


def condition(rows: Rows) -> float:
    """Rho >= M ||S^-1||; infinite where nothing can be proved."""
    if not SMALLEST <= rows.size <= LARGEST:
        return math.inf
    S, eta = gram(rows)
    least = float(np.maximum(eta, smallest_eigenvalues(S)).min())
    left = least - _gram_error(rows, entry_error(rows, VERIFIER)) * rows.size
    return rows.size / left * ROUND_UP if left > 0 else math.inf


def program_error(rows: Rows, rho: float, program: Program) -> float:
    """Error of the Q of a program in the Frobenius norm, one matrix; infinite if not proved.

    The factor has L' L'^* = S + D, ||D||_F <= (a + h') M, so L' = L C with C C^* = I + E and
    ||E||_F <= q; then ||C - I||_F <= q for q <= 1/4. Q is rounded to the program at last.
    """
    m, c = rows.X.shape[-2], terms(rows.X)
    delta = entry_error(rows, program)
    h = 4 * gamma(c * (m + 3), U) * (1 + delta) ** 2
    q = rho * (_gram_error(rows, delta) + h)
    if not q <= LARGEST_DEFECT:
        return math.inf
    error = (q + math.sqrt(rho) * (delta + h * math.sqrt(m))) / (1 - q)
    return error + program.wide * math.sqrt(m) * (1 + error)


def orthonormal(rows: Rows, rho: float) -> tuple[Matrices, float]:
    """The verifier's own Q, shape (F, m, k), and a bound of its error by residuals.

    With R1 = S - L' L'^* and R2 = X - L' Q': q = ||S^-1|| ||R1||_F takes the place of q above, and
    Q' = L'^-1 (X - R2) is off by another ||L'^-1|| ||R2||_F.
    """
    S, _ = gram(rows)
    Q, worst = np.zeros_like(rows.X), 0.0
    m = S.shape[-1]
    rounding = gamma(terms(rows.X) * (rows.X.shape[-1] + m + 4), U)
    delta = entry_error(rows, VERIFIER)
    for i, matrix in enumerate(S):
        L = factor(matrix)
        if L is None:
            return Q, math.inf
        Q[i] = np.linalg.solve(L, rows.X[i])
        L_size = float(norms(L)) ** 2
        first = float(norms(matrix - multiply(L, adjoint(L)))) + rounding * L_size
        first += _gram_error(rows, delta) * rows.size
        second = float(norms(rows.X[i] - multiply(L, Q[i]))) + delta * math.sqrt(rows.size)
        second += rounding * math.sqrt(L_size) * float(norms(Q[i]))
        q = rho / rows.size * first
        if not q <= LARGEST_DEFECT:
            return Q, math.inf
        error = q / (1 - q) + math.sqrt(rho / rows.size) / (1 - q) * second
        worst = max(worst, error)
    return Q, worst
