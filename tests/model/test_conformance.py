"""What holds for every certified network; a new system joins with one line of NETWORKS."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from model.attacks import apgd, margins
from model.certification.rounding import FLOAT32, FLOAT64
from model.certify import certify
from model.empirical_lipschitz import observed_lipschitz, refute
from model.errors import ModelError
from model.networks.init import KINDS, initial_kind
from model.networks.linf.groupsort import GroupSortConfig
from model.networks.linf.sortnet import SortNetConfig
from model.networks.liresnet.bronet import BRONetConfig
from model.networks.liresnet.network import LiResNetConfig
from model.networks.registry import build_network, parameter_count
from model.networks.sll.aol import AolConfig
from model.networks.sll.network import SllConfig
from model.networks.soc.network import SocConfig
from optim.manifolds import manifold_of
from tests.model.small_networks import tiny_config, trained_like
from tests.repetitions import mostly_slow

SMALL = {"input_shape": (2, 4, 4), "num_classes": 3}
RESIDUAL = {
    "input_shape": (1, 8, 6),
    "num_classes": 3,
    "stem_kernel": 3,
    "stem_padding": 2,
    "neck_patch": 1,
    "width": 4,
}
NETWORKS = {
    "lipnext": tiny_config(),
    "lipnext_colour": tiny_config(input_shape=(3, 6, 4), width=24, num_classes=5, depth=3),
    "lipnext_linear": tiny_config(head="linear"),
    "lipnext_plain": tiny_config(position=False, initial="identity_m", beta=1.0, alpha=0.25),
    "lipnext_flat": tiny_config(pool="flat"),
    "lipnext_grid": tiny_config(
        input_shape=(1, 8, 12), depth=3, shift="doubling", pool="grid", pool_windows=2
    ),
    "sll": SllConfig(**SMALL, channels=3, conv_layers=2, pool=2, dense_layers=2, dense_inner=10),
    "cpl": SllConfig(
        **SMALL, scaling="cpl", channels=3, conv_layers=1, pool=1, dense_layers=2, dense_inner=7
    ),
    "sortnet": SortNetConfig(**SMALL, width=16, depth=3, keep=0.7, top=4),
    "sortnet_mlp": SortNetConfig(**SMALL, width=16, depth=2, keep=0.7, top=4, hidden=12),
    "sortnet_windows": SortNetConfig(
        **SMALL, width=12, depth=2, keep=0.7, hidden=8, window=2, window_stride=2
    ),
    "linfdist": SortNetConfig(**SMALL, width=12, depth=2, passing=True),
    "groupsort": GroupSortConfig(**SMALL, width=24, depth=2),
    "soc": SocConfig(**SMALL, depth=2, stages=2, width=4),
    "soc_angles": SocConfig(
        **SMALL,
        depth=2,
        stages=2,
        width=4,
        activation="householder",
        pooling="projection",
        pointwise="manifold",
    ),
    "soc_mlp": SocConfig(**SMALL, depth=2, stages=2, width=4, head="mlp", hidden=12),
    "liresnet": LiResNetConfig(**RESIDUAL, depth=2, dense_width=12, dense_layers=2),
    "bronet": BRONetConfig(**RESIDUAL, depth=2, rank=2, dense_width=12, dense_layers=1),
    "bronet_reflections": BRONetConfig(
        **RESIDUAL,
        depth=1,
        linear_depth=1,
        rank=1,
        neck="reflection",
        dense_width=8,
        dense_layers=2,
        dense_rank=3,
    ),
    "bronet_pool": BRONetConfig(
        **RESIDUAL, depth=1, grow=True, rank=2, neck="pool", dense_width=8, dense_layers=1
    ),
    "aol": AolConfig(**SMALL, patch=2, channels=6, conv_layers=2, kept_channels=3, dense_layers=2),
}

FREE_NORMS = {"liresnet", "bronet"}
"""Families whose bound is a product of norms that no parametrisation holds at 1."""


@pytest.fixture(params=NETWORKS)
def config(request):
    return NETWORKS[request.param]


def one_of_soc(test):
    """For what takes SOC long: its other forms differ in what other tests here look at."""
    names = mostly_slow(NETWORKS, NETWORKS.keys() - {"soc_angles", "soc_mlp"})
    return pytest.mark.parametrize("config", names, indirect=True)(test)


@pytest.fixture
def images(config, generator):
    return torch.rand(16, *config.input_shape, generator=generator, dtype=torch.float64)


def test_outputs(config, images):
    network = trained_like(config)
    logits, factors = network.logits_and_margin_factors(images)
    assert network.norm in {"l2", "linf"}
    assert network.input_shape == config.input_shape
    assert logits.shape == (16, network.num_classes)
    assert factors.shape == (network.num_classes, network.num_classes)
    assert torch.equal(factors, factors.T)
    assert not factors.diagonal().any()
    assert torch.equal(network(images), logits)
    torch.testing.assert_close(network(images[3:5]), logits[3:5], rtol=0, atol=1e-12)


def test_refuses_wrong_images(config, images):
    network = trained_like(config)
    _, h, w = config.input_shape
    with pytest.raises(ModelError, match=rf"\(16, 7, {h}, {w}\).*\(B, {config.input_shape[0]}, "):
        network(torch.rand(16, 7, h, w))
    with pytest.raises(ModelError, match=r"torch\.uint8.*divide 8-bit values by 255"):
        network((images * 255).to(torch.uint8))


def test_builds_on_the_meta_device_with_tags(config):
    with torch.device("meta"):
        network = build_network(config)
    assert sum(p.numel() for p in network.parameters()) == parameter_count(config)
    assert all(p.is_contiguous() for p in network.parameters())
    assert all(initial_kind(p) in KINDS for p in network.parameters())
    for p in network.parameters():
        assert (manifold_of(p) is not None) == (initial_kind(p) in {"haar", "identity"})


def test_every_parameter_and_the_image_get_a_finite_gradient(config, images):
    network = trained_like(config).float()
    x = images.float().requires_grad_()
    logits, factors = network.logits_and_margin_factors(x)
    (logits.square().sum() + factors.sum()).backward()
    for name, p in network.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
    assert x.grad.isfinite().all()


def test_blocks_that_are_recomputed_keep_less_and_have_the_same_gradients(config, images):
    gradients, sizes = [], []
    blocks = trained_like(config).block_count
    for recomputed in sorted({0, blocks // 2, blocks}):
        network = trained_like(config)
        network.recomputed_blocks = recomputed
        kept = {}

        def save(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            logits = network(images)
        sizes.append(sum(kept.values()))
        logits.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(less < more for more, less in pairwise(sizes))
    assert len(sizes) > 1
    for alike in zip(*gradients, strict=True):
        assert all(torch.equal(alike[0], other) for other in alike[1:])


@pytest.mark.integration
@one_of_soc
def test_the_proof_holds_for_the_float32_program(config, images):
    """Bounds name every matrix once, no derivative refutes them, no logit errs by more than E."""
    stored = trained_like(config).float()
    matrices = stored.matrix_bounds()
    constrained = {n for n, p in stored.named_parameters() if manifold_of(p) is not None}
    assert constrained <= set(matrices) == set(stored.bounded_matrices)
    assert stored.lipschitz_upper_bound() == stored.lipschitz_upper_bound(matrices)
    exact = build_network(config).double().eval()
    exact.load_state_dict(stored.state_dict())
    refute(stored.lipschitz_upper_bound(), observed_lipschitz(exact, images))
    with torch.no_grad():
        logits, factors = exact.logits_and_margin_factors(images)
        error = (stored(images.float()).double() - logits).numpy()
    bounds = stored.margin_factor_bounds()
    # Nominal factors speak of pixels, proved ones of features.
    assert (stored.lipschitz_upper_bound().value * bounds >= factors - 1e-15).all()
    assert not bounds.diagonal().any()
    order = 2 if stored.norm == "l2" else torch.inf
    norms = images.flatten(1).norm(p=order, dim=1) * (1 + 1e-12)
    largest = float(bounds.max())
    proved = stored.margin_error(norms, FLOAT32, matrices=matrices, largest_factor=largest)
    assert (abs(error[:, :, None] - error[:, None]).max((1, 2)) <= proved.numpy()).all()
    double = stored.margin_error(norms, FLOAT64, matrices=matrices, largest_factor=largest)
    # Not by the ratio of the units: what every program computes in float64 gains nothing.
    assert (double < proved / 2**12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bound_is_just_above_what_is_observed(config, dtype):
    """That is 1, except where a layer's norm is free: the others are not among the parts."""
    if config.kind == "soc":
        config = dataclasses.replace(config, terms=26)  # what 15 leave out is more than 1e-9
    network = build_network(config).to(dtype)
    network.initialise(0)
    network.calibrate([torch.rand(2, *config.input_shape, dtype=dtype)])  # stores norms
    matrices = network.matrix_bounds()
    bound = network.lipschitz_upper_bound(matrices)
    free = [layer for layer in bound.parts if config.kind in FREE_NORMS]
    observed = math.prod(matrices[f"{layer}.weight"].lower for layer in free)
    exact = dtype == torch.float64 and not free
    assert 1 <= bound.value / observed < 1 + (1e-9 if exact else 1e-4)


@pytest.mark.integration
@one_of_soc
@pytest.mark.parametrize(
    ("steps", "restarts"), [(8, 1), pytest.param(20, 2, marks=pytest.mark.slow)]
)
def test_no_attack_succeeds_inside_the_certified_radius_and_some_beyond(
    config, images, generator, steps, restarts
):
    network = trained_like(config)
    images = images[:8]
    with torch.no_grad():
        logits, factors = network.logits_and_margin_factors(images)
    lipschitz = network.lipschitz_upper_bound().value
    c = certify(logits, factors, logits.argmax(1), lipschitz=lipschitz)
    assert c.radius.min() > 0

    def fooled(eps):
        found = apgd(
            network,
            images,
            c.prediction,
            eps,
            loss=margins,
            norm=network.norm,
            steps=steps,
            restarts=restarts,
            generator=generator,
        )
        return network(found).argmax(1) != c.prediction

    assert not fooled(c.radius * 0.9999).any()
    assert fooled(c.radius * 3 + 1).any()
