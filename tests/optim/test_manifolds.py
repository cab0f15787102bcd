import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optim.config import OptimConfig
from optim.errors import OptimizerError
from optim.manifolds import ORTHOGONAL, Manifold, declare, manifold_of
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam

MANIFOLDS: list[Manifold] = [ORTHOGONAL]


@pytest.fixture(params=MANIFOLDS, ids=lambda manifold: manifold.name)
def manifold(request):
    return request.param


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(manifold, n=24, seed=0):
    return manifold.random((n, n), torch.Generator().manual_seed(seed))


def off(X, spread, seed=1):
    """A point with the polar factor X and singular values within sqrt(1 +- spread)."""
    V = torch.linalg.qr(normal(*X.shape, seed=seed))[0]
    squares = 1 + spread * torch.linspace(-1, 1, len(X), dtype=torch.float64)
    return X @ (V * squares.sqrt()) @ V.T


# -- conformance: every manifold -----------------------------------------------------------------


def test_random_points_lie_on_the_manifold_and_repeat(manifold):
    X = point(manifold)
    assert manifold.residual(X) < 1e-13
    assert X.dtype == torch.float64
    assert X.is_contiguous()
    assert torch.equal(X, point(manifold))
    assert not torch.equal(X, point(manifold, seed=1))


def test_projection_keeps_points_and_is_idempotent(manifold):
    X = point(manifold)
    assert (manifold.project(X) - X).abs().max() < 1e-14
    once = manifold.project(off(X, 0.3))
    assert manifold.residual(once) < 1e-13
    assert (manifold.project(once) - once).abs().max() < 1e-14


def test_tangent_is_the_gradient_along_the_retraction(manifold):
    """First order: d/ds f(retract(X, s A)) = <G, X A> = <tangent(X, G), A> for tangent A."""
    X, G = point(manifold), normal(24, 24, seed=2)
    A = manifold.tangent(X, normal(24, 24, seed=3))
    h = 1e-5
    step = manifold.retract(X, h * A) - manifold.retract(X, -h * A)
    slope = (G * step).sum() / (2 * h)
    torch.testing.assert_close(slope, (G * (X @ A)).sum(), rtol=1e-7, atol=0)
    torch.testing.assert_close(slope, (manifold.tangent(X, G) * A).sum(), rtol=1e-7, atol=0)


def test_tangent_is_a_projection(manifold):
    X, G = point(manifold), normal(24, 24, seed=2)
    A = manifold.tangent(X, G)
    torch.testing.assert_close(manifold.tangent(X, X @ A), A, rtol=0, atol=1e-13)


def test_a_correction_is_nearer_by_the_square(manifold):
    X = off(point(manifold), 1e-3)
    assert manifold.residual(manifold.correct(X)) < manifold.residual(X) ** 2 + 1e-13


def test_retraction_leaves_the_manifold_slowly(manifold):
    """Second order: the residual of a small step falls faster than its square."""
    X = point(manifold)
    A = manifold.tangent(X, normal(24, 24, seed=3))
    A = A / torch.linalg.matrix_norm(A)
    coarse, fine = (manifold.residual(manifold.retract(X, h * A)) for h in (4e-2, 1e-2))
    assert fine < coarse / 16 + 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_after_1000_steps(manifold, dtype):
    weight = declare(nn.Parameter(point(manifold, n=16).to(dtype)), manifold)
    config = OptimConfig(lr=3e-3, polar_every=200)
    optimizer = ReferenceManifoldAdam(parameter_groups([("w", weight)], config), config)
    for number in range(1000):
        weight.grad = normal(16, 16, seed=number).to(dtype)
        optimizer.step()
    assert manifold.residual(weight.detach()) < (2e-6 if dtype == torch.float32 else 1e-13)


# -- the orthogonal group ------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(0, 2**32))
def test_orthogonal_tangent_is_skew_bit_by_bit(n, seed):
    A = ORTHOGONAL.tangent(normal(n, n, seed=seed).float(), normal(n, n, seed=seed + 1).float())
    assert torch.equal(A, -A.T)


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_haar_points_are_rotations(n):
    for seed in range(5):
        assert torch.linalg.det(point(ORTHOGONAL, n, seed)).item() == pytest.approx(1.0)


def test_haar_distribution_has_no_preferred_sign():
    """Without the sign fix the diagonal of Q is biased; for Haar its mean is zero."""
    traces = [point(ORTHOGONAL, 4, seed).trace().item() for seed in range(2000)]
    assert abs(sum(traces) / 2000) < 4 / math.sqrt(2000)


def test_large_rotations_have_a_sign():
    X = point(ORTHOGONAL, 600, 3)
    assert torch.linalg.slogdet(X).sign == 1


@pytest.mark.parametrize("spread", [1e-3, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_polar_factor_equals_the_svd(n, spread):
    X = off(point(ORTHOGONAL, n), spread)
    U, _, Vh = torch.linalg.svd(X)
    assert (ORTHOGONAL.project(X) - U @ Vh).abs().max() < 1e-13
    in_float32 = ORTHOGONAL.project(X.float())
    assert in_float32.dtype == torch.float32
    assert ORTHOGONAL.residual(in_float32) < 2e-7 * n + 1e-6
    in_float64 = ORTHOGONAL.project(X.float(), dtype=torch.float64)
    assert ORTHOGONAL.residual(in_float64) < 1e-14 * n + 1e-14


@pytest.mark.parametrize("factor", [0.05, 1.8, 2.2, 100.0])
def test_polar_factor_of_a_scaled_matrix_keeps_its_sign(factor):
    """Plain Newton-Schulz converges to the wrong sign for singular values between 1.73 and 2.23."""
    X = point(ORTHOGONAL, 12)
    assert (ORTHOGONAL.project(factor * X) - X).abs().max() < 1e-13


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 3), torch.full((3, 3), math.nan), torch.diag(torch.tensor([1.0, 0.0]))]
)
def test_projection_names_the_residual_when_it_cannot(bad):
    with pytest.raises(OptimizerError, match=r"residual \|\|X\^T X - I\|\|_F .* at the end"):
        ORTHOGONAL.project(bad)


def test_projection_refuses_low_precision_and_wrong_shapes():
    with pytest.raises(OptimizerError, match=r"needs float32 or float64, got torch\.bfloat16"):
        ORTHOGONAL.project(torch.eye(3, dtype=torch.bfloat16))
    for shape in [(3, 4), (9,), (2, 3, 3)]:
        with pytest.raises(OptimizerError, match="square and two-dimensional"):
            ORTHOGONAL.project(torch.ones(shape))
        with pytest.raises(OptimizerError, match="square and two-dimensional"):
            ORTHOGONAL.random(shape, torch.Generator())


def test_projection_is_exact_in_a_run_with_reduced_precision(monkeypatch):
    seen = []
    norm = torch.linalg.matrix_norm

    def spy(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return norm(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "matrix_norm", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        ORTHOGONAL.project(off(point(ORTHOGONAL), 0.3).float())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


def test_residual_is_measured_in_float64():
    X = point(ORTHOGONAL, 128).float()
    exact = torch.linalg.matrix_norm(X.double().T @ X.double() - torch.eye(128)).item()
    assert ORTHOGONAL.residual(X) == pytest.approx(exact, rel=1e-9)


# -- tags and groups -----------------------------------------------------------------------------


def test_the_tag_survives_losing_the_data():
    weight = declare(nn.Parameter(torch.empty(3, 3)), ORTHOGONAL)
    weight.data = torch.empty(0)
    assert manifold_of(weight) is ORTHOGONAL
    assert manifold_of(nn.Parameter(torch.empty(3, 3))) is None


def named(*shapes):
    return [
        (f"w{i}", declare(nn.Parameter(torch.empty(shape)), ORTHOGONAL))
        for i, shape in enumerate(shapes)
    ]


def test_groups_split_by_manifold_with_their_rates():
    frozen = nn.Parameter(torch.empty(2), requires_grad=False)
    plain = nn.Parameter(torch.empty(2))
    config = OptimConfig(lr=0.01, euclidean_lr_factor=3.0)
    groups = parameter_groups([("b", plain), ("f", frozen), *named((3, 3), (4, 4))], config)
    assert [group["names"] for group in groups] == [["w0", "w1"], ["b"]]
    assert [group["manifold"] for group in groups] == [ORTHOGONAL, None]
    assert [group["lr"] for group in groups] == [0.01, pytest.approx(0.03)]
    assert len(parameter_groups(named((3, 3)), config)) == 1


def test_groups_read_the_shape_of_a_partitioned_parameter():
    [(name, weight)] = named((3, 3))
    weight.data = torch.empty(0)
    weight.ds_shape = torch.Size((3, 3))
    assert parameter_groups([(name, weight)], OptimConfig())[0]["names"] == ["w0"]


def test_groups_refuse():
    with pytest.raises(OptimizerError, match=r"'w0': an orthogonal .* got shape \(3, 4\)"):
        parameter_groups(named((3, 4)), OptimConfig())


def test_groups_of_a_network_without_matrices():
    [group] = parameter_groups([("b", nn.Parameter(torch.empty(2)))], OptimConfig())
    assert (group["names"], group["manifold"]) == (["b"], None)
