"""The network is what it claims to be: 1-Lipschitz, gradient preserving, with a proved bound."""

import math

import pytest
import torch

from model.errors import ModelError
from model.networks.lipnext.layers import l2_pool
from tests.model.small_networks import tiny_config, trained_like

EYE_16 = torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)


def jacobian(function, image):
    return torch.autograd.functional.jacobian(function, image).reshape(-1, image.numel())


@pytest.mark.parametrize("initial", ["haar", "identity_m"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_preserve_every_gradient_norm(generator, initial, seed):
    network = trained_like(tiny_config(depth=3, initial=initial), seed)
    image = torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(jacobian(network.tokens, image))
    assert values.max() <= 1 + 1e-12
    assert values.min() >= 1 - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_features_and_logit_differences_have_the_stated_constants(generator, seed):
    network = trained_like(tiny_config(), seed)
    image = torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    J = jacobian(lambda x: l2_pool(network.tokens(x), network.pool_tau), image)
    assert torch.linalg.svdvals(J).max() <= 1 + 1e-12
    K = jacobian(network, image)
    _, factors = network.logits_and_margin_factors(image)
    assert ((K[:, None] - K[None]).norm(dim=-1) <= factors + 1e-12).all()


def test_random_pairs_stay_within_the_margin_factors(generator):
    network = trained_like(tiny_config())
    x = torch.rand(200, 1, 4, 4, generator=generator, dtype=torch.float64)
    step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y = x + step * torch.logspace(-6, 1, 200, dtype=torch.float64).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        (a, factors), b = network.logits_and_margin_factors(x), network(y)
    change = (a - b)[:, :, None] - (a - b)[:, None, :]
    distance = (x - y).flatten(1).norm(dim=1)[:, None, None]
    assert (change.abs() <= factors * distance * (1 + 1e-12) + 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_weights_stay_within_the_bound(generator, dtype):
    network = trained_like(tiny_config(depth=6, beta=0.0)).to(dtype).double()
    bound = network.lipschitz_upper_bound().value
    unit = torch.linalg.svdvals(jacobian(network.tokens, EYE_16[:1]))
    assert 1 < float(unit.max()) <= bound
    assert bound < 1 + (1e-5 if dtype == torch.float32 else 1.0)


def test_bound_is_the_product_of_its_parts():
    network = trained_like(tiny_config())
    with torch.no_grad():
        network.blocks[0].R.mul_(1.001)
        network.blocks[1].M.mul_(1.003)
    bound = network.lipschitz_upper_bound()
    assert list(bound.parts) == ["stem", "blocks.0", "blocks.1"]
    assert bound.value == pytest.approx(math.prod(bound.parts.values()), rel=1e-14)
    assert 1.001**2 <= bound.parts["blocks.0"] <= 1.001**2 * 1.002
    assert 1.003 <= bound.parts["blocks.1"] <= 1.003 * 1.002


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bound_refuses_weights_that_are_not_finite(bad):
    network = trained_like(tiny_config())
    with torch.no_grad():
        network.blocks[1].M[2, 3] = bad
    with pytest.raises(ModelError, match=r"blocks\.1\.M .*not finite"):
        network.lipschitz_upper_bound()
