"""Matrices made orthonormal, reflections, convolution norms: each against its definition."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.certification.conv_bounds import convolve, kernel_bound, leading_singular_pair
from model.certification.eigen_bounds import proved_least, proved_norm
from model.certification.rounding import FLOAT32, FLOAT64
from model.errors import ModelError
from model.networks.liresnet.cholesky import (
    entry_error,
    orthonormal_rows,
    regularised_gram,
    rows_error,
)
from model.networks.liresnet.fft import images_of, spectrum
from model.networks.liresnet.layers import CholeskyDense, DenseReflection, ReflectionConvolution
from model.networks.liresnet.regularized_conv import LinearResidual, RegularisedConvolution
from tests.model.small_networks import filled

TYPES = [torch.float64, torch.complex128]


def random(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_orthonormal_rows_have_the_stated_gram(generator, dtype):
    x = random(generator, 2, 4, 7, dtype=dtype)
    q = orthonormal_rows(x, 1e-2)
    gram = regularised_gram(x, 1e-2)
    eta = (gram - x @ x.mH).diagonal(dim1=-2, dim2=-1).real[:, 0]
    factor = torch.linalg.cholesky(gram)
    expected = torch.eye(4) - eta[:, None, None] * torch.linalg.inv(factor.mH @ factor)
    torch.testing.assert_close(q @ q.mH, expected.to(dtype), rtol=0, atol=1e-13)
    assert torch.linalg.matrix_norm(q, 2).max() < 1


@pytest.mark.parametrize("dtype", TYPES)
def test_gradient_is_that_of_a_constant_eta(generator, dtype):
    x = random(generator, 2, 4, 7, dtype=dtype).requires_grad_()
    weights = random(generator, 2, 4, 7, dtype=dtype)

    def plain(x):
        eta = 0.1 * (x @ x.mH).diagonal(dim1=-2, dim2=-1).real.mean(-1).detach()
        gram = x @ x.mH + eta[:, None, None] * torch.eye(4)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), x, upper=False)

    (mine,) = torch.autograd.grad((orthonormal_rows(x, 0.1) * weights).real.sum(), x)
    (theirs,) = torch.autograd.grad((plain(x) * weights).real.sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 6), (4, 7)])
def test_transforms_by_products_are_those_of_the_library(generator, shape):
    x = random(generator, 2, *shape)
    half = spectrum(x, fast=False)
    torch.testing.assert_close(half, spectrum(x, fast=True), rtol=0, atol=1e-14)
    torch.testing.assert_close(images_of(half, shape[1], fast=False), x, rtol=0, atol=1e-14)
    wrong = half * (1 + 1j)  # no transform of a real image
    mine, library = (images_of(wrong, shape[1], fast=fast) for fast in (False, True))
    torch.testing.assert_close(mine, library, rtol=0, atol=1e-14)


def circulant(kernel, side):
    """The matrix of a circular convolution (c, n, 3, 3) on a torus, (c side^2, n side^2)."""
    basis = torch.eye(kernel.shape[1] * side**2, dtype=kernel.dtype)
    images = F.pad(basis.view(-1, kernel.shape[1], side, side), (1, 1, 1, 1), mode="circular")
    # A convolution in the sense of Fourier: the library's own is a correlation.
    return F.conv2d(images, kernel.flip(2, 3)).flatten(1).T


@pytest.mark.parametrize("training", [False, True])
def test_reflecting_convolution_is_the_explicit_reflection(generator, training):
    layer: Any = ReflectionConvolution(3, rank=2, depth=4, shape=(4, 4), grow=True)
    filled(layer, generator)
    layer.share = 1e-15
    kernel = (layer.identity(layer.weight) + layer.stored(layer.weight)).view(3, 2, 3, 3)
    V = circulant(kernel.detach(), 6)
    W = torch.eye(len(V)) - 2 * V @ torch.linalg.solve(V.T @ V, V.T)
    torch.testing.assert_close(W.T @ W, torch.eye(len(V), dtype=W.dtype), rtol=0, atol=1e-12)
    x = random(generator, 2, 3, 4, 4)
    layer.train(training)
    layer.bias.data.zero_()
    layer.centre.mean.zero_()
    y = F.pad(x, (1, 1, 1, 1)).flatten(1) @ W.T
    y = y.view(2, 3, 6, 6)
    if training:
        y = y - y.mean((0, 2, 3))[:, None, None]
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grow", [False, True])
def test_singular_values_of_the_reflecting_convolution(generator, grow):
    layer = filled(
        ReflectionConvolution(4, rank=2, depth=1, shape=(5, 3), grow=grow), generator
    ).eval()
    x = random(generator, 1, 4, 5, 3)
    jacobian = torch.autograd.functional.jacobian(layer, x).flatten(4).flatten(0, 3)
    values = torch.linalg.svdvals(jacobian)
    assert values.max() <= 1 + 1e-12
    assert values.min() > 1 - 1e-5 if grow else values.min() < 0.99


def test_dense_layers_do_not_expand(generator):
    x = random(generator, 1, 12)
    cholesky = filled(CholeskyDense(12, 12, depth=3), generator)
    reflection = filled(DenseReflection(12, 12, rank=5, depth=3), generator)
    corner = filled(DenseReflection(12, 7, rank=7), generator)
    for layer, least in ((cholesky, 0.5), (reflection, 1 - 1e-5), (corner, 0.0)):
        jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, 0]
        values = torch.linalg.svdvals(jacobian)
        assert values.max() <= 1 + 1e-12
        assert values.min() >= least
    q = corner._q()
    square = torch.eye(12) - 2 * q.T @ q
    torch.testing.assert_close(jacobian, square[:7].detach(), rtol=0, atol=1e-14)


GEOMETRIES = [(5, 3, 5, 2, 2, (9, 8)), (4, 4, 3, 1, 1, (5, 6)), (6, 2, 4, 4, 0, (8, 8))]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("whole", [2048, 0])
def test_kernel_bound_is_above_and_close(generator, geometry, whole, monkeypatch):
    outputs, inputs, side, stride, padding, shape = geometry
    monkeypatch.setattr("model.certification.conv_bounds._WHOLE", whole)
    kernel = random(generator, outputs, inputs, side, side) / 4
    how = {"stride": stride, "padding": padding}
    basis = torch.eye(inputs * shape[0] * shape[1], dtype=torch.float64)
    images = basis.view(-1, inputs, *shape)
    matrix = F.conv2d(images, kernel, **how).flatten(1)
    torch.testing.assert_close(
        convolve(images, kernel, **how).flatten(1), matrix, rtol=0, atol=1e-15
    )
    bound = kernel_bound(
        kernel, kernel.abs(), stored=kernel.flatten(1), name="k", **how, shape=shape
    )
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm * (1 - 1e-4) < bound.lower <= norm <= bound.upper
    assert bound.upper < norm * (1 + 1e-5 if whole else 1.2)
    assert float(torch.linalg.matrix_norm(matrix.abs(), 2)) <= bound.absolute
    estimate = leading_singular_pair(kernel, **how, shape=shape, steps=8, seed=3)[2]
    assert norm * 0.95 < estimate <= norm * (1 + 1e-12)


def test_a_kernel_that_is_not_finite_is_refused():
    kernel = torch.full((2, 2, 1, 1), torch.inf, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"k holds values that are not finite"):
        kernel_bound(
            kernel,
            kernel,
            stored=kernel.flatten(1),
            name="k",
            stride=1,
            padding=0,
            shape=(2, 2),
        )


@pytest.mark.parametrize("dtype", TYPES)
def test_proved_eigenvalues_enclose(generator, dtype):
    m = random(generator, 3, 6, 4, dtype=dtype)
    values = torch.linalg.svdvals(m)
    gram = m.mH @ m
    least = proved_least(gram, values[:, -1] ** 2)
    assert (least <= values[:, -1] ** 2).all()
    assert (least > 0.98 * values[:, -1] ** 2).all()
    assert not proved_least(gram, 2 * values[:, 0] ** 2).any()
    norm = float(values.max())
    assert norm <= proved_norm(m) <= norm * (1 + 1e-6)
    assert proved_norm(m * 0) == 0


def computed_rows(layer, dtype):
    """Q as a program of this type computes it, in float64."""
    layer = copy.deepcopy(layer).to(dtype).eval().requires_grad_(False)
    q = layer._q()
    return q.to(torch.complex128 if q.is_complex() else torch.float64)


@pytest.mark.parametrize(
    "layer",
    [
        CholeskyDense(40, 9),
        CholeskyDense(24, 24, depth=2),
        DenseReflection(24, 24, rank=12, depth=2),
        DenseReflection(40, 9, rank=9),
        ReflectionConvolution(8, rank=4, depth=2, shape=(4, 5)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_rounding_of_computed_rows_is_below_its_bound(layer, generator):
    layer = filled(layer, generator, torch.float32)
    bound = layer.bound("weight", layer.weight)
    assert bound.upper == 1
    assert bound.condition < 1e5
    m, k = computed_rows(layer, torch.float64).shape[-2:]
    error = computed_rows(layer, torch.float32) - computed_rows(layer, torch.float64)
    largest = float(torch.linalg.matrix_norm(error, 2).max())
    kind = {"complex_terms": error.is_complex()}
    entries = getattr(layer, "_entry_error", entry_error)
    assert 0 < largest <= rows_error(bound, m, k, entries(FLOAT32), FLOAT32, **kind)
    assert rows_error(bound, m, k, entries(FLOAT64), FLOAT64, **kind) < 1e-6


def test_a_singular_matrix_says_nothing_in_float32(generator):
    layer: Any = DenseReflection(8, 8, rank=3, depth=2)
    with torch.no_grad():
        layer.weight.zero_()
    bound = layer.bound("weight", layer.weight)
    assert bound.condition == pytest.approx(3, rel=0.02)  # the identity is left
    with torch.no_grad():
        layer.weight[:, -1] = 1
        layer.weight[:3, :3] = -(2**0.5) * torch.eye(3)
    bound = layer.bound("weight", layer.weight)
    assert bound.condition > 1e6


def test_eigenvalues_are_proved_whatever_the_library_returns(generator, monkeypatch):
    m = random(generator, 2, 6, 4)
    gram, norm = m.mT @ m, float(torch.linalg.matrix_norm(m, 2).max())
    least = torch.linalg.eigvalsh(gram)[:, 0]

    def wrong(matrices):
        return vars(torch.return_types)["linalg_cholesky_ex"](
            (torch.eye(4).double().expand_as(matrices), torch.zeros(2, dtype=torch.int32))
        )

    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: torch.full((2, 4), 1e-3))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    assert proved_norm(m) >= norm
    assert (proved_least(gram, 100 * least) <= least).all()


LAYERS = [
    CholeskyDense(12, 5),
    DenseReflection(12, 12, rank=5, depth=2),
    ReflectionConvolution(6, rank=3, depth=2, shape=(4, 5)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("function", ["cholesky", "solve_triangular"])
def test_a_solver_that_is_not_backward_stable_is_refused(layer, function, generator, monkeypatch):
    # With gradients nothing is cached, whatever a test before has done to this layer.
    layer = filled(layer, generator, torch.float32).eval().requires_grad_(True)
    x = torch.rand(2, 6, 4, 5) if isinstance(layer, ReflectionConvolution) else torch.rand(2, 12)
    exact = getattr(torch.linalg, function)
    expected = layer(x)

    def sloppy(*arguments, **settings):
        # As a solver errs that inverts blocks of an ill-conditioned factor.
        result = exact(*arguments, **settings)
        return result + 1e-11 * torch.tril(torch.ones_like(result))

    monkeypatch.setattr(torch.linalg, function, sloppy)
    with pytest.raises(ModelError, match=r"leaves residuals of .* times what is charged"):
        layer(x)
    monkeypatch.setattr(torch.linalg, function, exact)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_what_was_measured_is_what_is_used(layer, generator, monkeypatch):
    layer = filled(layer, generator, torch.float32).eval().requires_grad_(False)
    q = layer._q()
    assert layer._q() is q
    layer.weight.mul_(0.9)
    assert layer._q() is not q
    changed = layer._q()
    assert not torch.equal(changed, q)
    assert layer.double()._q().dtype != changed.dtype


@pytest.mark.parametrize(
    "layer",
    [CholeskyDense(6, 4), DenseReflection(6, 4, rank=4), CholeskyDense(4, 4, depth=1)],
    ids=["cholesky", "reflection", "cancelled"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_matrix_of_zeros_is_refused_in_plain_words(layer, training, generator):
    layer = filled(layer, generator, torch.float32).train(training)
    with torch.no_grad():
        layer.weight.zero_()
        if layer.depth:  # gain times V is minus the identity
            layer.weight[:, :-1] = -torch.eye(4)
            layer.weight[:, -1] = 1
    with pytest.raises(ModelError, match=r"neck\.0\.weight makes a matrix of zeros"):
        layer.bound("neck.0.weight", layer.weight)
    with pytest.raises(ModelError, match=r"rows cannot be made orthonormal.* row is 0"):
        layer(torch.rand(2, 6)[:, : layer.columns])


@pytest.mark.parametrize("layer", [CholeskyDense(6, 4), DenseReflection(6, 4, rank=4)])
def test_repeated_rows_are_bounded(layer, generator):
    layer = filled(layer, generator, torch.float32).eval()
    with torch.no_grad():
        layer.weight[1] = layer.weight[0]
        assert layer(torch.rand(2, 6)).isfinite().all()
    assert 1e2 < layer.bound("weight", layer.weight).condition < 1e7


def test_linear_residual_has_the_norm_of_its_kernel(generator):
    layer = filled(LinearResidual(3, depth=4, shape=(4, 5)), generator).eval()
    x = random(generator, 1, 3, 4, 5)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)
    norm = float(torch.linalg.matrix_norm(jacobian.flatten(4).flatten(0, 3), 2))
    assert norm <= layer.bound("weight", layer.weight).upper < norm * (1 + 1e-5)
    assert layer(x)[1].isnan()
    layer.measure()
    assert norm * (1 - 1e-6) < float(layer(x)[1]) <= norm * (1 + 1e-12)


def test_estimate_follows_seed_and_step_and_has_the_gradient_of_the_norm(generator):
    layer: Any = RegularisedConvolution(2, 3, kernel=3, stride=2, padding=1, shape=(6, 6))
    filled(layer, generator).train()
    x = random(generator, 1, 2, 6, 6)
    estimates = []
    for seed in (1, 1, 2):
        layer.seed = seed
        estimates.append(layer(x)[1])
    assert torch.equal(estimates[0], estimates[1])
    assert not torch.equal(estimates[0], estimates[2])
    (gradient,) = torch.autograd.grad(estimates[0], layer.weight)
    # The norm is homogeneous: <gradient, weight> is the norm itself.
    product = (gradient * layer.weight.detach()).sum()
    torch.testing.assert_close(product, estimates[0].detach())
