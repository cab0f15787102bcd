"""Bounds of one matrix against exact singular values."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.certification.matrix_bounds import matrix_bound, tensor_digest
from model.certification.rounding import U64, gamma
from model.errors import ModelError
from optim.manifolds import ORTHOGONAL

KINDS = ("plain", "orthogonal", "near", "rank_one", "zero", "ill", "equal", "sparse", "integers")


def draw(kind, rows, columns, seed):
    """A small matrix of some nasty kind."""
    random = np.random.default_rng(seed)
    a = random.standard_normal((rows, columns))
    if kind in ("orthogonal", "near"):
        n = min(rows, columns)
        a = np.linalg.qr(random.standard_normal((n, n)))[0]
        a = (
            a
            if kind == "orthogonal"
            else a + 10.0 ** random.uniform(-16, -1) * random.random((n, n))
        )
    elif kind == "rank_one":
        a = np.outer(a[:, 0], random.standard_normal(columns))
    elif kind == "zero":
        a = np.zeros((rows, columns))
    elif kind == "ill":
        a = a * np.logspace(0, -random.uniform(0, 300), columns)
    elif kind == "equal":
        a = np.full((rows, columns), a[0, 0])
    elif kind == "sparse":
        a = a * (random.random((rows, columns)) < 0.3)
    elif kind == "integers":
        a = np.rint(3 * a)
    return a


def exact_norm(a):
    """Spectral norm in 60 digits."""
    with mpmath.workdps(120):
        exponent = math.frexp(np.abs(a).max())[1] if a.any() else 0
        scaled = mpmath.matrix(np.ldexp(a, -exponent).tolist())
        # mpmath's singular values may not converge where two are equal.
        squares = mpmath.eigsy(scaled.T * scaled, eigvals_only=True)
        return mpmath.ldexp(mpmath.sqrt(max(squares)), exponent)


@settings(max_examples=400)
@example(kind="orthogonal", rows=2, columns=3, seed=8185, exponent=0)  # two equal singular values
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    exponent=st.sampled_from([0, 0, 0, 1, -1, 40, -40, 120, -120, 600, -600, 990]),
)
def test_bounds_enclose_the_exact_norm(kind, rows, columns, seed, exponent):
    a = np.ldexp(draw(kind, rows, columns, seed), exponent)
    bound = matrix_bound(torch.from_numpy(a.copy()), "a")
    true = exact_norm(a)
    assert mpmath.mpf(bound.lower) <= true <= mpmath.mpf(bound.upper)
    assert exact_norm(np.abs(a)) <= mpmath.mpf(bound.absolute)
    assert true <= mpmath.mpf(bound.frobenius)
    # Gram iteration loses at most the 64th root of the order, 1 + ||S|| where S is large.
    assert mpmath.mpf(bound.upper) <= true * mpmath.mpf(1.5) + mpmath.ldexp(1, -1040)


@pytest.mark.parametrize("count", [320, pytest.param(3000, marks=pytest.mark.slow)])
def test_bounds_enclose_the_norm_of_many_matrices(count):
    for seed in range(count):
        kind = KINDS[seed % len(KINDS)]
        a = draw(kind, 1 + seed % 8, 1 + seed // 8 % 8, seed)
        bound = matrix_bound(torch.from_numpy(a), "a")
        true = float(np.linalg.svd(a, compute_uv=False)[0])
        error = 50 * U64 * true  # of the SVD itself
        assert bound.lower - error <= true <= bound.upper + error
        assert true <= bound.absolute + error


@pytest.mark.parametrize("n", [1, 3, 64, 256])
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-6, 1e-2])
def test_the_bound_of_a_nearly_orthogonal_matrix_is_close(generator, n, noise):
    x = ORTHOGONAL.random((n, n), generator)
    x = x + noise * torch.randn(n, n, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(x)
    true, deviation = float(values[0]), float((values**2 - 1).abs().max())
    bound = matrix_bound(x, "x")
    assert true - 1e-14 <= bound.upper
    # S^8: the loss is the 8th root of the ratio of Frobenius and spectral norm, at most n^(1/16).
    assert bound.upper - 1 <= n ** (1 / 16) * deviation / 2 + 3 * n**1.5 * U64 + 1e-11
    assert bound.lower <= true * (1 + 1e-14)


def test_the_bound_of_a_known_matrix():
    """X = diag(1 + 2^-20, 1, ...): the norm is exact and nearly attained."""
    x = torch.eye(8, dtype=torch.float64)
    x[0, 0] += 2.0**-20
    assert 1 + 2.0**-20 <= matrix_bound(x, "x").upper <= 1 + 2.0**-20 + 1e-11


def test_a_product_with_the_worst_allowed_rounding_cannot_lower_the_bound(monkeypatch):
    """Every product is disturbed, unsymmetrically, by as much as gamma_n permits."""
    exact = torch.Tensor.__matmul__
    random = torch.Generator().manual_seed(0)

    def disturbed(a, b):
        product = exact(a, b)
        if a.ndim < 2 or b.ndim < 2:
            return product
        most = (gamma(a.shape[-1], U64) - 2e-16) * exact(a.abs(), b.abs())
        signs = torch.randint(0, 2, product.shape, generator=random) * 2 - 1
        return product + signs * most.clamp(min=0)

    for n in (2, 5, 40):
        for noise in (0.0, 1e-7, 1e-2):
            x = ORTHOGONAL.random((n, n), random)
            x = x + noise * torch.randn(n, n, generator=random, dtype=torch.float64)
            true = float(torch.linalg.svdvals(x)[0])
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "__matmul__", disturbed)
                bound = matrix_bound(x, "x")
            assert true <= bound.upper + 1e-15
            assert bound.upper > 1


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"x has shape \(3,\)"),
        (torch.zeros(0, 3), r"x has shape \(0, 3\)"),
        (torch.tensor([[1.0, torch.nan]]), "x holds values that are not finite"),
        (torch.tensor([[1.0], [torch.inf]]), "x holds values that are not finite"),
    ],
)
def test_refuses(matrix, message):
    with pytest.raises(ModelError, match=message):
        matrix_bound(matrix, "x")


def test_digest_depends_on_every_bit_and_on_nothing_else(generator):
    x = torch.randn(4, 6, generator=generator)
    assert tensor_digest(x.T.contiguous().T) == tensor_digest(x)
    y = x.clone()
    y[3, 5] = torch.nextafter(y[3, 5], torch.tensor(9.0))
    assert tensor_digest(y) != tensor_digest(x)
