import dataclasses

import pytest
import torch
from pydantic import ValidationError

from model.errors import ModelError
from model.networks.init import initial_kind, initial_value
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network, parameter_count
from optim.manifolds import ORTHOGONAL, manifold_of
from pipeline.presets.lipnext import PRESETS
from pipeline.presets.registry import run_preset
from tests.model.small_networks import tiny_config, trained_like

COUNTS = {
    "digits": 120_214,
    "digits-dense": 116_365,
    "synthetic": 38_026,
    "lipnext-S": 150_282,
    "lipnext-M": 4_467_722,
    "lipnext-L": 68_208_650,
    "lipnext-XL": 272_723_978,
    "cifar10-L32W1024": 68_208_650,
    "cifar10-L32W2048": 272_723_978,
    "tiny-imagenet-L32W2048": 273_113_288,
    "imagenet-L32W4096": 1_094_755_304,
    "imagenet-2B": 2_168_636_392,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_stated_number_of_parameters(name):
    config = run_preset(name).model
    with torch.device("meta"):
        network = build_network(config)
    assert all(p.is_meta for p in network.parameters())
    assert parameter_count(config) == COUNTS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"patch": 3}, "patch=3 does not divide the image of 4x4"),
        ({"input_shape": (1, 0, 4)}, "positive sides"),
        ({"width": 3}, "width=3 is smaller than the 4 values of a patch"),
        ({"alpha": 0.0}, r"alpha=0\.0 must be in \(0, 1/4\]"),
        ({"alpha": 0.3}, r"alpha=0\.3"),
        ({"beta": 1.1}, r"beta=1\.1"),
        ({"width": 6}, "width=6 cannot be shifted"),
        ({"width": 6, "alpha": 0.25}, "4 \\* 2 channels must lie in 4..6"),
        ({"pool_tau": 0.0}, r"pool_tau=0\.0"),
        ({"pool": "flat", "pool_windows": 2}, "pool_windows=2 needs pool=grid: pool=flat"),
        ({"pool": "grid", "pool_windows": 3}, "pool_windows=3 does not divide the grid of 2x2"),
        ({"pool": "grid", "pool_windows": 0}, "pool_windows=0"),
        ({"pool": "max"}, "pool"),
        ({"shift": "far"}, "shift"),
        ({"colour": 1}, "colour"),
        ({"fold": "sometimes"}, "fold"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny_config(**changes)


def test_folded_and_unfolded_blocks_agree(generator):
    never = trained_like(tiny_config(fold="never"))
    always = trained_like(tiny_config(fold="always"))
    auto = trained_like(tiny_config(fold="auto"))
    x = torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(always(x), never(x), rtol=0, atol=1e-13)
    assert not torch.equal(always(x), never(x)), "the two orders of products differ in rounding"
    assert torch.equal(auto(x), always(x)), "32 tokens for 16 channels"
    assert torch.equal(auto(x[:2]), never(x[:2])), "8 tokens for 16 channels"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_close_to_float64(generator, dtype):
    exact = trained_like(tiny_config())
    low = trained_like(tiny_config()).to(dtype)
    x = torch.rand(8, 1, 4, 4, generator=generator)
    logits, factors = low.logits_and_margin_factors(x)
    assert logits.dtype == factors.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits.double(), exact(x), rtol=0, atol=tolerance)


def test_identity_m_starts_with_identity():
    network = build_network(tiny_config(initial="identity_m"))
    network.initialise(0)
    assert torch.equal(network.blocks[1].M, torch.eye(16))
    assert ORTHOGONAL.residual(network.blocks[1].R.detach()) < 1e-5


@pytest.mark.parametrize("pool", ["l2", "grid"])
def test_the_last_absolute_value_changes_nothing_that_a_norm_sees(generator, pool):
    """So the last block leaves it out, and keeps no signs for it."""
    x = torch.rand(8, 1, 4, 4, generator=generator)
    found = []
    for absolute in (0, 8):
        network = trained_like(tiny_config(pool=pool)).float()
        assert [block.absolute for block in network.blocks] == [8, 0]
        network.blocks[-1].absolute = absolute
        logits = network(x)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_before_the_flat_pool_the_last_absolute_value_counts(generator):
    network = trained_like(tiny_config(pool="flat"))
    x = torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    with_it = network.features(x)
    assert network.blocks[-1].absolute == 8
    network.blocks[-1].absolute = 0
    assert not torch.equal(network.features(x), with_it)


def test_one_window_is_the_l2_pool_and_as_many_as_positions_the_absolute_values(generator):
    x = torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    whole, one = (trained_like(tiny_config(pool=pool)) for pool in ("l2", "grid"))
    assert torch.equal(whole(x), one(x))
    flat, every = tiny_config(pool="flat"), tiny_config(pool="grid", pool_windows=2)
    assert (flat.features, every.features) == (64, 64)
    values = trained_like(flat).features(x).abs()
    torch.testing.assert_close(trained_like(every).features(x), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", [{"pool": "flat"}, {"pool": "grid", "pool_windows": 2}])
def test_a_network_that_keeps_positions_tells_shifted_images_apart(generator, pool):
    """What the l2 pool cannot where no layer knows of positions."""
    config = tiny_config(input_shape=(1, 8, 8), position=False, beta=0.0)
    image = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    moved = image.roll(4, 2)  # two positions
    blind, seeing = trained_like(config), trained_like(dataclasses.replace(config, **pool))
    torch.testing.assert_close(blind(moved), blind(image), rtol=0, atol=1e-12)
    assert (seeing.features(moved) - seeing.features(image)).norm() > 0.1


def test_shifts_double_until_half_of_the_shorter_side():
    def distances(height, width):
        return tiny_config(
            input_shape=(1, 2 * height, 2 * width), depth=5, shift="doubling"
        ).shift_distances

    assert distances(16, 16) == (1, 2, 4, 8, 1)
    assert distances(7, 20) == (1, 2, 1, 2, 1)
    assert distances(3, 3) == distances(1, 9) == (1,) * 5
    assert tiny_config(input_shape=(1, 32, 32)).shift_distances == (1, 1)


def test_initial_values_depend_on_seed_and_name_alone():
    network = build_network(tiny_config()).double()
    network.initialise(7)
    torch.manual_seed(123)
    for name, p in reversed(list(network.named_parameters())):
        assert torch.equal(p, initial_value(initial_kind(p), p.shape, seed=7, name=name))
    assert not torch.equal(network.blocks[0].R, network.blocks[1].R)
    assert not torch.equal(network.blocks[0].R, network.blocks[0].M)
    other = initial_value("haar", (16, 16), seed=8, name="blocks.0.R")
    assert not torch.equal(network.blocks[0].R, other)


def test_initial_kinds():
    haar = initial_value("haar", (32, 32), seed=0, name="w")
    assert haar.dtype == torch.float64
    assert ORTHOGONAL.residual(haar) < 1e-13
    with torch.device("meta"):
        rows = initial_value("normal", (1000, 64), seed=0, name="w")
    assert rows.device.type == "cpu"
    assert float(rows.norm(dim=1).mean()) == pytest.approx(1, abs=0.02)
    assert not initial_value("zeros", (3,), seed=0, name="w").any()
    with pytest.raises(ModelError, match="'sevens' of w; known: haar"):
        initial_value("sevens", (3,), seed=0, name="w")


def test_which_parameters_are_orthogonal():
    network = build_network(tiny_config())
    network.double()
    orthogonal = {n for n, p in network.named_parameters() if manifold_of(p) is ORTHOGONAL}
    assert orthogonal == {"stem.weight", "blocks.0.R", "blocks.0.M", "blocks.1.R", "blocks.1.M"}


def test_configuration_describes_the_grid():
    config = LipNeXtConfig(input_shape=(3, 8, 12), num_classes=2, patch=4, width=64, depth=1)
    assert config.grid == (2, 3)
    assert config.stem_channels == 48
    assert config.shifted_channels == 4
    assert config.absolute_channels == 32
    assert dataclasses.replace(config, beta=1.0).absolute_channels == 64
