"""The matrix inequality behind SLL, CPL and AOL, and what is built on it."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from model.certification.rounding import BFLOAT16, FLOAT32, FLOAT64, ErrorState
from model.errors import ModelError
from model.networks.init import initial_kind, initial_value
from model.networks.registry import build_network, parameter_count
from model.networks.sll.aol import AolConfig
from model.networks.sll.layers import AlmostOrthogonal, Residual, max_min
from model.networks.sll.network import SllConfig
from model.networks.sll.scaling import gram, norm_bound, norm_estimate, row_sums
from pipeline.presets.registry import run_preset
from tests.model.small_networks import trained_like

SMALL = {"input_shape": (1, 4, 4), "num_classes": 3}


def weight(shape, seed=0):
    """Rows of very different lengths."""
    v = initial_value("xavier_normal", shape, seed=seed, name="v")
    return v * torch.logspace(-2, 1, shape[0], dtype=torch.float64).view(-1, *[1] * (v.ndim - 1))


def operator(v, side):
    """Matrix of the zero-padded convolution on a side x side grid."""
    if v.ndim == 2:
        return v
    basis = torch.eye(v.shape[1] * side * side, dtype=v.dtype).view(-1, v.shape[1], side, side)
    return F.conv2d(basis, v, padding=v.shape[-1] // 2).flatten(1).mT


def expand(t, v, side):
    return t if v.ndim == 2 else t.repeat_interleave(side * side)


@pytest.mark.parametrize("shape", [(7, 5), (5, 9), (4, 3, 3, 3)])
@pytest.mark.parametrize("rule", ["aol", "sll", "cpl"])
def test_gram_lies_below_every_diagonal(shape, rule):
    """T - V V^T is positive semi-definite, for q over many orders of magnitude."""
    v = weight(shape)
    log_q = torch.linspace(-8, 8, shape[0], dtype=torch.float64)
    t = {"aol": row_sums(v), "sll": row_sums(v, log_q), "cpl": norm_bound(v).expand(shape[0])}[rule]
    a = operator(v, side=6)
    difference = torch.diag(expand(t, v, 6)) - a @ a.mT
    assert float(torch.linalg.eigvalsh(difference).min()) > -1e-12 * float(t.max())
    if rule == "cpl":  # a number, and not much more than the squared norm
        assert float(t[0]) < 1.4 * float(torch.linalg.matrix_norm(a, 2)) ** 2


def test_sll_at_q_1_has_the_diagonal_of_aol():
    v = weight((6, 4))
    torch.testing.assert_close(row_sums(v, torch.zeros(6, dtype=torch.float64)), row_sums(v))
    torch.testing.assert_close(row_sums(v), (v @ v.mT).abs().sum(1))


def test_gram_kernel_is_the_gram_operator():
    v = weight((3, 2, 3, 3))
    a = operator(v, side=9)
    row = (a @ a.mT)[4 * 9 + 4].view(3, 9, 9)  # first channel, centre: no border is near
    torch.testing.assert_close(row[:, 2:7, 2:7], gram(v)[0])


@pytest.mark.parametrize("shape", [(40, 30), (20, 60), (5, 8, 3, 3)])
def test_estimate_lies_below_the_bound_and_has_the_gradient_of_the_norm(shape):
    v = initial_value("xavier_normal", shape, seed=1, name="v").requires_grad_()
    estimate = norm_estimate(v)
    bound = float(norm_bound(v.detach()))
    assert 0.85 * bound < float(estimate.detach()) <= bound
    estimate.backward()
    # The norm is homogeneous of degree 2: <gradient, v> = 2 ||v||^2.
    torch.testing.assert_close((v.grad * v.detach()).sum(), 2 * estimate.detach())


@pytest.mark.parametrize("scaling", ["sll", "cpl"])
@pytest.mark.parametrize("kernel", [0, 3])
def test_residual_layer_never_expands(scaling, kernel, generator):
    """The Jacobian norm is at most 1 at many activation patterns, and comes near it."""
    shape = (3, 4, 4) if kernel else (6,)
    layer = Residual(shape[0], 5, kernel=kernel, positions=16, scaling=scaling).double().eval()
    norms = []
    for seed in range(8):
        for name, p in layer.named_parameters():
            value = initial_value("standard_normal", p.shape, seed=seed, name=name)
            with torch.no_grad():
                p.copy_(value * 2)
        x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(layer, x).view(x.numel(), -1)
        norms.append(float(torch.linalg.matrix_norm(jacobian, 2)))
    assert 0.9 < max(norms) <= 1 + 1e-12


@pytest.mark.parametrize("kernel", [0, 3])
def test_aol_layer_never_expands_and_keeps_orthonormal_columns(kernel):
    layer = AlmostOrthogonal(3, 5, kernel=kernel, positions=16, initial="orthonormal").double()
    shape = (1, 3, 4, 4) if kernel else (1, 3)
    for seed in range(10):
        for name, p in layer.named_parameters():
            with torch.no_grad():
                p.copy_(initial_value(initial_kind(p), p.shape, seed=seed, name=name))
        x = torch.zeros(shape, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
        eye = torch.eye(x.numel(), dtype=torch.float64)
        torch.testing.assert_close(jacobian.mT @ jacobian, eye)
        with torch.no_grad():
            layer.weight.add_(weight(layer.weight.shape, seed))
        jacobian = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= 1 + 1e-12


def test_max_min_sorts_pairs_of_neighbours():
    x = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    assert torch.equal(max_min(x), torch.tensor([[2.0, 1.0, 4.0, 3.0]]))


def test_a_zero_row_stays_silent():
    layer = Residual(4, 3, scaling="sll").double()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight[0] = 1.0
    x = torch.ones(1, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), -x)
    layer.rescaled(FLOAT64)


def carried(network, program, norm=2.0):
    state = ErrorState.images(torch.tensor([norm]), 16, program)
    for block in network.blocks:
        block.carry(state)
    return state


@pytest.mark.parametrize("program", [FLOAT64, FLOAT32, BFLOAT16])
def test_rounding_bound_follows_the_weights_and_refuses_a_wild_q(program):
    config = SllConfig(**SMALL, channels=1, conv_layers=0, pool=1, dense_layers=1, dense_inner=8)
    network = trained_like(config)
    before = float(carried(network, program).error)
    assert 0 < before < {"float64": 1e-11, "float32": 1e-3, "bfloat16": 60}[program.name]
    with torch.no_grad():
        network.blocks[0].bias.fill_(100.0)
    assert float(carried(network, program).error) > 10 * before
    with torch.no_grad():
        network.blocks[0].log_q[0] = 40.0
    assert float(carried(network, program).error) == torch.inf


def test_weights_that_are_no_numbers_are_refused():
    config = SllConfig(**SMALL, channels=2, conv_layers=1, pool=1, dense_layers=0)
    network = trained_like(config)
    with torch.no_grad():
        network.blocks[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"blocks\.0\.weight holds values that are not finite"):
        network.lipschitz_upper_bound()


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("cifar10-sll-S", 41.4),
        ("cifar10-cpl-M", 78.8),
        ("cifar100-sll-L", 118.8),
        ("cifar10-sll-XL", 236.4),
        ("cifar100-cpl-XL", 237.1),
        ("tiny-imagenet-sll-S", 167.5),
        ("tiny-imagenet-sll-M", 317.8),
        ("tiny-imagenet-sll-XL", 950.3),
        ("cifar10-aol-L", 136.2),
    ],
)
def test_published_networks_have_the_published_size(preset, millions):
    assert round(parameter_count(run_preset(preset).model) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: SllConfig(**SMALL, channels=0, conv_layers=1, dense_layers=1), "channels=0"),
        (lambda: SllConfig(**SMALL, channels=2, conv_layers=1, dense_layers=1, pool=3), "pool=3"),
        (lambda: SllConfig(**SMALL, channels=2, conv_layers=0, dense_layers=0), "linear"),
        (lambda: AolConfig(**SMALL, patch=3, kept_channels=2), "patch=3"),
        (lambda: AolConfig(**SMALL, channels=4, kept_channels=5), "kept_channels=5 exceeds"),
        (lambda: AolConfig(**SMALL, patch=4, channels=4, kept_channels=1), "even"),
        (lambda: AolConfig(**SMALL, patch=4, channels=4, kept_channels=2), "num_classes=3 exceeds"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        config()


def test_training_and_evaluation_of_cpl_differ_by_the_slack_of_the_bound_only():
    config = SllConfig(
        **SMALL, scaling="cpl", channels=2, conv_layers=1, pool=1, dense_layers=1, dense_inner=6
    )
    network = build_network(config)
    network.initialise(0)
    images = torch.rand(8, 1, 4, 4)
    trained, evaluated = network.train()(images), network.eval()(images)
    assert not torch.equal(trained, evaluated)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=0.1)


def test_evaluation_follows_a_changed_weight():
    layer = Residual(4, 3, scaling="cpl").double().eval()
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(weight((3, 4)))
        x = torch.linspace(-1, 1, 4, dtype=torch.float64)[None]
        before = layer(x)
        layer.weight.mul_(3)  # T grows with the weight: the layer stays the same
        torch.testing.assert_close(layer(x), before)
