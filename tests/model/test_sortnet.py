import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model.certification.rounding import BFLOAT16, FLOAT32, FLOAT64
from model.certify import ProvedCertifier, certify, image_norms
from model.empirical_lipschitz import observed_lipschitz, refute
from model.errors import ModelError
from model.networks.config import NetworkConfig
from model.networks.linf.distance import Subsets
from model.networks.linf.groupsort import GroupSortConfig, bounded_rows, group_sort, row_distances
from model.networks.linf.sortnet import SampledCentering, SortNetConfig
from model.networks.registry import build_network, parameter_count
from pipeline.presets.registry import run_preset
from tests.model.small_networks import trained_like

SMALL: dict[str, Any] = {"input_shape": (2, 3, 3), "num_classes": 4}
SORTNET = SortNetConfig(**SMALL, width=20, depth=3, keep=0.6, top=5, group=4, input_scale=2.5)
DISTANCE = dataclasses.replace(SORTNET, keep=1.0)
MLP = dataclasses.replace(SORTNET, hidden=14)
WINDOWS = dataclasses.replace(SORTNET, hidden=6, window=2, window_stride=1)
GROUPSORT = GroupSortConfig(**SMALL, width=12, depth=3, sorted_channels=4)


NETWORKS: dict[str, NetworkConfig] = {
    "sortnet": SORTNET,
    "linfdist": DISTANCE,
    "groupsort": GROUPSORT,
    "mlp": MLP,
    "windows": WINDOWS,
}


@pytest.fixture(params=list(NETWORKS.values()), ids=list(NETWORKS))
def network(request, generator):
    """float64, with a head of another scale than at the start."""
    found = trained_like(request.param)
    with torch.no_grad():
        if hasattr(found.head, "scale"):
            found.head.weight.fill_(-3.0)
    return found


def test_parameter_counts_of_the_paper():
    counts = {
        "mnist-sortnet-1_10": 82.7,
        "cifar10-sortnet-8_255": 120.6,
        "cifar10-sortnet-mlp-2_255": 123.2,
        "cifar10-sortnet-mlp-8_255": 123.2,
        "tiny-imagenet-sortnet-mlp-1_255": 170.5,
        "tiny-imagenet-sortnet-mlp2x-1_255": 170.7,
        "imagenet64-sortnet-mlp-1_255": 180.3,
        "imagenet64-sortnet-mlp2x-1_255": 204.1,
    }
    for name, millions in counts.items():
        assert parameter_count(run_preset(name).model) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 0.0}, r"keep=0.0.*\(0, 1\]"),
        ({"depth": 1}, "depth=1.*at least 2"),
        ({"p_end": 4.0}, "p_end=4.0"),
        ({"p_from": 0.99}, "p_from=0.99"),
        ({"input_scale": 0.0}, "input_scale"),
        ({"hidden": -1}, "hidden=-1"),
        ({"window": 2}, "window=2.*give hidden"),
        ({"window": 2, "window_stride": 2, "hidden": 3}, "squares of 2 pixels in steps of 2.*3x3"),
    ],
)
def test_refuses_what_cannot_be_trained(change, words):
    with pytest.raises(ValidationError, match=words):
        dataclasses.replace(SORTNET, **change)


def test_refuses_groups_that_do_not_fill_the_width():
    with pytest.raises(ValidationError, match="sorted_channels=5 does not divide width=12"):
        dataclasses.replace(GROUPSORT, sorted_channels=5)


def test_power_grows_exponentially_and_ends_at_infinity():
    config = dataclasses.replace(SORTNET, p_start=8, p_end=800, p_from=0.2, p_to=0.6)
    assert config.power(0.0) == config.power(0.2) == 8
    assert config.power(0.4) == pytest.approx(80)
    assert config.power(0.6) == math.inf


def test_coefficients_fall_by_one_minus_q_and_sum_to_one():
    c = SORTNET.coefficients()
    assert len(c) == 5
    assert all(b / a == pytest.approx(0.4) for a, b in itertools.pairwise(c))
    assert sum(c) == pytest.approx(1, abs=1e-15)
    assert DISTANCE.coefficients() == (1.0,)


def test_with_all_inputs_kept_it_is_the_distance_net(generator):
    network = trained_like(DISTANCE)
    x = torch.rand(6, *SMALL["input_shape"], generator=generator, dtype=torch.float64)
    h = (x.flatten(1) - 0.5) * 2.5
    for block in network.blocks:
        h = (h[:, None] - block.weight).abs().amax(-1)
        h = h if block.centre is None else h - block.centre.mean
    torch.testing.assert_close(network(x), network.head.bias - h, rtol=0, atol=1e-12)


def test_windows_are_layers_on_squares_of_pixels(generator):
    network = trained_like(dataclasses.replace(WINDOWS, depth=2, keep=1.0))
    x = torch.rand(5, *SMALL["input_shape"], generator=generator, dtype=torch.float64)
    squares = [x[:, :, i : i + 2, j : j + 2] for i in (0, 1) for j in (0, 1)]
    parts = []
    for square in squares:
        h = (square.flatten(1) - 0.5) * 2.5
        for block in network.blocks:
            h = (h[:, None] - block.weight).abs().amax(-1) - block.centre.mean
        parts.append(h)
    torch.testing.assert_close(network.features(x), torch.cat(parts, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [MLP, WINDOWS], ids=["mlp", "windows"])
def test_intervals_certify_more_than_the_global_factors(config, generator):
    network = trained_like(config)
    pixels = torch.randint(0, 256, (20, *network.input_shape), generator=generator).byte()
    certifier = ProvedCertifier(network, FLOAT64, {})
    with torch.no_grad():
        logits, slopes = network.logits_and_slopes(pixels.double() / 255)
    norms, labels = image_norms(pixels, "linf"), logits.argmax(1)
    plain = certifier.certify(logits, norms, labels)
    found = certifier.certify(logits, norms, labels, slopes)
    assert (plain.radius > 0).all()
    assert (found.radius >= plain.radius * (1 - 1e-9)).all()
    assert (found.radius > plain.radius * 1.01).any()
    nominal = certify(logits, slopes, labels, lipschitz=1.0, radii=network.feature_radii)
    torch.testing.assert_close(nominal.radius, found.radius, rtol=1e-6, atol=0)
    assert (nominal.radius >= found.radius).all()


def test_passing_neurons_begin_with_one_input_each():
    network = build_network(dataclasses.replace(DISTANCE, passing=True)).double().eval()
    network.initialise(0)
    x = torch.rand(3, 18, dtype=torch.float64) - 0.5
    y = network.blocks[0](x, None, None)
    torch.testing.assert_close(y[:, 4], x[:, 4] + 10)
    torch.testing.assert_close(y[:, 19], x[:, 1] + 10)


@pytest.mark.parametrize("config", [SORTNET, WINDOWS], ids=["images", "windows"])
def test_what_is_dropped_depends_on_seed_and_step_alone(config, generator):
    images = torch.rand(9, *SMALL["input_shape"], generator=generator)
    outputs = {}
    for key in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        network = build_network(config).train()
        network.initialise(0)
        torch.manual_seed(len(outputs))
        network.begin_step(seed=key[0], step=key[1], progress=0.0)
        y = network(images)
        torch.testing.assert_close(outputs.setdefault(key, y), y, rtol=0, atol=0)
    assert len({tuple(y.flatten().tolist()) for y in outputs.values()}) == 3


def test_training_at_infinite_power_without_dropping_is_evaluation(generator):
    network = trained_like(DISTANCE)
    images = torch.rand(30, *SMALL["input_shape"], generator=generator, dtype=torch.float64)
    network.calibrate([images])
    expected = network(images)
    network.train()
    network.begin_step(step=9, progress=0.999, seed=0)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)


def test_centring_takes_the_mean_over_the_samples_that_kept_a_neuron():
    centre = SampledCentering(4)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    kept = torch.tensor([[0, 2], [2, 3]])  # samples 0 and 1, then sample 2
    found = centre(x, Subsets(2, None, kept))
    means = {0: 2.0, 2: (2.0 + 4.0 + 10.0) / 3, 3: 20.0}
    expected = x - torch.tensor([[means[0], means[2]]] * 2 + [[means[2], means[3]]])
    torch.testing.assert_close(found, expected)
    assert not centre.mean.any()


def test_calibration_uses_the_maximum_whatever_training_uses(generator):
    network = trained_like(SORTNET)
    batches = torch.rand(3, 10, *SMALL["input_shape"], generator=generator, dtype=torch.float64)
    network.calibrate(batches)
    first = network.blocks[0]
    h = ((batches.flatten(0, 1).flatten(1) - 0.5) * 2.5)[:, None] - first.weight
    torch.testing.assert_close(first.centre.mean.double(), h.abs().amax(-1).mean(0))


def test_no_pair_of_points_exceeds_the_constant(network, generator):
    bound = network.lipschitz_upper_bound().value
    factors = network.margin_factor_bounds()
    x = torch.rand(200, *network.input_shape, generator=generator, dtype=torch.float64)
    y = x + 0.3 * (2 * torch.rand(x.shape, generator=generator).double() - 1)
    moved = network(x) - network(y)
    steps = (x - y).flatten(1).norm(p=torch.inf, dim=1)
    ratios = (moved[:, :, None] - moved[:, None]).abs() / steps[:, None, None]
    assert (ratios <= bound * factors * (1 + 1e-12) + 1e-12).all()


def test_the_observed_constant_refutes_a_smaller_bound(network, generator):
    images = torch.rand(8, *network.input_shape, generator=generator, dtype=torch.float64)
    bound = network.lipschitz_upper_bound()
    observed = observed_lipschitz(network, images)
    refute(bound, observed)
    assert observed > bound.value / 4
    too_small = dataclasses.replace(bound, value=observed * 0.999)
    with pytest.raises(ModelError, match="derivative shows at least"):
        refute(too_small, observed)


@pytest.mark.parametrize("program", [FLOAT32, BFLOAT16], ids=lambda program: program.name)
def test_no_program_errs_by_more_than_its_bound(network, generator, program):
    stored = network.float()
    images = torch.rand(64, *network.input_shape, generator=generator)
    exact = copy.deepcopy(stored).double()(images.double())
    computed = copy.deepcopy(stored).to(program.dtype)(images).double()
    error = computed - exact
    spread = (error[:, :, None] - error[:, None]).abs().amax((1, 2))
    norms = images.flatten(1).amax(1).double()
    largest = float(stored.margin_factor_bounds().max())
    proved = stored.margin_error(norms, program, matrices={}, largest_factor=largest)
    assert (spread <= proved).all()
    assert (proved < 1e4 * spread.max()).all()
    tiny = stored.margin_error(norms, FLOAT64, matrices={}, largest_factor=largest)
    assert (tiny < proved / 2**20).all()


def test_radii_hold_between_the_two_nearest_classes(network, generator):
    """Along the segment to a point of another class, the prediction holds up to the radius."""
    pixels = torch.randint(0, 256, (20, *network.input_shape), generator=generator).byte()
    images = pixels.double() / 255
    certifier = ProvedCertifier(network, FLOAT64, {})
    norms = image_norms(pixels, "linf")
    assert torch.equal(norms >= images.flatten(1).amax(1), torch.ones(20, dtype=torch.bool))
    with torch.no_grad():
        logits, slopes = network.logits_and_slopes(images)
        found = certifier.certify(logits, norms, torch.zeros(20, dtype=torch.int64), slopes)
        assert (found.radius > 0).float().mean() > 0.5
        steps = images[None] - images[:, None]
        lengths = steps.flatten(2).norm(p=torch.inf, dim=2)
        shares = (found.radius[:, None] / lengths).clamp(max=1) * (1 - 1e-9)
        there = images[:, None] + shares.nan_to_num(0)[..., None, None, None] * steps
        classes = network(there.flatten(0, 1)).argmax(1).view(20, 20)
        assert (classes == found.prediction[:, None]).all()


def test_rows_have_an_l1_norm_of_at_most_one():
    weight = torch.tensor([[3.0, -1.0], [0.25, 0.5], [0.0, 0.0]])
    expected = torch.tensor([[0.75, -0.25], [0.25, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(bounded_rows(weight), expected, rtol=0, atol=0)
    distances = row_distances(expected)
    assert distances[0, 1] == pytest.approx(1.25)
    assert distances[0, 2] == pytest.approx(1.0)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_group_sort_sorts_each_group(generator, size):
    x = torch.randn(5, 6, generator=generator)
    expected = torch.cat([part.sort(1).values for part in x.split(size, dim=1)], 1)
    assert torch.equal(group_sort(x, size), expected)
