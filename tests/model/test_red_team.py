"""Attempts to obtain a radius that is too large: each lowers it or is refused."""

import pytest
import torch

from model.certification.rounding import FLOAT64
from model.certify import ProvedCertifier, certify, image_norms
from model.empirical_lipschitz import observed_lipschitz, refute
from model.errors import ModelError
from model.networks.base import LipschitzBound
from model.networks.lipnext.network import LipNeXt
from model.networks.registry import build_network
from tests.model.small_networks import tiny_config, trained_like

CONFIG = tiny_config(width=32, depth=3, num_classes=5)


def network_with_margins(config=CONFIG, cls=None):
    """Float32 network without biases: its features reach the Lipschitz constant."""
    network = (build_network(config) if cls is None else cls(config)).double().eval()
    network.initialise(0)
    return network.float()


@pytest.fixture
def pixels(generator):
    return torch.randint(0, 256, (24, *CONFIG.input_shape), generator=generator).to(torch.uint8)


@torch.no_grad()
def radii(network, pixels, matrices=None):
    double = type(network)(CONFIG).double()
    double.load_state_dict(network.state_dict())
    known = network.matrix_bounds() if matrices is None else matrices
    certifier = ProvedCertifier(network, FLOAT64, known)
    logits = double(pixels.double() / 255)
    return certifier.certify(logits, image_norms(pixels), torch.zeros(len(pixels)).long())


def seen(network, pixels):
    double = type(network)(CONFIG).double()
    double.load_state_dict(network.state_dict())
    return observed_lipschitz(double, pixels.double() / 255)


def test_the_sound_radius_is_below_the_nominal_one_and_close(pixels):
    network = network_with_margins()
    with torch.no_grad():
        logits, factors = network.logits_and_margin_factors(pixels.float() / 255)
        nominal = certify(
            logits,
            factors,
            torch.zeros(len(pixels)).long(),
            lipschitz=1.0,
        )
    sound = radii(network, pixels)
    assert (sound.prediction == nominal.prediction).all()
    assert (sound.radius > 0).all()
    assert (sound.radius < nominal.radius.double() + 1e-5).all()
    assert (sound.radius > nominal.radius.double() * (1 - 1e-5) - 1e-5).all()
    assert ((sound.error > 0) & (sound.error_ball > sound.error)).all()


@pytest.mark.parametrize("name", ["stem.weight", "blocks.1.R", "blocks.2.M"])
def test_one_scaled_matrix_lowers_every_radius_by_its_norm(pixels, name):
    """The rate of the radius is that of the bound; the logits of the scaled network count."""
    network = network_with_margins()
    before = network.lipschitz_upper_bound().value
    with torch.no_grad():
        network.get_parameter(name).mul_(1 + 1e-3)
    after = network.lipschitz_upper_bound().value
    power = 2 if name.endswith("R") else 1
    assert (1 + 1e-3) ** power * (1 - 1e-5) < after / before < (1 + 1e-3) ** power * (1 + 1e-3)
    found = radii(network, pixels)
    naive = certify(
        network(pixels.float() / 255).detach(),
        network.margin_factor_bounds().float(),
        torch.zeros(len(pixels)).long(),
        lipschitz=1.0,
    )
    assert (found.radius <= naive.radius.double() / (1 + 0.9e-3) ** power).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_pay_for_their_norms(pixels, dtype):
    network = network_with_margins().to(dtype).float()
    exact = 1.0
    for name in network.bounded_matrices:
        sigma = float(torch.linalg.matrix_norm(network.get_parameter(name).detach().double(), 2))
        exact *= sigma ** (2 if name.endswith("R") else 1)
    bound = network.lipschitz_upper_bound().value
    assert exact * (1 - 1e-12) <= bound
    assert bound > 1 + (1e-2 if dtype == torch.bfloat16 else 1e-3)
    sound = radii(network, pixels)
    free = ProvedCertifier(network_with_margins(), FLOAT64, network_with_margins().matrix_bounds())
    assert (
        sound.radius.mean()
        < free.lipschitz / bound * 1.05 * radii(network_with_margins(), pixels).radius.mean()
    )


def test_a_matrix_that_is_not_orthogonal_enters_with_its_whole_norm(pixels, generator):
    network = network_with_margins()
    with torch.no_grad():
        network.blocks[1].M.add_(0.05 * torch.randn(32, 32, generator=generator))
    sigma = float(torch.linalg.matrix_norm(network.blocks[1].M.detach().double(), 2))
    assert sigma > 1.2
    assert network.lipschitz_upper_bound().value >= sigma
    assert seen(network, pixels) <= network.lipschitz_upper_bound().value


class Lying(LipNeXt):
    """Claims half of its constant."""

    def lipschitz_upper_bound(self, matrices=None):
        honest = super().lipschitz_upper_bound(matrices)
        return LipschitzBound(honest.value / 2, honest.parts)


class WrongPool(LipNeXt):
    """The factor of its pool is missing from the bound."""

    def features(self, images):
        return 1.001 * super().features(images)


class Normalised(LipNeXt):
    """Divides pixels by a standard deviation that the bound forgets."""

    def features(self, images):
        return super().features((images - 0.5) / 0.25 + 0.5)


@pytest.mark.parametrize("cls", [Lying, WrongPool, Normalised])
def test_a_wrong_bound_is_refuted_by_a_derivative(pixels, cls):
    network = network_with_margins(cls=cls)
    with pytest.raises(ModelError, match="nothing can be certified"):
        refute(network.lipschitz_upper_bound(), seen(network, pixels))


def test_an_honest_bound_is_not_refuted_and_nearly_reached(pixels):
    network = network_with_margins()
    bound, observed = network.lipschitz_upper_bound(), seen(network, pixels)
    refute(bound, observed)
    assert bound.value * (1 - 1e-5) < observed


def test_an_observation_that_is_not_a_number_refutes():
    with pytest.raises(ModelError, match="nothing can be certified"):
        refute(LipschitzBound(1.0, {}), float("nan"))


def test_every_rival_counts_not_the_strongest_few(generator):
    """The limiting rival may be any class, also the one with the smallest logit."""
    network = trained_like(tiny_config(num_classes=12)).float()
    with torch.no_grad():
        network.head.weight[3] = -network.head.weight[0]
    certifier = ProvedCertifier(network, FLOAT64, network.matrix_bounds())
    logits = torch.full((1, 12), 1.0, dtype=torch.float64)
    logits[0, 0], logits[0, 3] = 3.0, 0.9
    found = certifier.certify(logits, torch.ones(1), torch.zeros(1).long())
    rates = certifier.factors[0] * certifier.lipschitz
    margins = logits[0, 0] - logits[0]
    expected = (margins / rates)[1:].min()
    assert float(found.radius) == pytest.approx(float(expected), rel=1e-6)
    assert float(found.radius) < float(expected)
    assert int(found.rival) == 1 + int((margins / rates)[1:].argmin())


def test_a_head_row_that_cannot_be_normalised_is_refused():
    network = trained_like(tiny_config()).float()
    with torch.no_grad():
        network.head.weight[1].mul_(1e-9)
    with pytest.raises(ModelError, match=r"row 1 of the head has norm .*cannot be normalised"):
        network.margin_factor_bounds()


def test_factors_are_above_the_exact_ones_also_for_nearly_equal_rows(generator):
    network = trained_like(tiny_config(num_classes=4)).float()
    with torch.no_grad():
        network.head.weight[1] = network.head.weight[0] * (1 + 2.0**-20)
        network.head.weight[2] = network.head.weight[0] * (1 + 2.0**-23)
    bounds = network.margin_factor_bounds()
    rows = network.head.weight.detach().double().numpy().astype("longdouble")
    rows = rows / ((rows**2).sum(1, keepdims=True)) ** 0.5
    exact = (((rows[:, None] - rows[None]) ** 2).sum(-1)) ** 0.5
    assert (bounds.numpy() >= exact).all()
    assert float(bounds[0, 1]) > 0
