"""Attacks find what is there, and never look outside of their ball."""

import math
import subprocess
import sys

import pytest
import torch

from model.attacks import (
    Balls,
    apgd,
    apgd_targeted,
    cross_entropy,
    margins,
    pgd,
    targeted_dlr,
    top_rivals,
)
from model.errors import ModelError
from tests.model.small_networks import tiny_config, trained_like

ATTACKS = {"pgd": pgd, "apgd": apgd, "apgd_targeted": apgd_targeted}
DTYPES = [torch.float32, torch.float64]
ORDER = {"l2": 2, "linf": math.inf}
DUAL = {"l2": 2, "linf": 1}


def linear(classes, dtype=torch.float64, seed=0):
    """A linear classifier of 1x4x4 images; `inside` draws images away from the pixel limits."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, classes))
    return network.to(dtype).eval()


def boundary(network, images, norm):
    """Predictions of a linear classifier and their exact distances to its boundary."""
    with torch.no_grad():
        logits, w = network(images), network[1].weight
        own = logits.argmax(1)
        slopes = (w[:, None] - w[None]).norm(p=DUAL[norm], dim=-1)
        distances = (logits.gather(1, own[:, None]) - logits) / slopes[own]
    return own, distances.scatter(1, own[:, None], torch.inf).amin(1)


def distance(points, images, norm="l2"):
    return (points.double() - images.double()).flatten(1).norm(p=ORDER[norm], dim=1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("attack", "classes"), [("pgd", 2), ("apgd", 2), ("apgd_targeted", 5)])
def test_reaches_the_boundary_of_a_linear_classifier_and_not_less(
    generator, attack, classes, dtype, norm
):
    network = linear(classes, dtype)
    images = torch.rand(20, 1, 4, 4, generator=generator, dtype=dtype)
    own, exact = boundary(network, images, norm)
    # Steps of constant length come near the best point of the sphere, not quite to it.
    for factor, broken in ((0.999, 0), (1.1 if attack == "pgd" else 1.01, 20)):
        eps = exact * factor
        found = ATTACKS[attack](network, images, own, eps, norm=norm, steps=30, generator=generator)
        assert found.dtype == dtype
        assert (distance(found, images, norm) <= eps.double()).all()
        assert int((network(found).argmax(1) != own).sum()) == broken


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_points_stay_in_the_pixel_range_and_the_ball(generator, attack, dtype, norm):
    network = trained_like(tiny_config(num_classes=5)).to(dtype)
    images = torch.rand(12, 1, 4, 4, generator=generator, dtype=dtype).round(decimals=1)
    eps = torch.tensor([0.0, 1e-12, 1e-8, 1e-7, 1e-3, 0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0])
    classes = network(images).argmax(1)
    found = ATTACKS[attack](
        network, images, classes, eps, norm=norm, steps=5, restarts=2, clip=True,
        generator=generator,
    )  # fmt: skip
    assert found.min() >= 0
    assert found.max() <= 1
    assert (distance(found, images, norm) <= eps.double()).all()
    assert torch.equal(found[0], images[0])
    assert (distance(found, images, norm)[-4:] > 0.05).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_to_the_ball_leaves_nothing_to_rounding(generator, norm):
    """Random points on float32 spheres: about half of them lie outside by a rounding error."""
    images = torch.rand(4000, 1, 4, 4, generator=generator)
    eps = torch.logspace(-9, 1, 4000, dtype=torch.float64)
    balls = Balls(images, eps, norm)
    rounded = balls.random(generator)
    if norm == "linf":
        rounded = balls.project(images + 100 * torch.randn(images.shape, generator=generator))
    assert int((distance(rounded, images, norm) > eps).sum()) > 400
    exact = balls.inside(rounded)
    assert (distance(exact, images, norm) <= eps).all()
    wide = eps > 1e-3
    assert (distance(exact, rounded, norm)[wide] <= 1e-6 * eps[wide].clamp(min=0.5)).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_seed_decides_and_nothing_else_is_touched(generator, attack):
    network = trained_like(tiny_config(num_classes=4))
    images = torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    classes, eps = network(images).argmax(1), torch.full((6,), 0.05)
    trainable = [p.requires_grad for p in network.parameters()]
    state = torch.get_rng_state()

    def run(seed):
        with torch.no_grad():
            return ATTACKS[attack](
                network, images, classes, eps, steps=3, restarts=3,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip

    assert torch.equal(run(1), run(1))
    if attack == "pgd":  # the others start at the image, and here do best from there or not
        assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in network.parameters()] == trainable
    assert all(p.grad is None for p in network.parameters())


def test_restarts_find_what_the_start_at_the_image_cannot(generator):
    """logits (0, |<w, x>| - 0.5): the gradient vanishes at x = 0, so a run from there stays."""

    class Valley(torch.nn.Module):
        def forward(self, images):
            side = images.flatten(1) @ torch.full((16,), 0.25, dtype=images.dtype)
            return torch.stack([torch.zeros_like(side), side.square() - 0.25], dim=1)

    images, classes = torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    for restarts, broken in ((1, 0), (2, 3)):
        found = apgd(
            Valley(), images, classes, torch.ones(3), restarts=restarts, steps=30,
            generator=generator,
        )  # fmt: skip
        assert int((Valley()(found).argmax(1) == 1).sum()) == broken


def test_a_broken_sample_takes_no_further_run(generator):
    network = linear(5)
    images = torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    own, exact = boundary(network, images, "l2")
    batches = []
    network.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    eps = exact * torch.tensor([0.5, 3.0] * 4)
    apgd_targeted(network, images, own, eps, rivals=4, steps=2)
    assert batches[0] == 8
    assert batches[1:4] == [8, 8, 8]
    assert batches[-1] == 4
    assert batches == sorted(batches, reverse=True)


def test_apgd_outdoes_plain_steps_of_the_same_number(generator):
    """Mean margin reached in a ball of a network with kinks; the order is the paper's claim."""
    network = trained_like(tiny_config(depth=6, beta=1.0, num_classes=4))
    images = torch.rand(64, 1, 4, 4, generator=generator, dtype=torch.float64)
    classes, eps = network(images).argmax(1), torch.full((64,), 0.4)
    reached = {
        name: margins(
            network(attack(network, images, classes, eps, steps=20, generator=generator)), classes
        ).mean()
        for name, attack in (("pgd", pgd), ("apgd", apgd))
    }
    start = margins(network(images), classes).mean()
    assert reached["pgd"] > start + 0.1
    assert reached["apgd"] > reached["pgd"] - 0.02


def test_losses_have_their_values():
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0]])
    classes = torch.tensor([0])
    assert margins(logits, classes).tolist() == [-1.0]
    assert cross_entropy(logits, classes)[0] == pytest.approx(0.45191, abs=1e-5)
    # Target 3 is behind by 2; the scale is 4 less the mean of 2 and 1.
    assert targeted_dlr(torch.tensor([3]))(logits, classes)[0] == pytest.approx(-2 / 2.5)
    three = targeted_dlr(torch.tensor([2]))(logits[:, :3], classes)
    assert three.tolist() == [-1.0]
    assert top_rivals(logits, classes, 2).tolist() == [[2, 3]]
    assert top_rivals(logits, classes, 9).tolist() == [[2, 3, 1, 4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": torch.ones(1)}, "one radius per image"),
        ({"eps": torch.tensor([1.0, -1.0])}, "not negative"),
        ({"eps": torch.tensor([1.0, torch.inf])}, "finite"),
        ({"images": torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)}, r"torch\.bfloat16"),
        ({"images": torch.full((2, 1, 4, 4), 1.5), "clip": True}, r"in \[0, 1\]"),
        ({"steps": 0}, "0 steps"),
        ({"restarts": 0}, "0 restarts"),
    ],
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_refuses(attack, changes, message):
    settings = {
        "images": torch.zeros(2, 1, 4, 4),
        "classes": torch.zeros(2, dtype=torch.int64),
        "eps": torch.ones(2),
        **changes,
    }
    with pytest.raises(ModelError, match=message):
        ATTACKS[attack](linear(2, torch.float32), **settings)


@pytest.mark.slow
@pytest.mark.integration
def test_the_library_is_imported_on_use_only_and_quietly():
    code = (
        "import sys, torch, model.attacks as a; assert 'foolbox' not in sys.modules;"
        "n = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval();"
        "a.pgd(n, torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.ones(1), steps=1);"
        "assert 'foolbox' in sys.modules"
    )
    # Without a PATH there is no git program, which one of its dependencies looks for.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
