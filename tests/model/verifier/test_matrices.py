"""The verifier's bounds against exact arithmetic and singular values."""

import math
from fractions import Fraction

import numpy as np
import pytest

from model.verifier.mathematics.matrix_bounds import bounds_of_matrix, lower_bound, upper_bound
from model.verifier.mathematics.rounding import PROGRAMS, kappa
from tests.repetitions import mostly_slow


def orthogonal(rng, order):
    return np.linalg.qr(rng.normal(size=(order, order)))[0]


def hadamard(order):
    H = np.ones((1, 1))
    while len(H) < order:
        H = np.block([[H, H], [H, -H]])
    return H / math.sqrt(order)


def matrices(seed):
    """float32 matrices: (kind, matrix)."""
    rng = np.random.default_rng(seed)
    m, n = rng.integers(1, 6, 2)
    order = int(rng.integers(1, 6))
    spread = 10.0 ** rng.uniform(-12, 0, order)
    Q, P = orthogonal(rng, order), orthogonal(rng, order)
    found = {
        "gaussian": rng.normal(size=(m, n)),
        "orthogonal": Q,
        "ill-conditioned": Q @ np.diag(spread) @ P,
        "rank one": np.outer(rng.normal(size=m), rng.normal(size=n)),
        "tiny": rng.normal(size=(m, n)) * 2.0**-140,
        "huge": rng.normal(size=(m, n)) * 2.0**124,
        "mixed": rng.normal(size=(m, n)) * 2.0 ** rng.integers(-120, 120, (m, n)),
        "hadamard": hadamard(4) * rng.normal(),
        "one entry": np.eye(m, n) * rng.normal(),
        "wide": rng.normal(size=(1, 40)),
        "scaled orthogonal": Q * (1 + rng.normal() * 1e-3),
        "zero": np.zeros((m, n)),
    }
    return {kind: matrix.astype(np.float32) for kind, matrix in found.items()}


def is_bound(matrix, bound) -> bool:
    """Whether bound >= ||A||, in exact rational arithmetic: bound^2 I - A A^T is semidefinite."""
    A = [[Fraction(float(x)) for x in row] for row in matrix]
    size, square = len(A), Fraction(bound) ** 2
    S = [
        [square * (i == j) - sum(x * y for x, y in zip(A[i], A[j], strict=True))
         for j in range(size)]
        for i in range(size)
    ]  # fmt: skip
    for i in range(size):  # Gaussian elimination: pivots of a semidefinite matrix are not negative
        if S[i][i] < 0 or (S[i][i] == 0 and any(S[i][j] for j in range(i, size))):
            return False
        for k in range(i + 1, size):
            ratio = S[k][i] / S[i][i] if S[i][i] else 0
            S[k] = [a - ratio * b for a, b in zip(S[k], S[i], strict=True)]
    return True


@pytest.mark.parametrize("seed", mostly_slow(range(150), range(30)))
def test_upper_and_lower_enclose_the_exact_norm(seed):
    for kind, matrix in matrices(seed).items():
        A = matrix.astype(np.float64)
        upper, lower = upper_bound(A), lower_bound(A)
        assert is_bound(matrix, upper), kind
        assert lower == 0 or not is_bound(matrix, lower * (1 - 1e-9)), kind
        assert lower <= upper
        assert upper <= lower * 1.3 or kind in ("ill-conditioned", "mixed", "gaussian")


@pytest.mark.parametrize("order", [1, 2, 16, 64, 129])
@pytest.mark.parametrize("seed", range(4))
def test_upper_is_tight_for_orthogonal_matrices(order, seed):
    rng = np.random.default_rng(seed)
    matrix = orthogonal(rng, order).astype(np.float32)
    exact = np.linalg.norm(matrix.astype(np.float64), 2)
    bounds = bounds_of_matrix(matrix)
    assert exact * (1 - 1e-14) <= bounds.upper <= exact * (1 + 2e-7)
    assert bounds.lower <= exact * (1 + 1e-14)


@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (30, 90), (1, 200), (200, 1), (128, 128)])
@pytest.mark.parametrize("scale", [2.0**-140, 1e-20, 1.0, 1e20, 2.0**120])
def test_all_bounds_hold_against_singular_values(shape, scale):
    rng = np.random.default_rng(shape[0] + shape[1])
    for power in (0, 1, 8):
        spectrum = np.linspace(1, 1e-3, min(shape)) ** power
        U = np.linalg.qr(rng.normal(size=(shape[0], len(spectrum))))[0]
        V = np.linalg.qr(rng.normal(size=(shape[1], len(spectrum))))[0]
        matrix = ((U * spectrum) @ V.T * scale).astype(np.float32)
        A = matrix.astype(np.float64)
        exact = np.linalg.norm(A / scale, 2) * scale
        bounds = bounds_of_matrix(matrix)
        assert exact * (1 - 1e-13) <= bounds.upper <= exact * 1.1
        assert 0.5 * exact <= bounds.lower <= exact * (1 + 1e-13)
        assert np.linalg.norm(np.abs(A) / scale, 2) * scale * (1 - 1e-13) <= bounds.absolute
        assert np.linalg.norm(A / scale) * scale * (1 - 1e-13) <= bounds.frobenius


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 7)])
def test_a_zero_matrix_has_zero_bounds(shape):
    assert bounds_of_matrix(np.zeros(shape, np.float32))[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("k", [1, 2, 16, 1000, 4096, 10**6])
def test_the_error_of_a_product_does_not_cancel(name, k):
    program = PROGRAMS[name]
    u = [Fraction(value) for value in program[1:]]
    gamma = k * u[1] / (1 - k * u[1])
    exact = (1 + u[2]) * (1 + gamma) * (1 + u[0]) - 1
    assert abs(Fraction(kappa(k, program)) / exact - 1) < Fraction(1, 10**14)
