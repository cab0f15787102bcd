import pytest
import torch
from pydantic import ValidationError
from torch import nn

from optim.adam_update import euclidean_step, new_state
from optim.config import OptimConfig


def run_ours(config, steps, lr):
    parameter = start()
    state = new_state(parameter, config, on_manifold=False)
    trajectory = []
    for number in range(steps):
        euclidean_step(parameter, gradient(number), state, lr, config)
        trajectory.append(parameter.clone())
    return trajectory


@pytest.fixture
def double_scalars():
    """torch.optim keeps its scalars, such as NAdam's mu_product, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run_torch(make, steps):
    parameter = nn.Parameter(start())
    optimizer = make([parameter])
    trajectory = []
    for number in range(steps):
        parameter.grad = gradient(number)
        optimizer.step()
        trajectory.append(parameter.detach().clone())
    return trajectory


def start():
    return torch.linspace(-1, 1, 37, dtype=torch.float64)


def gradient(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(37, generator=generator, dtype=torch.float64)


@pytest.mark.usefixtures("double_scalars")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", ["nadam", "adamw"])
def test_equals_torch(rule, weight_decay):
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    if rule == "nadam":
        settings["decoupled_weight_decay"] = True
    kind = torch.optim.NAdam if rule == "nadam" else torch.optim.AdamW
    config = OptimConfig(
        betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, euclidean=rule, lookahead_steps=0
    )
    theirs = run_torch(lambda parameters: kind(parameters, **settings), 30)
    for a, b in zip(run_ours(config, 30, 0.02), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_lookahead_is_the_textbook_one():
    """K fast steps from the slow weights, then slow += factor (fast - slow), fast = slow."""
    config = OptimConfig(lookahead_steps=3, lookahead_factor=0.3)
    plain = run_ours(OptimConfig(lookahead_steps=0), 3, 0.1)
    ours = run_ours(config, 3, 0.1)
    assert torch.equal(ours[1], plain[1])
    expected = start() + 0.3 * (plain[2] - start())
    torch.testing.assert_close(ours[2], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("lookahead_steps", -1),
        ("lookahead_factor", 1.5),
        ("polar_every", 0.5),
        ("euclidean", "sgd"),
        ("unknown", 1),
    ],
)
def test_config_refuses_and_names_the_field(field, value):
    with pytest.raises(ValidationError, match=field):
        OptimConfig(**{field: value})
