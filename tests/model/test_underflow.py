"""Networks that shrink and grow: what vanishes in float64 must not be certified."""

from dataclasses import asdict

import pytest
import torch

from model.certification.rounding import FLOAT32, FLOAT64
from model.certify import ProvedCertifier, image_norms
from model.errors import ModelError
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network
from model.verifier.families.lipnext import LipNeXt
from model.verifier.mathematics.matrix_bounds import bounds_of_matrix

UP, DOWN = 2.0**126, 2.0**-126


def config_of(depth):
    return LipNeXtConfig(
        input_shape=(1, 1, 1), num_classes=2, patch=1, width=4, depth=depth,
        alpha=0.25, position=False, head="linear",
    )  # fmt: skip


def scaled_identities(stem, exponents):
    """One pixel, multiples of the identity, and a head that sees channel 0."""
    network = build_network(config_of(len(exponents)))
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        network.stem.weight.copy_(stem * torch.eye(4))
        for block, factor in zip(network.blocks, exponents, strict=True):
            block.R.copy_(torch.eye(4))
            block.M.copy_(factor * torch.eye(4))
        network.blocks[-1].b[0] = 1.0
        network.head.weight[0, 0] = 1.0
        network.head.bias[0] = -1.2
    return network


def derived_bound(network):
    """The same constant by the verifier."""
    tensors = {name: p.detach().numpy() for name, p in network.named_parameters()}
    bounds = {name: bounds_of_matrix(tensors[name]) for name in network.bounded_matrices}
    return LipNeXt(asdict(config_of(len(network.blocks))), tensors, bounds).bound


@pytest.mark.parametrize(
    "factors",
    [
        [DOWN] * 9 + [UP] * 10,  # the signal is lost in float64, the product of the norms is 1
        [DOWN] * 7 + [2.0**-66] + [UP] * 8 + [2.0**66],
    ],
)
def test_a_constant_that_passes_through_subnormal_numbers_is_refused(factors):
    network = scaled_identities(DOWN, factors)
    assert network.lipschitz_upper_bound().value == float("inf")
    assert derived_bound(network) == float("inf")
    certifier = ProvedCertifier(network, FLOAT64, network.matrix_bounds())
    with pytest.raises(ModelError, match="lipschitz=inf"):
        certifier.certify(torch.tensor([[0.0, 1.0]]), torch.ones(1), torch.zeros(1).long())


@pytest.mark.parametrize(
    "factors",
    [
        [DOWN, DOWN, UP, UP],  # fits float64, not float32
        [UP, UP, DOWN, DOWN],
    ],
)
def test_a_program_that_loses_the_signal_certifies_nothing(factors):
    network = scaled_identities(1.0, factors)
    pixels = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    logits = torch.tensor([[0.3, 0.0]], dtype=torch.float64)  # of the real function
    norms, label = image_norms(pixels), torch.zeros(1).long()
    matrices = network.matrix_bounds()
    assert network.lipschitz_upper_bound(matrices).value == pytest.approx(
        1, rel=0.03
    )  # 64th roots of 4
    sound = ProvedCertifier(network, FLOAT64, matrices).certify(logits, norms, label)
    assert float(sound.radius) == pytest.approx(0.3, rel=0.03)
    deployed = ProvedCertifier(network, FLOAT32, matrices).certify(logits, norms, label)
    assert float(deployed.radius) == 0.0
    assert float(deployed.error) == float("inf")
