"""Eigenvalues of Hermitian matrices, proved by residuals.

No theorem about a library's algorithm is used: L is whatever a factorisation returned, and what
counts is how far L L^* is from the matrix, computed in float64 with the rounding of that product.
"""

from typing import cast

import numpy as np
import numpy.typing as npt

from model.verifier.mathematics.arithmetic import ROUND_UP, Floats, U, gamma

Complexes = npt.NDArray[np.complex128]
Matrices = Floats | Complexes


def adjoint(A: Matrices) -> Matrices:
    """Conjugate transposes of the last two axes."""
    return A.conj().swapaxes(-1, -2)


def norms(A: Matrices) -> Floats:
    """Frobenius norms over the last two axes, rounded up."""
    squares = np.square(A.real) + np.square(A.imag)
    return np.sqrt(squares.sum(axis=(-1, -2))) * ROUND_UP


def terms(A: Matrices) -> int:
    """What the length of a dot product is multiplied by: complex products have four terms."""
    return 4 if np.iscomplexobj(A) else 1


def largest_eigenvalues(A: Matrices) -> Floats:
    """Numbers >= ||A||^2 of matrices (F, m, n), from G = A^* A or A A^*.

    If s I - G = L L^* + D, then G <= s I - D, so ||G|| <= s + ||D||.
    """
    if A.shape[-2] < A.shape[-1]:
        A = adjoint(A)
    k, n = A.shape[-2:]
    G = adjoint(A) @ A
    trace = np.trace(G, axis1=-2, axis2=-1).real * ROUND_UP
    s = np.linalg.eigvalsh(G)[:, -1] * (1 + 2.0**-20)
    defect = _defects(s[:, None, None] * np.eye(n) - G)
    bound = np.where(np.isfinite(defect), s + defect, trace)
    # G itself: the sizes of the terms of its entries sum to at most trace(G) in the norm.
    return np.maximum(bound, 0) + gamma(4 * (k + 3), U) * trace


def smallest_eigenvalues(S: Matrices) -> Floats:
    """Numbers <= the least eigenvalues of positive semidefinite matrices (F, m, m); at least 0."""
    s = 0.99 * np.linalg.eigvalsh(S)[:, 0]
    defect = _defects(S - s[:, None, None] * np.eye(S.shape[-1]))
    return np.where(np.isfinite(defect), np.maximum(s - defect, 0), 0.0)


def _defects(T: Matrices) -> Floats:
    """||T - L L^*||_F with L from a Cholesky factorisation; infinite where there is none."""
    n = T.shape[-1]
    found = np.full(len(T), np.inf)
    for i, matrix in enumerate(T):
        if (L := factor(matrix)) is None:
            continue
        apart = float(norms(matrix - L @ adjoint(L)))
        # The product, and the subtraction of s from the diagonal of T.
        rounding = gamma(4 * (n + 3), U) * (float(norms(L)) ** 2 + float(norms(matrix)))
        found[i] = (apart + rounding) * ROUND_UP
    return found


def factor(matrix: Matrices) -> Matrices | None:
    """Something like a Cholesky factor, None where the library finds none."""
    try:
        L = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    return cast(Matrices, L) if np.isfinite(L).all() else None
