"""Search just below certified radii for inputs whose computed prediction flips (arXiv 2205.10159).

Each network here is one where the search breaks the naive certificate, which takes every layer as
exactly orthogonal or every computation as exact. Against the proved certificate it finds nothing.
"""

import math
from fractions import Fraction

import pytest
import torch

from model.attacks import apgd, margins
from model.certification.rounding import FLOAT32, FLOAT64
from model.certify import ProvedCertifier, certify
from model.networks.init import initial_kind
from tests.model.small_networks import tiny_config, trained_like

pytestmark = pytest.mark.integration

# One token of as many channels as there are pixels: margins are piecewise linear in the pixels,
# with slopes that reach the margin factor, so that the naive radius has no slack to hide in.
TIGHT = {"patch": 4, "width": 16}
JUST_BELOW = 1 - 1e-6


def stored(config, *, scale=1.0, dtype=torch.float32, seed=0):
    """Float64 network of weights that were scaled and then rounded to `dtype`."""
    network = trained_like(config, seed)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(scale if initial_kind(p) in {"haar", "identity"} else 1.0)
            p.copy_(p.to(dtype).double())
    return network


@torch.no_grad()
def naive(network, images):
    logits, factors = network.logits_and_margin_factors(images)
    return certify(logits, factors, logits.argmax(1), lipschitz=1.0)


@torch.no_grad()
def proved(network, images, program=FLOAT64):
    logits = network(images)
    norms = images.double().flatten(1).norm(dim=1) * (1 + 2.0**-40)
    certifier = ProvedCertifier(network, program, network.matrix_bounds())
    return certifier.certify(logits, norms, logits.argmax(1))


def exactly_inside(point, image, radius):
    """||point - image|| < radius in rational arithmetic."""
    pairs = zip(point.flatten().tolist(), image.flatten().tolist(), strict=True)
    return sum((Fraction(p) - Fraction(x)) ** 2 for p, x in pairs) < Fraction(radius) ** 2


def flips(network, images, certificates, points):
    """Which samples have a point of another class inside their certified ball, exactly."""
    with torch.no_grad():
        moved = network(points).argmax(1) != certificates.prediction
    rows = moved.nonzero().squeeze(1).tolist()
    radius = certificates.radius.tolist()
    return {i for i in rows if exactly_inside(points[i], images[i], radius[i])}


@pytest.mark.parametrize(
    ("changes", "weights", "at_least"),
    [
        ({"depth": 4}, {"dtype": torch.bfloat16}, 50),
        pytest.param({"depth": 32}, {"dtype": torch.bfloat16}, 2, marks=pytest.mark.slow),
        ({"depth": 16}, {"scale": 1 + 1e-4}, 50),
    ],
    ids=["bf16 weights", "bf16 weights, deep", "deep, expands by 1e-4 per matrix"],
)
def test_layers_that_are_not_orthogonal(generator, changes, weights, at_least):
    network = stored(tiny_config(**TIGHT, **changes), **weights)
    images = torch.rand(200, 1, 4, 4, generator=generator, dtype=torch.float64)

    def broken(certificates):
        points = apgd(
            network,
            images,
            certificates.prediction,
            certificates.radius * JUST_BELOW,
            loss=margins,
            steps=30,
            restarts=2,
            generator=generator,
        )
        return len(flips(network, images, certificates, points))

    assert broken(naive(network, images)) >= at_least
    sound = proved(network, images)
    assert (sound.radius > 0).sum() >= 199
    assert broken(sound) == 0


def segments(network, generator, dtype, count=300):
    """Pairs of images of different classes."""
    a, b = torch.rand(2, count, *network.input_shape, generator=generator, dtype=dtype)
    with torch.no_grad():
        apart = network(a).argmax(1) != network(b).argmax(1)
    return a[apart], b[apart]


@torch.no_grad()
def nearest_with_margin(network, segments, above):
    """On each segment, by bisection, a point of the first class with hardly more than a margin."""
    a, b = segments
    classes = network(a).argmax(1)
    start = -margins(network(a), classes) > above
    a, b, classes = a[start], b[start], classes[start]
    for _ in range(80):
        middle = (a + b) / 2
        holds = (-margins(network(middle), classes) > above).reshape(-1, 1, 1, 1)
        a, b = torch.where(holds, middle, a), torch.where(holds, b, middle)
    return a


def broken_by_neighbours(network, images, certificates, generator, tries=100):
    """Samples that some point just below the radius flips: against the margin, with jitter.

    Steps along the gradient, and steps of equal size in every pixel: these take most pixels over
    the next rounding boundary of a later operation.
    """
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margins(network(x), certificates.prediction).sum(), x)
    radius = certificates.radius.to(images)
    found = set()
    for number in range(tries):
        step = gradient.sign() if number % 2 else gradient
        if number > 1:
            step = step * torch.rand(step.shape, generator=generator, dtype=step.dtype)
        length = (
            step.flatten(1).norm(dim=1).clamp(min=1e-300 if step.dtype == torch.float64 else 1e-30)
        )
        share = 1 - 0.1 * float(torch.rand((), generator=generator))
        points = images + step * (share * radius / length).reshape(-1, 1, 1, 1)
        found |= flips(network, images, certificates, points)
    return found


@pytest.mark.parametrize(
    "program",
    [FLOAT32, pytest.param(FLOAT64, marks=pytest.mark.slow)],
    ids=lambda program: program.name,
)
@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_near_ties(generator, program, size):
    """The weights are orthogonal to rounding: what breaks here is the arithmetic alone."""
    config = tiny_config(input_shape=(1, size, size), patch=size, width=size**2, depth=4)
    network = stored(config, seed=1).to(program.dtype)
    pairs = segments(network, generator, program.dtype)
    ties = nearest_with_margin(network, pairs, 0.0)
    claimed = naive(network, ties)
    assert (claimed.radius < 1e3 * program.wide).all()
    broken = broken_by_neighbours(network, ties, claimed, generator)
    assert len(broken) > len(ties) / 3

    sound = proved(network, ties, program)
    assert broken_by_neighbours(network, ties, sound, generator) == set()
    # Ties have no radius left. Margins that just outweigh the error terms have one: in float64 the
    # error at the image counts for the program, and twice for the program that verifies.
    counted = 3 if program is FLOAT64 else 1
    error = float((counted * sound.error + sound.error_ball).max())
    for factor in (1.01, 1.1, 2.0, 4.0):
        images = nearest_with_margin(network, pairs, factor * error)
        sound = proved(network, images, program)
        assert len(images) > 20
        assert (sound.radius > 0).all()
        assert sound.radius.median() < 2 * factor * error
        assert broken_by_neighbours(network, images, sound, generator, tries=20) == set()


def test_the_search_sees_what_it_is_made_for():
    """A flip at exactly the radius does not count, one just inside does."""
    image = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    assert not exactly_inside(image + 0.5, image, 0.5)
    assert exactly_inside(image + 0.5, image, math.nextafter(0.5, 1))
