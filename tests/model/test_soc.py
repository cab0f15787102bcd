"""Skew orthogonal convolutions: series, bounds, gradients, the network."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from data_shards.storage.store import Store
from model.artifact.artifact import read_without_parameters, write_artifact
from model.certification.dot_products import transposed
from model.certification.rounding import FLOAT32, FLOAT64, ErrorState
from model.networks.registry import build_network, parameter_count
from model.networks.soc.network import SocConfig
from model.networks.soc.skew_conv import (
    SkewConvolution,
    fast_series,
    remainder,
    reshapes,
    series,
    skew,
    skew_kernel_bound,
)
from optim.manifolds import manifold_of

SMALL = {"input_shape": (1, 4, 4), "num_classes": 3, "stages": 2, "width": 4}


def dense(kernel, height, width):
    """The map of a filter on zero-padded images, as a matrix."""
    channels = kernel.shape[1]
    basis = torch.eye(channels * height * width, dtype=kernel.dtype)
    images = basis.view(-1, channels, height, width)
    return F.conv2d(images, kernel, padding=kernel.shape[-1] // 2).flatten(1).mT


def random_skew(generator, channels=3, side=3, norm=1.7):
    kernel = skew(torch.randn(channels, channels, side, side, generator=generator).double())
    return kernel * norm / torch.linalg.matrix_norm(dense(kernel, 5, 4), 2)


@pytest.mark.parametrize("side", [1, 3])
def test_the_map_of_a_skew_filter_is_skew_and_its_bound_proved(generator, side):
    weight = torch.randn(4, 4, side, side, generator=generator)
    kernel = skew(weight.double())
    matrix = dense(kernel, 6, 5)
    assert torch.equal(transposed(kernel), -kernel)
    torch.testing.assert_close(matrix, -matrix.mT, rtol=0, atol=0)
    bound = skew_kernel_bound(weight, "w")
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert bound.lower * (1 - 1e-12) <= norm <= bound.upper
    assert bound.upper <= side * min(
        float(torch.linalg.matrix_norm(r, 2)) for r in reshapes(kernel)
    ) * (1 + 1e-2)
    assert bound.absolute >= float(torch.linalg.matrix_norm(matrix.abs(), 2))
    assert bound.frobenius == pytest.approx(float(kernel.norm()), rel=1e-8)


def test_the_other_two_arrangements_of_a_skew_filter_have_the_same_norms(generator):
    kernel = random_skew(generator, channels=5)
    wide, square = (torch.linalg.matrix_norm(r, 2) for r in reshapes(kernel))
    tall = kernel.permute(0, 2, 3, 1).reshape(-1, 5)
    other = kernel.permute(0, 3, 1, 2).reshape(15, 15)
    torch.testing.assert_close(torch.linalg.matrix_norm(tall, 2), wide)
    torch.testing.assert_close(torch.linalg.matrix_norm(other, 2), square)


@pytest.mark.parametrize("terms", [4, 6, 15])
def test_the_series_is_orthogonal_up_to_its_proved_remainder(generator, terms):
    kernel = random_skew(generator)
    images = torch.eye(60, dtype=torch.float64).view(60, 3, 5, 4)
    found = series(images, kernel, terms).flatten(1).mT
    exact = torch.matrix_exp(dense(kernel, 5, 4))
    distance = float(torch.linalg.matrix_norm(found - exact, 2))
    assert 0.9 * remainder(1.7, terms) <= distance <= remainder(1.7, terms) + 1e-14
    singular = torch.linalg.svdvals(found)
    assert (singular - 1).abs().max() <= remainder(1.7, terms) + 1e-14


def test_fast_series_has_the_exact_input_gradient_and_nearly_that_of_the_filter(generator):
    x = torch.randn(3, 3, 5, 4, generator=generator).double()
    g = torch.randn(3, 3, 5, 4, generator=generator).double()
    apart = {}
    for norm in (1.7, 0.17):
        results = []
        for function in (series, fast_series):
            kernel = random_skew(generator.manual_seed(1), norm=norm).requires_grad_()
            image = x.clone().requires_grad_()
            y = function(image, kernel, 6)
            y.backward(g)
            # Only the skew part of a gradient reaches the weight.
            results.append((y.detach(), image.grad, skew(kernel.grad)))
        (y0, x0, k0), (y1, x1, k1) = results
        torch.testing.assert_close(y0, y1, rtol=0, atol=1e-14)
        torch.testing.assert_close(x0, x1, rtol=0, atol=1e-13)
        apart[norm] = float((k0 - k1).norm() / k0.norm())
    assert apart[1.7] < 0.15
    assert apart[0.17] < 0.002


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("inputs", [2, 3])
def test_a_layer_is_an_isometry_into_its_channels(generator, stride, side, inputs):
    """Singular values from both sides, also where channels are padded with zeros."""
    outputs = 3 * stride**2
    layer = SkewConvolution(inputs, outputs, side, stride=stride, train_terms=6, terms=15).double()
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.zero_()
    layer.store_scale()
    bound = skew_kernel_bound(layer.weight, "w")
    images = torch.eye(inputs * 16, dtype=torch.float64).view(-1, inputs, 4, 4)
    with torch.no_grad():
        singular = torch.linalg.svdvals(layer.eval()(images).flatten(1))
        training = torch.linalg.svdvals(layer.train()(images).flatten(1))
    assert 1 - 1e-4 < singular.min() <= singular.max() <= layer.norm(bound) < 1 + 1e-4
    assert (training - 1).abs().max() < 0.1


@pytest.mark.parametrize("program", [FLOAT64, FLOAT32], ids=lambda p: p.name)
def test_carried_error_covers_what_a_layer_does(generator, program):
    exact = SkewConvolution(3, 12, 3, stride=2, train_terms=6, terms=15).eval()
    with torch.no_grad():
        exact.weight.normal_(generator=generator)
        exact.bias.normal_(generator=generator)
    exact.store_scale()
    bound = skew_kernel_bound(exact.weight, "w")
    x = torch.randn(8, 3, 6, 6, generator=generator)
    with torch.no_grad():
        computed = exact(x).double()
        true = exact.double()(x.double())
    norms = x.double().flatten(1).norm(dim=1) * (1 + 1e-12)
    state = ErrorState(norms, torch.zeros(8).double(), program, norms)
    exact.carry(state, bound, 9)
    assert (true.flatten(1).norm(dim=1) <= state.norm).all()
    if program is FLOAT32:
        error = (computed - true).flatten(1).norm(dim=1)
        assert (error > 0).all()
        assert (error <= state.error).all()
    else:
        assert (state.error < 1e-10).all()
    assert (state.peak >= state.norm).all()


@pytest.mark.parametrize(
    ("depth", "unit", "mlp"),
    [(5, 16.7, 25.2), (10, 21.7, 30.2), (15, 26.7, 35.1), (20, 31.7, 40.1), (25, 36.7, 45.1)],
)
def test_parameter_counts_are_those_of_the_published_networks(depth, unit, mlp):
    shape = {"input_shape": (3, 32, 32), "num_classes": 10, "depth": depth}
    assert parameter_count(SocConfig(**shape)) / 1e6 == pytest.approx(unit, abs=0.06)
    assert parameter_count(SocConfig(**shape, head="mlp")) / 1e6 == pytest.approx(mlp, abs=0.06)


def test_training_and_evaluation_are_one_function_up_to_the_series(generator):
    network = build_network(SocConfig(**SMALL, depth=4, train_terms=15)).double()
    network.initialise(3)
    x = torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = network.train()(x)
        torch.testing.assert_close(before, network.eval()(x), rtol=1e-6, atol=1e-6)
        for layer in network.blocks:
            layer.convolution.weight.mul_(3)  # a scaled filter is the same layer
        torch.testing.assert_close(network.train()(x), before)
        network.calibrate(())
        torch.testing.assert_close(network.train()(x), network.eval()(x), rtol=1e-6, atol=1e-6)


def test_a_network_without_stored_scales_gives_no_numbers(generator):
    network = build_network(SocConfig(**SMALL, depth=2)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(generator=generator)
        assert network(torch.rand(1, 1, 4, 4)).isnan().all()
    network.calibrate(())
    assert network(torch.rand(1, 1, 4, 4)).isfinite().all()


def test_the_constant_follows_from_bounds_and_stored_scales_alone(tmp_path):
    config = SocConfig(**SMALL, depth=2)
    network = build_network(config).eval()
    network.initialise(1)
    opener = Store(str(tmp_path)).open
    tensors = (*network.named_parameters(), *network.named_buffers())
    info = write_artifact(opener, network_config=config, tensors=tensors, context={})
    bare = read_without_parameters(opener, info)
    assert bare.blocks[0].convolution.weight.is_meta
    bound = bare.lipschitz_upper_bound(network.matrix_bounds())
    assert bound == network.lipschitz_upper_bound()
    assert bound.value > 1


def test_the_last_stage_on_the_manifold():
    config = SocConfig(**SMALL, depth=4, pointwise="manifold")
    with torch.device("meta"):
        network = build_network(config)
    tagged = [name for name, p in network.named_parameters() if manifold_of(p) is not None]
    assert tagged == ["blocks.3.convolution.weight", "blocks.4.convolution.weight"]
    assert set(tagged) < set(network.bounded_matrices)


def test_remainder():
    assert remainder(3.0, 15) == pytest.approx(3.0**15 / math.factorial(15))
    assert remainder(0.0, 15) == 0
    assert remainder(1e300, 15) == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 5}, "depth=5 is no multiple of stages=2"),
        ({"depth": 2, "stages": 0}, "stages=0"),
        ({"depth": 3, "stages": 3}, "4x4 cannot be halved 3 times"),
        ({"depth": 2, "width": 3}, "width=3 must be even"),
        ({"depth": 2, "input_shape": (6, 4, 4)}, "at least the 6 channels"),
        ({"depth": 2, "terms": 1}, r"terms=1 must be in 2\.\.40"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValidationError, match=message):
        SocConfig(**{**SMALL, **changes})
