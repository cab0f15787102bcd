"""Eigenvalues of Hermitian matrices, proved by residuals.

Nothing is assumed of a library's factorisation or eigenvalues: L L^* is positive semidefinite for
any L, and what counts is how far it is from the matrix, computed with the rounding of that product.
"""

from typing import cast

import numpy as np
import numpy.typing as npt

from model.verifier.mathematics.rounding import ROUND_UP, Floats, U, gamma

Complexes = npt.NDArray[np.complex128]
Matrices = Floats | Complexes


def adjoint(A: Matrices) -> Matrices:
    """Conjugate transposes of the last two axes."""
    return A.conj().swapaxes(-1, -2)


def multiply(A: Matrices, B: Matrices) -> Matrices:
    """A B from products of real matrices: a library may take three for four of them."""
    if not (np.iscomplexobj(A) or np.iscomplexobj(B)):
        return A @ B
    real = A.real @ B.real - A.imag @ B.imag
    return cast(Matrices, real + 1j * (A.real @ B.imag + A.imag @ B.real))


def norms(A: Matrices) -> Floats:
    """Frobenius norms over the last two axes, rounded up."""
    squares = np.square(A.real) + np.square(A.imag)
    return np.sqrt(squares.sum(axis=(-1, -2))) * ROUND_UP


def terms(A: Matrices) -> int:
    """What the length of a dot product is multiplied by: complex products have four terms."""
    return 4 if np.iscomplexobj(A) else 1


def largest_eigenvalues(A: Matrices) -> Floats:
    """Numbers >= ||A||^2 of matrices (F, m, n), from G = A^* A or A A^*."""
    if A.shape[-2] < A.shape[-1]:
        A = adjoint(A)
    k, n = A.shape[-2:]
    G = multiply(adjoint(A), A)
    trace = np.trace(G, axis1=-2, axis2=-1).real
    s = np.linalg.eigvalsh(G)[:, -1] * (1 + 2.0**-20)
    proved = _are_semidefinite(s[:, None, None] * np.eye(n) - G, n * s)
    s = np.where(proved, s, trace)
    # G itself: the sizes of the terms of its entries sum to at most trace(G) in the norm.
    return s + 2 * gamma(4 * (n + 3), U) * n * s + gamma(4 * (k + 3), U) * trace


def smallest_eigenvalues(S: Matrices) -> Floats:
    """Numbers <= the least eigenvalues of positive semidefinite matrices (F, m, m); at least 0."""
    m = S.shape[-1]
    trace = np.trace(S, axis1=-2, axis2=-1).real
    s = 0.99 * np.linalg.eigvalsh(S)[:, 0]
    proved = _are_semidefinite(S - s[:, None, None] * np.eye(m), trace)
    return np.where(proved, np.maximum(s - 2 * gamma(4 * (m + 3), U) * trace, 0), 0.0)


def _are_semidefinite(T: Matrices, sizes: Floats) -> npt.NDArray[np.bool_]:
    """Whether T + E is positive semidefinite for an E with ||E|| <= 2 gamma(4 (n + 3), u) size.

    What the residual leaves of it covers the subtraction on the diagonal of T.
    """
    n = T.shape[-1]
    found = np.zeros(len(T), dtype=bool)
    for i, (matrix, size) in enumerate(zip(T, sizes, strict=True)):
        if (L := factor(matrix)) is not None:
            rounding = gamma(4 * (n + 1), U) * float(norms(L)) ** 2
            residual = float(norms(multiply(L, adjoint(L)) - matrix)) + rounding
            found[i] = residual < 2 * gamma(4 * (n + 2), U) * size
    return found


def factor(matrix: Matrices) -> Matrices | None:
    """Something like a Cholesky factor: lower triangular, with a positive diagonal, or None."""
    try:
        L = np.tril(np.linalg.cholesky(matrix))
    except np.linalg.LinAlgError:
        return None
    usable = np.isfinite(L).all() and (L.diagonal().real > 0).all()
    return cast(Matrices, L) if usable and not L.diagonal().imag.any() else None
