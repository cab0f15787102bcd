"""Reduced precision of the increment: what it may change, and that X stays on the manifold."""

import math

import pydantic
import pytest
import torch

from optim.config import OptimConfig
from optim.manifolds import ORTHOGONAL
from optim.matmul import float32_products, product, rounded, split_product, symmetric_product
from optim.matrix_exp import (
    apply_exponential,
    product_rounding,
    spectral_bound,
    term_error,
    term_limit,
)
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from tests.optim.emulation import Problem, gradient
from tests.optim.test_matrix_exp import adam_like, exact, normal, orthogonal, plane, rotations

REDUCED = ("tf32", "bf16")
BITS = {"full": 24, "tf32": 11, "bf16": 8}
ROUNDOFF = {"full": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}


@pytest.mark.parametrize("precision", REDUCED)
def test_rounded_is_the_nearest_number_of_that_many_bits(precision):
    A = (normal(50, 50) * 10.0 ** normal(50, 50, seed=1)).float()
    mantissa, exponent = torch.frexp(A.double())
    nearest = torch.ldexp(torch.round(mantissa * 2.0 ** BITS[precision]), exponent)
    assert torch.equal(rounded(A, precision).double(), nearest / 2.0 ** BITS[precision])


@pytest.mark.parametrize("precision", REDUCED)
def test_rounded_keeps_skewness_and_float64(precision):
    D = adam_like(40, 0.0123) * normal(40, 40).abs().triu(1).add(1).float()
    D = D - D.T
    assert torch.equal(rounded(D, precision), -rounded(D, precision).T)
    assert rounded(D.double(), precision) is not None
    assert torch.equal(rounded(D.double(), precision), D.double())
    assert not rounded(torch.tensor([math.inf, math.nan]), precision).isfinite().any()


@pytest.mark.parametrize("precision", REDUCED)
def test_errors_of_products_are_those_derived(precision):
    n, u = 60, ROUNDOFF[precision]
    P, Q = normal(n, n).float(), normal(n, n, seed=1).float()
    scale = P.double().abs() @ Q.double().abs()
    summation = product_rounding(P, precision) * scale

    def error(result):
        return (result.double() - P.double() @ Q.double()).abs()

    once, split = error(product(P, Q, precision)), error(split_product(P, Q, precision))
    assert (once <= (2 * u + u * u) * scale + summation).all()
    assert (split <= 4 * u * u * scale + 3 * summation).all()
    assert split.max() < u * once.max() + 1e-5


@pytest.mark.parametrize("precision", REDUCED)
def test_the_square_of_a_rounded_increment_is_that_of_float32(precision):
    D = rounded(adam_like(520, 1e-3) * 1.2345, precision)
    square = symmetric_product(D, D)
    assert torch.equal(square, symmetric_product(rounded(D, precision), rounded(D, precision)))
    error = (square.double() - D.double() @ D.double()).norm()
    assert error <= product_rounding(D) * D.double().square().sum()


def watched(function, seen):
    """The function, noting the process's choice at each call."""

    def call(*args, **options):
        seen.add(torch.get_float32_matmul_precision())
        return function(*args, **options)

    return call


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    ("precision", "inside"), [("full", "highest"), ("tf32", "high"), ("bf16", "highest")]
)
def test_the_process_s_choice_for_float32_changes_nothing(chosen, precision, inside, monkeypatch):
    X, D = orthogonal(30, torch.float32), adam_like(30, 0.05)
    expected = apply_exponential(X, D, precision=precision)
    tangent = ORTHOGONAL.tangent(X, normal(30, 30).float(), precision)
    seen, before = set(), torch.get_float32_matmul_precision()
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name), seen))
    try:
        torch.set_float32_matmul_precision(chosen)
        assert torch.equal(apply_exponential(X, D, precision=precision), expected)
        found = ORTHOGONAL.tangent(X, normal(30, 30).float(), precision)
        with pytest.raises(RuntimeError, match="deliberate"), float32_products(precision):
            raise RuntimeError("deliberate")
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {inside}
    assert torch.equal(found, tangent)


@pytest.mark.parametrize("precision", REDUCED)
def test_tangents_are_skew_and_near_the_full_ones(precision):
    X, G = orthogonal(60, torch.float32), normal(60, 60).float()
    A, full = ORTHOGONAL.tangent(X, G, precision), ORTHOGONAL.tangent(X, G)
    assert torch.equal(A, -A.T)
    assert 0 < (A - full).norm() < ROUNDOFF[precision] * full.norm()


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("angle", [1e-3, 0.03, 0.2, 0.9, 1.9, 7.0])
def test_the_result_is_the_exponential_of_the_rounded_increment(precision, angle):
    D = rotations([angle, angle / 2, angle / 7], torch.float32)
    X, u = orthogonal(6, torch.float32), ROUNDOFF[precision]
    expected = X.double() @ exact(rounded(D, precision))
    error = (apply_exponential(X, D, precision=precision).double() - expected).norm()
    substeps = max(1, math.ceil(angle * 1.5 / 2))
    limit = term_limit(6, 3 * min(angle, 2) ** 2, u)
    assert error <= substeps * (8 * u * u * min(angle, 2) * 6 + limit + 3e-6)
    if angle <= 0.03:  # T is too small to be seen
        assert error <= 8 * u * u * angle * 6 + 1e-6


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.1, 0.5])
def test_theta_stays_an_upper_bound(precision, scale):
    D = rounded(rotations([scale * k for k in (1, 1.9, 2, 0.3)], torch.float32), precision)
    norm_2 = torch.linalg.matrix_norm(D.double(), ord=2).item()
    square = symmetric_product(D, D)
    m1, m2 = D.double().square().sum().item(), square.double().square().sum().item()
    rounding, u = product_rounding(D, precision), ROUNDOFF[precision]
    first = spectral_bound(m1, m2, rounding)
    T = product(square, D + square / 4, precision) / 6
    D64 = D.double()
    error = term_error(m1, m2, first, rounding, u)
    assert (T.double() - D64 @ D64 @ (D64 + D64 @ D64 / 4) / 6).norm() <= error
    second = spectral_bound(m1, m2, rounding, third=(T.double().norm().item(), error))
    assert norm_2 * (1 - 1e-14) <= second <= first < 2 * norm_2


def work_of(monkeypatch, X, D, precision):
    """Products of n x n matrices, and the result."""
    work = []
    mm = torch.mm

    def counted(P, Q, **options):
        work.append(P.shape[0] * Q.shape[1] / X.shape[0] ** 2)
        return mm(P, Q, **options)

    monkeypatch.setattr(torch, "mm", counted)
    result = apply_exponential(X, D, precision=precision)
    return sum(work), result


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize(
    ("n", "lr"), [(200, 1e-3), pytest.param(1024, 3e-4, marks=pytest.mark.slow), (1024, 9e-4)]
)
def test_an_adam_step_needs_one_product_more_for_each_split(precision, n, lr, monkeypatch):
    """D^2, T, and three for X M."""
    work, _ = work_of(monkeypatch, orthogonal(n, torch.float32), adam_like(n, lr), precision)
    assert work == 5 - (0.375 if n >= 512 else 0.0)


def test_terms_whose_rounding_would_show_are_split(monkeypatch):
    """An angle of 1 in one plane, order 10: three products each for T and three more, and X M."""
    work, X = work_of(monkeypatch, torch.eye(3), plane(1.0).float(), "bf16")
    assert work == 1 + 4 * 3 + 3
    assert ORTHOGONAL.residual(X) < 20 * ROUNDOFF["bf16"] ** 2


DRIFTS = [
    *((precision, 64, lr) for precision in BITS for lr in (1e-3, 1e-2)),
    *(pytest.param(p, 256, 1e-3, marks=pytest.mark.slow) for p in REDUCED),
    # Here the truncation shows in full precision, T in reduced.
    pytest.param("full", 256, 1e-3, marks=pytest.mark.slow),
    *(pytest.param(p, 256, 1e-2, marks=pytest.mark.slow) for p in REDUCED),
    *(pytest.param(p, 512, 4e-3, marks=pytest.mark.slow) for p in BITS),
    *(pytest.param(p, 512, 1e-2, marks=pytest.mark.slow) for p in REDUCED),
]


@pytest.mark.parametrize(("precision", "n", "lr"), DRIFTS)
def test_drift_of_200_steps_is_as_derived(precision, n, lr):
    """Random directions: sqrt(steps) times the error of a step."""
    steps, X = 200, ORTHOGONAL.random((n, n), torch.Generator().manual_seed(1)).float()
    for seed in range(steps):
        X = apply_exponential(X, adam_like(n, lr, seed), precision=precision)
    of_a_step = 0.7 * ROUNDOFF[precision] ** 2 * lr * n + 2.0**-24 * math.sqrt(n)
    limit = math.sqrt(steps) * of_a_step
    assert limit / 4 < ORTHOGONAL.residual(X) < 4 * limit


def test_the_paper_s_rule_is_refused_in_reduced_precision():
    with pytest.raises(pydantic.ValidationError, match="'frobenius' is computed in full precision"):
        OptimConfig(series="frobenius", increment="bf16")
    with pytest.raises(pydantic.ValidationError, match="increment"):
        OptimConfig(increment="fp8")


@pytest.mark.parametrize("precision", REDUCED)
def test_the_reference_uses_it_too(precision):
    def last(increment):
        problem = Problem((24,), dtype=torch.float32, steps=4, lr=0.01, increment=increment)
        named = problem.parameters()
        groups = parameter_groups(named.items(), problem.config)
        optimizer = ReferenceManifoldAdam(groups, problem.config)
        for step in range(problem.steps):
            for name, p in named.items():
                p.grad = gradient(name, step, tuple(p.shape), problem.dtype)
            optimizer.step()
        return named["matrix0"].detach()

    difference = (last(precision) - last("full")).norm()
    # Four increments of norm 0.24, each to within u.
    assert 0 < difference < 4 * 0.24 * ROUNDOFF[precision]
