"""The a-priori error holds, is computed and not decorative, and has the size it should have."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from model.certification.rounding import BFLOAT16, FLOAT32, FLOAT64, gamma
from model.certify import ProvedCertifier, image_norms
from model.errors import ModelError
from model.networks.registry import build_network
from tests.model.small_networks import tiny_config, trained_like

CONFIGS = {
    "plain": tiny_config(),
    "deep": tiny_config(depth=12, width=32),
    "folded": tiny_config(depth=4, fold="always"),
    "unfolded": tiny_config(depth=4, fold="never"),
    "linear": tiny_config(head="linear", input_shape=(3, 8, 6), width=24),
    "bare": tiny_config(position=False, beta=0.0),
    "flat": tiny_config(pool="flat", depth=3),
    "grid": tiny_config(
        input_shape=(1, 8, 16), pool="grid", pool_windows=4, depth=3, shift="doubling"
    ),
}


def stored(config, seed=0):
    """Float32 network with biases, as an artifact holds it."""
    return trained_like(config, seed).float()


def copy_in(network, config, program):
    copy = build_network(config).to(program.dtype)
    copy.load_state_dict(network.state_dict())
    return copy


def pixels_for(config, count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *config.input_shape), generator=generator).to(torch.uint8)


def longdouble_logits(network, pixels):
    """Forward pass in 64-bit mantissas, written from the paper."""
    with torch.no_grad():
        w = {
            name: p.double().numpy().astype(np.longdouble) for name, p in network.named_parameters()
        }
    x = pixels.numpy().astype(np.longdouble) / 255 - np.longdouble(0.5)
    b, c, h, wd = x.shape
    p = network.stem.patch
    x = (
        x.reshape(b, c, h // p, p, wd // p, p)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(b, h // p, wd // p, -1)
    )
    x = x @ w["stem.weight"][:, : x.shape[-1]].T
    for i, block in enumerate(network.blocks):
        if block.p is not None:
            x = x + w[f"blocks.{i}.p"]
        x = x @ w[f"blocks.{i}.R"].T
        n = block.shifted
        parts = np.split(x, [n, 2 * n, 3 * n, 4 * n], axis=-1)
        for k, (step, axis) in enumerate(((-1, 1), (1, 1), (-1, 2), (1, 2))):
            parts[k] = np.roll(parts[k], step * block.distance, axis)
        x = (
            np.concatenate(parts, -1) @ w[f"blocks.{i}.R"] @ w[f"blocks.{i}.M"].T
            + w[f"blocks.{i}.b"]
        )
        folded = network.blocks[0].absolute  # of the last block as well
        x[..., :folded] = np.abs(x[..., :folded])
    if network.pool == "flat":
        x = x.reshape(b, -1)
    else:
        k, (h, wd, width) = network.pool_windows, x.shape[1:]
        x = x.reshape(b, k, h // k, k, wd // k, width)
        x = np.sqrt((x**2).sum((2, 4)) + np.longdouble(network.pool_tau) ** 2).reshape(b, -1)
    rows = w["head.weight"]
    if network.head.kind == "unit":
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    return x @ rows.T + w["head.bias"]


def spread(a, b):
    """Largest error of a logit difference, per sample."""
    d = np.asarray(a - b)
    return np.abs(d[:, :, None] - d[:, None, :]).max((1, 2)).astype(float)


@pytest.fixture(params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    network = stored(config)
    return config, network, network.matrix_bounds(), pixels_for(config)


def error_of(network, matrices, program, pixels):
    largest = float(network.margin_factor_bounds().max())
    return network.margin_error(
        image_norms(pixels), program, matrices=matrices, largest_factor=largest
    ).numpy()


@torch.no_grad()
@pytest.mark.parametrize("program", [FLOAT64, FLOAT32, BFLOAT16], ids=lambda p: p.name)
def test_no_program_errs_by_more_than_the_bound(case, program):
    config, network, matrices, pixels = case
    wide = torch.promote_types(program.dtype, torch.float32)
    logits = copy_in(network, config, program)(pixels.to(wide) / 255)
    true = longdouble_logits(network, pixels)
    bound = error_of(network, matrices, program, pixels)
    actual = spread(logits.double().numpy().astype(np.longdouble), true)
    assert actual.max() > 0
    assert (actual <= bound).all()


def test_the_error_grows_with_the_unit_roundoff(case):
    _, network, matrices, pixels = case
    double = error_of(network, matrices, FLOAT64, pixels)
    single = error_of(network, matrices, FLOAT32, pixels)
    assert (single / double > 2.0**28.5).all()
    assert (single / double < 2.0**29.6).all()


def test_a_program_of_exact_arithmetic_has_no_error(case):
    _, network, matrices, pixels = case
    exact = dataclasses.replace(FLOAT64, activation=0, accumulation=0, wide=0, tiny=0)
    assert not error_of(network, matrices, exact, pixels).any()


def test_the_error_grows_with_the_norm_the_biases_and_the_depth():
    config = tiny_config()
    network = stored(config)
    matrices, pixels = network.matrix_bounds(), pixels_for(config)
    small = error_of(network, matrices, FLOAT64, pixels // 2)
    plain = error_of(network, matrices, FLOAT64, pixels)
    assert (small < plain).all()
    with torch.no_grad():
        network.blocks[0].b.mul_(10)
    louder = error_of(network, matrices, FLOAT64, pixels)
    assert (louder > 1.1 * plain).all()
    with torch.no_grad():
        network.blocks[1].p.mul_(10)
    assert (error_of(network, matrices, FLOAT64, pixels) > louder).all()


def test_gamma_says_nothing_where_nothing_can_be_said():
    assert gamma(2**24, FLOAT32.accumulation) == math.inf
    assert gamma(10, 2.0**-53) == pytest.approx(10 * 2.0**-53, rel=1e-12)
    assert math.isinf(FLOAT32.product(2**24))


def test_an_infinite_error_leaves_no_radius():
    config = tiny_config()
    network = stored(config)
    hopeless = dataclasses.replace(FLOAT32, accumulation=0.5)
    certifier = ProvedCertifier(network, hopeless, network.matrix_bounds())
    found = certifier.certify(torch.tensor([[5.0, 1.0, 0.0]]), torch.ones(1), torch.zeros(1).long())
    assert (float(found.radius), float(found.error)) == (0.0, math.inf)
    assert int(found.prediction) == 0


def test_norms_are_exact_to_rounding_and_never_too_small():
    pixels = pixels_for(CONFIGS["linear"])
    norms = image_norms(pixels)
    true = np.sqrt((pixels.numpy().astype(np.longdouble) ** 2).sum((1, 2, 3))) / 255
    assert (norms.numpy() >= true).all()
    assert (norms.numpy() <= true * (1 + 2e-15)).all()
    with pytest.raises(ModelError, match=r"torch\.float32"):
        image_norms(pixels.float())
