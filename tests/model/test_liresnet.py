import dataclasses

import pytest
import torch
from pydantic import ValidationError

from model.certify import certify
from model.errors import ModelError
from model.networks.liresnet.bronet import BRONetConfig
from model.networks.liresnet.network import LiResNetConfig
from model.networks.registry import build_network, parameter_count
from pipeline.presets.liresnet import PRESETS
from pipeline.presets.registry import run_preset
from tests.model.small_networks import trained_like

SMALL = {
    "input_shape": (1, 8, 8),
    "num_classes": 3,
    "width": 4,
    "depth": 2,
    "neck_patch": 2,
    "dense_width": 8,
    "dense_layers": 1,
}
COUNTS = {
    "cifar10-liresnet": 82_944_010,
    "tiny-imagenet-liresnet": 133_664_968,
    "imagenet-liresnet": 98_138_532,
    "cifar10-bronet": 68_788_234,
    "tiny-imagenet-bronet": 75_643_080,
    "imagenet-bronet": 86_385_588,
}


@pytest.mark.parametrize("name", COUNTS)
def test_preset_has_the_published_number_of_parameters(name):
    """82.9M, 133.7M and 98.1M for LiResNet++, 68M, 75M and 86M for BRONet."""
    assert parameter_count(run_preset(name).model) == COUNTS[name]


def test_every_preset_builds():
    for name in PRESETS:
        assert run_preset(name).preset == name
        assert parameter_count(run_preset(name).model) > 0


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LiResNetConfig, {"width": 5}, r"width=5 must be positive and even"),
        (LiResNetConfig, {"depth": 0}, r"depth=0 must be at least 1"),
        (LiResNetConfig, {"neck_patch": 3}, r"neck_patch=3 does not divide 4x4"),
        (LiResNetConfig, {"dense_width": 64}, r"dense_width=64 is larger than the 16 values"),
        (LiResNetConfig, {"stem_kernel": 13}, r"stem_kernel=13 is larger than the image"),
        (BRONetConfig, {"rank": 4}, r"rank=4 must be smaller than width=4"),
        (BRONetConfig, {"rank": 0}, r"rank=0 must be at least 1"),
        (BRONetConfig, {"rank": 2, "dense_rank": 8}, r"dense_rank=8 must be smaller than dense_w"),
    ],
)
def test_refuses_what_cannot_be_built(config, changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**{**SMALL, **changes})


def test_growing_blocks_add_a_margin_each():
    config = BRONetConfig(**SMALL, rank=2, grow=True, neck="pool")
    assert config.stem_grid == (4, 4)
    assert config.last_grid == (8, 8)
    network = trained_like(config)
    assert network.blocks[-1].grid == config.last_grid


def test_a_network_that_is_not_calibrated_certifies_nothing():
    network = build_network(LiResNetConfig(**SMALL)).double().eval()
    network.initialise(0)
    logits, factors = network.logits_and_margin_factors(torch.rand(2, 1, 8, 8))
    with pytest.raises(ModelError, match="margin factors must be finite"):
        certify(logits, factors, logits.argmax(1), lipschitz=1.0)


def test_nominal_constant_is_the_product_of_observed_norms():
    network = trained_like(BRONetConfig(**SMALL, rank=2, linear_depth=1))
    _, factors = network.logits_and_margin_factors(torch.rand(2, 1, 8, 8, dtype=torch.float64))
    bound = network.lipschitz_upper_bound()
    assert list(bound.parts) == ["stem", "blocks.0"]
    ratio = factors.detach()[0, 1] / network.margin_factor_bounds()[0, 1]
    assert bound.value * (1 - 1e-4) < float(ratio) <= bound.value


def test_training_estimates_depend_on_seed_and_step_alone():
    network = trained_like(LiResNetConfig(**SMALL)).train()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)

    def factors(step, seed):
        network.begin_step(step=step, progress=0.5, seed=seed)
        return network.logits_and_margin_factors(images)[1]

    first = factors(3, 1)
    assert not torch.equal(factors(4, 1), first)
    assert not torch.equal(factors(3, 2), first)
    assert torch.equal(factors(3, 1), first)
    true = network.lipschitz_upper_bound().value * network.margin_factor_bounds()
    torch.testing.assert_close(first, true, rtol=0.05, atol=0)


def test_low_precision_weights_are_computed_with_in_float32():
    network = trained_like(BRONetConfig(**SMALL, rank=2)).bfloat16()
    logits, factors = network.logits_and_margin_factors(torch.rand(2, 1, 8, 8))
    assert logits.dtype == factors.dtype == torch.float32
    assert logits.isfinite().all()


def test_calibration_changes_with_the_weights():
    network = trained_like(LiResNetConfig(**SMALL))
    before = float(network.stem.norm)
    with torch.no_grad():
        network.stem.weight *= 2
    network.calibrate([torch.rand(4, 1, 8, 8, dtype=torch.float64)])
    assert float(network.stem.norm) == pytest.approx(2 * before)


def test_linear_blocks_of_bronet_come_first():
    config = BRONetConfig(**SMALL, rank=2, linear_depth=3)
    network = build_network(dataclasses.replace(config, depth=1))
    kinds = [type(block).__name__ for block in network.blocks]
    assert kinds == ["LinearResidual"] * 3 + ["ReflectionConvolution"]
