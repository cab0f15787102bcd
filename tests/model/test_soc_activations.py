"""Activations and pooling of channel pairs: definitions, 1-Lipschitz, rounding."""

import math

import pytest
import torch

from model.certification.rounding import BFLOAT16, FLOAT32, FLOAT64, ErrorState
from model.networks.soc.activations import Householder, MaxMin, MaxPool, ProjectionPool

MODULES = {
    "maxmin": MaxMin,
    "maxpool": MaxPool,
    "householder": Householder,
    "projection": ProjectionPool,
}


def made(name, channels, generator):
    module = MODULES[name](channels).double()
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(0, math.pi, generator=generator)
    return module


def plane(count, generator):
    """Pairs of all directions and sizes, (count, 2, 1, 1)."""
    return torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", MODULES)
def test_one_lipschitz_and_tight(name, generator):
    """Pairs of points, near and far, across every border."""
    x, step = plane(20_000, generator), plane(20_000, generator)
    scales = 10 ** torch.linspace(-4, 1, 20_000, dtype=torch.float64)[:, None, None, None]
    y = x + scales * step
    for _ in range(3):
        module = made(name, 2, generator)
        with torch.no_grad():
            ratio = (module(x) - module(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        assert 0.999 < ratio.max() <= 1 + 1e-9


def test_householder_by_its_definition_and_as_min_max(generator):
    x = plane(500, generator)
    a, b = x[:, 0, 0, 0], x[:, 1, 0, 0]
    for angle in (0.0, 0.7, math.pi / 2, 2.5):
        module = Householder(2).double()
        with torch.no_grad():
            module.angle.fill_(angle)
            found = module(x)[:, :, 0, 0]
        stays = a * math.sin(angle / 2) - b * math.cos(angle / 2) <= 0
        reflected = torch.stack(
            [
                a * math.cos(angle) + b * math.sin(angle),
                a * math.sin(angle) - b * math.cos(angle),
            ],
            1,
        )
        expected = torch.where(stays[:, None], torch.stack([a, b], 1), reflected)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        if angle == math.pi / 2:
            ordered = torch.stack([torch.minimum(a, b), torch.maximum(a, b)], 1)
            torch.testing.assert_close(found, ordered, rtol=0, atol=1e-14)


def test_projection_is_the_signed_distance_to_the_cone(generator):
    """Against a fine sampling of the boundary of the cone."""
    x = plane(300, generator)
    v = x[:, :, 0, 0]
    along = torch.linspace(0, 6, 6001, dtype=torch.float64)
    for angle in (0.0, 0.4, 1.5, 3.0, math.pi):
        module = ProjectionPool(2).double()
        with torch.no_grad():
            module.angle.fill_(angle)
            found = module(x).flatten()
        half = angle / 2
        rays = [
            along[:, None] * torch.tensor([math.cos(half), s * math.sin(half)]).double()
            for s in (1, -1)
        ]
        distance = torch.cdist(v, torch.cat(rays)).amin(1)
        inside = torch.atan2(v[:, 1].abs(), v[:, 0]) < half
        torch.testing.assert_close(
            found, torch.where(inside, -distance, distance), rtol=0, atol=1e-3
        )


def test_angles_beyond_a_half_plane_are_that_of_the_half_plane(generator):
    x = plane(100, generator)
    wide, half = ProjectionPool(2).double(), ProjectionPool(2).double()
    with torch.no_grad():
        wide.angle.fill_(5.0)
        half.angle.fill_(math.pi)
        assert torch.equal(wide(x), half(x))


@pytest.mark.parametrize("name", ["householder", "projection"])
def test_gradients_are_finite_where_the_map_has_none(name, generator):
    module = made(name, 4, generator)
    x = torch.zeros(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.isfinite().all()
    assert module.angle.grad.isfinite().all()


@pytest.mark.parametrize("program", [FLOAT64, FLOAT32, BFLOAT16], ids=lambda p: p.name)
@pytest.mark.parametrize("name", MODULES)
def test_carried_error_covers_what_a_program_does(name, program, generator):
    stored = made(name, 6, generator).float()
    x = torch.randn(200, 6, 3, 1, generator=generator)
    x[:50, 3:] = x[:50, :3] * (1 + 1e-6)  # near the borders
    rounded = x.to(program.dtype)
    with torch.no_grad():
        computed = stored.to(program.dtype)(rounded).double()
    exact = made(name, 6, generator)
    exact.load_state_dict({k: v.double() for k, v in stored.float().state_dict().items()})
    with torch.no_grad():
        true = exact(rounded.double())
    norms = rounded.double().flatten(1).norm(dim=1) * (1 + 1e-12)
    state = ErrorState(norms, torch.zeros_like(norms), program, norms)
    stored.double().carry(state)
    assert ((computed - true).flatten(1).norm(dim=1) <= state.error).all()
    assert (true.flatten(1).norm(dim=1) <= state.norm).all()
