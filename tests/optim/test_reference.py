import copy

import pytest
import torch

from optim.config import OptimConfig
from optim.errors import OptimizerError
from optim.manifolds import ORTHOGONAL
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from tests.optim.emulation import Problem, gradient, run_reference

PROBLEM = Problem((6, 9), lookahead_steps=4, polar_every=0)


def make(problem=PROBLEM):
    named = problem.parameters()
    config = problem.config
    return named, ReferenceManifoldAdam(parameter_groups(named.items(), config), config)


def advance(named, optimizer, first, last):
    for number in range(first, last):
        for name, parameter in named.items():
            parameter.grad = gradient(name, number, tuple(parameter.shape), parameter.dtype)
        optimizer.step()


def test_first_step_rotates_every_plane_by_the_learning_rate():
    """At step 1 Adam's direction is the sign of the tangent, so D_ij = -lr sign(A_ij)."""
    named, optimizer = make(Problem((6,), lr=0.01, lookahead_steps=0, polar_every=0))
    X0 = named["matrix0"].detach().clone()
    G = gradient("matrix0", 0, (6, 6), torch.float64)
    advance(named, optimizer, 0, 1)
    D = -0.01 * torch.sign(X0.T @ G - G.T @ X0)
    expected = X0 @ torch.linalg.matrix_exp(D)
    assert (named["matrix0"] - expected).abs().max() < 2e-5  # order 3 and eps


def test_it_minimises_on_the_manifold():
    """Procrustes: the nearest rotation to a target rotation is the target."""
    problem = Problem((8,), lr=0.05)
    named, optimizer = make(problem)
    X = named["matrix0"]
    generator = torch.Generator().manual_seed(3)
    tangent = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    target = X.detach() @ torch.linalg.matrix_exp((tangent - tangent.T) / 4)
    for number in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - number / 400)
        optimizer.zero_grad()
        (X - target).square().sum().backward()
        optimizer.step()
    assert (X - target).abs().max() < 1e-3
    assert ORTHOGONAL.residual(X.detach()) < 1e-5


def test_averaged_is_what_the_synchronisation_would_give():
    """Before the sync of step 4: averaged after 3 steps with factor f; at the sync: slow itself."""
    named, optimizer = make()
    advance(named, optimizer, 0, 3)
    X = named["matrix0"]
    state = optimizer.state[X]
    before = {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}
    averaged = optimizer.averaged(X)
    assert all(torch.equal(state[k], v) for k, v in before.items())
    expected = ORTHOGONAL.retract(state["slow"], 0.5 * state["tangent_sum"])
    assert (averaged - ORTHOGONAL.project(expected)).abs().max() < 1e-14
    assert (averaged - X).abs().max() > 1e-3
    bias = named["bias"]
    midpoint = (optimizer.state[bias]["slow"] + bias.detach()) / 2
    assert (optimizer.averaged(bias) - midpoint).abs().max() < 1e-15

    advance(named, optimizer, 3, 4)
    assert torch.equal(optimizer.state[X]["slow"], X.detach())
    assert not optimizer.state[X]["tangent_sum"].any()
    polar = ORTHOGONAL.project(X.detach(), dtype=torch.float64)
    assert torch.equal(optimizer.averaged(X), polar)
    assert torch.equal(optimizer.averaged(bias), bias.detach())


def test_averaged_before_the_first_step_is_the_initial_value():
    named, optimizer = make()
    assert (optimizer.averaged(named["matrix0"]) - named["matrix0"]).abs().max() < 1e-14
    assert torch.equal(optimizer.averaged(named["head"]), named["head"].detach())


def test_slow_starts_from_the_initial_value():
    """A synchronisation at step 1 goes half of the first increment, from X_0."""
    named, optimizer = make(Problem((5,), lookahead_steps=1, polar_every=0))
    X0 = named["matrix0"].detach().clone()
    advance(named, optimizer, 0, 1)
    state = optimizer.state[named["matrix0"]]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    D = -0.02 * (m / (1 - 0.9)) / ((v / (1 - 0.999)).sqrt() + 1e-6)
    expected = ORTHOGONAL.retract(X0, 0.5 * D)
    assert (named["matrix0"] - expected).abs().max() < 1e-14


def test_polar_retraction_touches_fast_and_slow():
    problem = Problem((9,), lr=0.1, lookahead_steps=7, polar_every=5, steps=5)
    named, optimizer = run_reference(problem)
    X = named["matrix0"]
    assert ORTHOGONAL.residual(X.detach()) < 1e-14
    assert ORTHOGONAL.residual(optimizer.state[X]["slow"]) < 1e-14


def test_state_dict_round_trip_continues_bitwise():
    named, optimizer = make()
    advance(named, optimizer, 0, 6)
    copies, restored = make()
    for name, parameter in copies.items():
        parameter.data.copy_(named[name].data)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(named, optimizer, 6, 12)
    advance(copies, restored, 6, 12)
    assert all(torch.equal(named[name], copies[name]) for name in named)


def test_refuses_low_precision():
    named = Problem((3,)).parameters()
    named["matrix0"].data = named["matrix0"].data.bfloat16()
    config = OptimConfig()
    with pytest.raises(OptimizerError, match=r"needs float32 or float64, got torch\.bfloat16"):
        ReferenceManifoldAdam(parameter_groups(named.items(), config), config)
