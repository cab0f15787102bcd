"""Both rules against float64 and mpmath; the bound against exact singular values."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.manifolds import ORTHOGONAL
from optim.matmul import symmetric_product
from optim.matrix_exp import (
    TOLERANCE,
    apply_exponential,
    frobenius_order,
    order_of,
    product_rounding,
    spectral_bound,
    taylor_terms,
    term_error,
)
from tests.repetitions import mostly_slow

DTYPES = (torch.float32, torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew(n, norm_F, seed=0, dtype=torch.float64):
    A = normal(n, n, seed=seed)
    A = A - A.T
    return (A * (norm_F / torch.linalg.matrix_norm(A))).to(dtype)


def adam_like(n, lr, seed=0, dtype=torch.float32):
    """The first increment of Adam: every entry above the diagonal is lr or -lr."""
    upper = normal(n, n, seed=seed).sign().triu(1) * lr
    return (upper - upper.T).to(dtype)


def rotations(angles, dtype=torch.float64):
    """Skew with the eigenvalues +-i angles, in a random basis, exactly skew after rounding."""
    n = 2 * len(angles)
    D = torch.zeros(n, n, dtype=torch.float64)
    for i, angle in enumerate(angles):
        D[2 * i, 2 * i + 1], D[2 * i + 1, 2 * i] = -angle, angle
    Q = torch.linalg.qr(normal(n, n, seed=n))[0]
    D = (Q @ D @ Q.T).triu(1)
    return (D - D.T).to(dtype)


def orthogonal(n, dtype=torch.float64):
    return torch.linalg.qr(normal(n, n, seed=7))[0].to(dtype)


def plane(theta):
    """A rotation generator in one plane, the worst case for a given Frobenius norm."""
    D = torch.zeros(3, 3, dtype=torch.float64)
    D[0, 1], D[1, 0] = -theta, theta
    return D


def exact(D):
    """exp(D) in 50 digits, rounded to float64."""
    with mpmath.workdps(50):
        rows = mpmath.expm(mpmath.matrix(D.double().tolist()), method="taylor").tolist()
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def bound_of(D):
    """theta as the series computes it, with all three moments."""
    square = D @ D
    third = (square @ (D + square / 4) / 6).double().norm().item()
    m1, m2 = D.double().square().sum().item(), square.double().square().sum().item()
    rounding = product_rounding(D)
    error = term_error(m1, m2, spectral_bound(m1, m2, rounding), rounding, 0.0)
    return spectral_bound(m1, m2, rounding, third=(third, error))


# -- the spectral rule ---------------------------------------------------------------------------


@given(st.floats(0.0, 2.0), st.sampled_from(sorted(TOLERANCE.values())))
def test_order_is_the_smallest_that_the_bound_admits(theta, tolerance):
    order = order_of(theta, tolerance)

    def remainder(k):
        return theta ** (k + 1) / math.factorial(k + 1)

    assert order % 2 == 0
    assert remainder(order) <= tolerance * (1 + 1e-12)
    assert order == 2 or remainder(order - 2) > tolerance * (1 - 1e-12)


@given(st.floats(1e-6, 2.0), st.sampled_from([2, 4, 6, 8]))
def test_truncation_error_on_the_imaginary_axis(theta, order):
    """|exp(i t) - p_k(i t)| <= theta^(k+1) / (k+1)!, in many digits."""
    with mpmath.workdps(100):
        t = mpmath.mpc(0, theta)
        error = abs(mpmath.exp(t) - sum(t**i / mpmath.factorial(i) for i in range(order + 1)))
        assert error <= mpmath.mpf(theta) ** (order + 1) / mpmath.factorial(order + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    st.lists(st.floats(1e-6, 3.0), min_size=1, max_size=12),
    st.floats(1e-5, 1.0),
)
def test_theta_is_an_upper_bound(dtype, angles, scale):
    D = rotations([scale * angle for angle in angles], dtype)
    norm_2 = torch.linalg.matrix_norm(D.double(), ord=2).item()
    assert bound_of(D) >= norm_2 * (1 - 1e-14)


@pytest.mark.parametrize("n", mostly_slow([3, 64, 513, 1024], [3, 64, 513]))
@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_theta_of_an_adam_step_is_near_the_norm(n, lr):
    D = adam_like(n, lr)
    norm_2 = torch.linalg.matrix_norm(D.double(), ord=2).item()
    assert norm_2 <= bound_of(D) < 1.7 * norm_2


@given(st.floats(1e-3, 0.3), st.integers(1, 40))
def test_theta_of_equal_angles_is_tight(angle, pairs):
    """All eigenvalues +-i t: c = t^2 and R = 0, so the bound is t itself."""
    m1, m2 = 2 * pairs * angle**2, 2 * pairs * angle**4
    third = math.sqrt(2 * pairs * (angle**6 / 36 + angle**8 / 576))
    theta = spectral_bound(m1, m2, 0.0, third=(third, 0.0))
    assert angle * (1 - 1e-7) <= theta <= angle * (1 + pairs ** (1 / 6) * angle ** (2 / 3))


def test_rounding_covers_the_worst_product_seen():
    for n in (16, 300):
        for seed in range(5):
            P, Q = normal(n, n, seed=seed).float(), normal(n, n, seed=seed + 9).float()
            error = ((P @ Q).double() - P.double() @ Q.double()).norm()
            assert error <= product_rounding(P) * P.double().norm() * Q.double().norm()
    assert product_rounding(P) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", mostly_slow([2, 5, 12], [2, 5]))
@pytest.mark.parametrize("norm", [1e-6, 1e-3, 0.03, 0.2, 0.6, 1.01, 4.1, 20.0])
def test_spectral_rule_is_the_exponential(n, norm, dtype):
    D = skew(n, norm, dtype=dtype)
    X = orthogonal(n, dtype)
    error = torch.linalg.matrix_norm(
        apply_exponential(X, D).double() - X.double() @ exact(D), ord=2
    )
    rounding = 10 * n * torch.finfo(dtype).eps * (1 + norm)
    assert error <= TOLERANCE[dtype] + rounding


@pytest.mark.parametrize("n", mostly_slow([512, 600], [512]))
@pytest.mark.parametrize("lr", [1e-4, 1e-3, 4e-3])
def test_an_adam_step_of_a_large_matrix(n, lr):
    D, X = adam_like(n, lr), orthogonal(n, torch.float32)
    expected = X.double() @ torch.linalg.matrix_exp(D.double())
    error = torch.linalg.matrix_norm(apply_exponential(X, D).double() - expected, ord=2)
    assert error <= TOLERANCE[torch.float32] + 2e-6  # round-off of an n x n product
    assert (apply_exponential(X, D).double() - expected).abs().max() < 3e-7


@pytest.mark.parametrize(
    ("n", "lr", "products"),
    [
        pytest.param(1024, 1e-5, 2, marks=pytest.mark.slow),
        pytest.param(1024, 3e-4, 3, marks=pytest.mark.slow),
        (1024, 1e-3, 3),
        (1024, 2e-3, 4),
        (200, 1e-3, 3),
    ],
)
def test_products_of_an_adam_step(n, lr, products, monkeypatch):
    """Order 4 where the paper's rule (||D||_F = 1.02) takes the exact exponential."""
    work = 0.0

    def counted(function):
        def call(*arguments, **options):
            nonlocal work
            left, right = arguments[-2:]
            work += left.shape[0] * right.shape[1] / n**2
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(torch, "mm", counted(torch.mm))
    monkeypatch.setattr(torch, "addmm", counted(torch.addmm))
    apply_exponential(orthogonal(n, torch.float32), adam_like(n, lr))
    half_square = 0.375 if n >= 512 else 0.0
    assert work == products - half_square


@pytest.mark.parametrize("n", [2, 511, 512, 515, 700])
def test_symmetric_products_are_products(n):
    D, X = skew(n, 1.0), orthogonal(n)
    torch.testing.assert_close(symmetric_product(D, D), D @ D, rtol=0, atol=1e-15)
    torch.testing.assert_close(symmetric_product(X.mT, X), X.mT @ X, rtol=0, atol=1e-14)


# -- the rule of the paper -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "order"),
    [(0.0, 2), (0.0499, 2), (0.05, 3), (0.249, 3), (0.25, 4), (0.999, 4), (1.0, None), (1e6, None)],
)
def test_order_follows_the_frobenius_rule(norm, order):
    assert frobenius_order(norm) == order


@pytest.mark.parametrize("norm", [0.03, 0.06, 0.2, 0.3, 0.9])
def test_truncated_branches_are_the_taylor_polynomial(norm):
    D, X = skew(9, norm), orthogonal(9)
    polynomial, power = torch.eye(9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    for i in range(1, frobenius_order(norm) + 1):
        power = power @ D / i
        polynomial = polynomial + power
    result = apply_exponential(X, D, "frobenius")
    torch.testing.assert_close(result, X @ polynomial, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("norm_F", "largest_singular_value"),
    [
        (0.049, lambda t: math.sqrt(1 + t**4 / 4)),
        (0.249, lambda t: math.sqrt(1 - t**4 / 12 + t**6 / 36)),
        (0.999, lambda t: math.sqrt(1 - t**6 / 72 + t**8 / 576)),
    ],
)
def test_truncation_changes_lengths_as_derived(norm_F, largest_singular_value):
    theta = norm_F / math.sqrt(2)
    result = apply_exponential(torch.eye(3, dtype=torch.float64), plane(theta), "frobenius")
    moved = torch.linalg.vector_norm(result[:, 0]).item()
    assert moved == pytest.approx(largest_singular_value(theta), abs=1e-15)
    assert abs(moved - 1) < 1e-3


@given(st.floats(0.0, 2.0), st.sampled_from(DTYPES))
def test_taylor_terms_leave_less_than_round_off(norm, dtype):
    terms = taylor_terms(norm, dtype)

    def remainder(k):
        return math.fsum(norm**i / math.factorial(i) for i in range(k + 1, k + 40))

    unit = torch.finfo(dtype).eps / 2
    assert remainder(terms) <= unit
    assert terms == 1 or remainder(terms - 1) > unit / 4


# -- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["spectral", "frobenius"])
@pytest.mark.parametrize("n", [2, 5, 64, 130])
@pytest.mark.parametrize("norm", [1.01, 1.7, 4.1, 20.0, 150.0])
def test_large_increments_are_the_exponential(n, norm, rule):
    D, X = skew(n, norm), orthogonal(n)
    result = apply_exponential(X, D, rule)
    limit = 2e-14 * norm
    assert (result - X @ torch.linalg.matrix_exp(D)).abs().max() < limit
    assert torch.linalg.matrix_norm(result.T @ result - torch.eye(n)) < limit * n


@pytest.mark.parametrize("rule", ["spectral", "frobenius"])
@pytest.mark.parametrize("norm", [1.01, 4.1, 20.0])
def test_large_increments_in_float32_are_at_round_off(norm, rule):
    D = skew(64, norm, dtype=torch.float32)
    error = apply_exponential(torch.eye(64), D, rule).double() - torch.linalg.matrix_exp(D.double())
    assert error.abs().max() < 5e-7


@pytest.mark.parametrize("rule", ["spectral", "frobenius"])
def test_one_plane_of_any_angle(rule):
    for theta in (0.8, 2.0, 3.1, 10.0, 100.0):
        result = apply_exponential(torch.eye(3, dtype=torch.float64), plane(theta), rule)
        assert result[1, 0].item() == pytest.approx(math.sin(theta), abs=1e-13)


@pytest.mark.parametrize("rule", ["spectral", "frobenius"])
def test_zero_increment_changes_nothing(rule):
    X = torch.randn(5, 5)
    assert torch.equal(apply_exponential(X, torch.zeros(5, 5), rule), X)


@pytest.mark.parametrize("rule", ["spectral", "frobenius"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 1e4])
def test_a_broken_increment_stays_visible(bad, rule):
    D = torch.zeros(3, 3)
    D[0, 1], D[1, 0] = bad, -bad
    assert not apply_exponential(torch.eye(3), D, rule).isfinite().all()


def test_increments_too_small_for_their_squares():
    D = skew(8, 1e-25, dtype=torch.float32)
    assert torch.equal(apply_exponential(torch.eye(8), D), torch.eye(8) + D)


def test_the_spectral_rule_leaves_the_manifold_less_than_the_paper_s():
    """0.9 in one plane: order 4 by the paper's rule."""
    X = torch.eye(3, dtype=torch.float64)
    spectral, frobenius = (
        ORTHOGONAL.residual(apply_exponential(X, plane(0.6), rule))
        for rule in ("spectral", "frobenius")
    )
    assert frobenius > 1e-4
    assert spectral < 1e-14
