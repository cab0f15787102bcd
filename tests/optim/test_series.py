import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.series import apply_exponential, order_of, taylor_terms


def skew(n, norm_F, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = A - A.T
    return (A * (norm_F / torch.linalg.matrix_norm(A))).to(dtype)


def plane(theta):
    """A rotation generator in one plane, the worst case for a given Frobenius norm."""
    D = torch.zeros(3, 3, dtype=torch.float64)
    D[0, 1], D[1, 0] = -theta, theta
    return D


@pytest.mark.parametrize(
    ("norm", "order"),
    [(0.0, 2), (0.0499, 2), (0.05, 3), (0.249, 3), (0.25, 4), (0.999, 4), (1.0, None), (1e6, None)],
)
def test_order_follows_the_frobenius_rule(norm, order):
    assert order_of(norm) == order


@pytest.mark.parametrize("norm", [0.03, 0.06, 0.2, 0.3, 0.9])
def test_truncated_branches_are_the_taylor_polynomial(norm):
    D = skew(9, norm)
    X = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    polynomial, power = torch.eye(9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    for i in range(1, order_of(norm) + 1):
        power = power @ D / i
        polynomial = polynomial + power
    torch.testing.assert_close(apply_exponential(X, D), X @ polynomial, rtol=0, atol=1e-15)


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
    result = apply_exponential(torch.eye(3, dtype=torch.float64), plane(theta))
    moved = torch.linalg.vector_norm(result[:, 0]).item()
    assert moved == pytest.approx(largest_singular_value(theta), abs=1e-15)
    assert abs(moved - 1) < 1e-3


@pytest.mark.parametrize("n", [2, 5, 64, 130])
@pytest.mark.parametrize("norm", [1.01, 1.7, 4.1, 20.0, 150.0])
def test_exact_branch_is_the_exponential(n, norm):
    D = skew(n, norm)
    X = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    result = apply_exponential(X, D)
    limit = 2e-14 * norm
    assert (result - X @ torch.linalg.matrix_exp(D)).abs().max() < limit
    assert torch.linalg.matrix_norm(result.T @ result - torch.eye(n)) < limit * n


@pytest.mark.parametrize("norm", [1.01, 4.1, 20.0])
def test_exact_branch_in_float32_is_at_round_off(norm):
    D = skew(64, norm, dtype=torch.float32)
    X = torch.eye(64)
    error = apply_exponential(X, D).double() - torch.linalg.matrix_exp(D.double())
    assert error.abs().max() < 5e-7


def test_exact_branch_in_one_plane_of_any_angle():
    for theta in (0.8, 2.0, 3.1, 10.0, 100.0):
        result = apply_exponential(torch.eye(3, dtype=torch.float64), plane(theta))
        assert result[1, 0].item() == pytest.approx(math.sin(theta), abs=1e-13)


@given(st.floats(0.0, 2.0), st.sampled_from([torch.float32, torch.float64]))
def test_taylor_terms_leave_less_than_round_off(norm, dtype):
    terms = taylor_terms(norm, dtype)

    def remainder(k):
        return math.fsum(norm**i / math.factorial(i) for i in range(k + 1, k + 40))

    unit = torch.finfo(dtype).eps / 2
    assert remainder(terms) <= unit
    assert terms == 1 or remainder(terms - 1) > unit / 4


def test_zero_increment_changes_nothing():
    X = torch.randn(5, 5)
    assert torch.equal(apply_exponential(X, torch.zeros(5, 5)), X)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_increment_stays_visible(bad):
    D = torch.zeros(3, 3)
    D[0, 1], D[1, 0] = bad, -bad
    assert not apply_exponential(torch.eye(3), D).isfinite().all()
