import pytest
import torch

from model.attack import attack_l2
from model.certificates import STANDARD_EPS, certified_radius, certify, cra
from model.errors import ModelError
from model.head import pairwise_distances
from tests.model.small_networks import tiny_config, trained_like


def test_radius_of_a_linear_classifier_is_the_distance_to_its_boundary(generator):
    w = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    logits = x @ w.T
    c = certify(logits, pairwise_distances(w), logits.argmax(1), lipschitz=1.0)
    for i in range(20):
        own = int(logits[i].argmax())
        distances = {
            j: float((logits[i, own] - logits[i, j]) / (w[own] - w[j]).norm())
            for j in range(4)
            if j != own
        }
        rival = min(distances, key=distances.__getitem__)
        assert float(c.radius[i]) == pytest.approx(distances[rival], rel=1e-12)
        assert int(c.rival[i]) == rival
        assert float(c.margin[i]) == pytest.approx(float(logits[i, own] - logits[i, rival]))
        # Moving that far along the normal reaches the boundary.
        normal = (w[rival] - w[own]) / (w[rival] - w[own]).norm()
        moved = (x[i] + c.radius[i] * normal) @ w.T
        assert float(moved[own] - moved[rival]) == pytest.approx(0, abs=1e-12)
    halved = certify(logits, pairwise_distances(w), logits.argmax(1), lipschitz=2.0)
    torch.testing.assert_close(halved.radius, c.radius / 2)


def test_the_limiting_rival_need_not_be_the_runner_up():
    logits = torch.tensor([[2.0, 1.9, 1.0]])
    factors = torch.tensor([[0.0, 0.1, 2.0], [0.1, 0.0, 1.0], [2.0, 1.0, 0.0]])
    c = certify(logits, factors, torch.tensor([1]), lipschitz=1.0)
    assert (int(c.prediction), bool(c.correct), int(c.rival)) == (0, False, 2)
    assert float(c.radius) == pytest.approx(0.5)
    assert float(c.margin) == pytest.approx(1.0)


def test_ties_and_identical_rows():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    factors = torch.ones(3, 3).fill_diagonal_(0)
    radius, _, _, margin = certified_radius(logits, factors, lipschitz=1.0)
    assert radius.tolist() == [0.0, 1.0]
    assert margin.tolist() == [0.0, 1.0]
    radius, _, rival, margin = certified_radius(logits, torch.zeros(3, 3), lipschitz=1.0)
    assert radius.tolist() == [0.0, float("inf")]
    assert (int(rival[1]), float(margin[1])) == (2, 1.0)


def test_cra_is_strict_and_needs_correctness():
    radius = torch.tensor([0.5, 0.6, 0.9, 0.0])
    correct = torch.tensor([True, True, False, True])
    assert cra(radius, correct, 0.5) == 0.25
    assert cra(radius, correct, 0.0) == 0.5
    assert STANDARD_EPS["36_255"] == 36 / 255
    assert STANDARD_EPS["255_255"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.tensor([[1.0, torch.nan]])}, "logits hold"),
        ({"logits": torch.tensor([[1.0, torch.inf]])}, "logits hold"),
        ({"logits": torch.zeros(1, 3)}, r"factors of shape \(2, 2\)"),
        ({"factors": torch.full((2, 2), -1.0)}, "margin factors"),
        ({"labels": torch.tensor([2])}, r"outside of 0\.\.1"),
        ({"labels": torch.tensor([0, 1])}, r"labels of shape \(2,\)"),
        ({"lipschitz": float("nan")}, "lipschitz=nan"),
        ({"lipschitz": 0.0}, "lipschitz=0.0"),
    ],
)
def test_certify_refuses(changes, message):
    settings = {
        "logits": torch.tensor([[1.0, 0.0]]),
        "factors": torch.ones(2, 2).fill_diagonal_(0),
        "labels": torch.tensor([0]),
        "lipschitz": 1.0,
        **changes,
    }
    with pytest.raises(ModelError, match=message):
        certify(**settings)


def test_cra_refuses_nothing_and_nonsense():
    with pytest.raises(ModelError, match="positive number of samples"):
        cra(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0.1)
    with pytest.raises(ModelError, match="eps=-1"):
        cra(torch.zeros(1), torch.zeros(1, dtype=torch.bool), -1.0)


def test_attack_reaches_the_boundary_of_a_linear_classifier_and_not_less(generator):
    w = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2, bias=False).double())
    with torch.no_grad():
        linear[1].weight.copy_(w)
    images = torch.randn(20, 1, 4, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        c = certify(linear(images), pairwise_distances(w), torch.zeros(20).long(), lipschitz=1.0)
    for factor, succeeds in ((0.999, False), (1.01, True)):
        eps = c.radius * factor
        found = attack_l2(linear, images, c.prediction, eps, steps=30, generator=generator)
        assert ((found - images).flatten(1).norm(dim=1) <= eps * (1 + 1e-12)).all()
        moved = linear(found).argmax(1) != c.prediction
        assert bool(moved.all()) if succeeds else not bool(moved.any())


def test_clipped_attack_stays_in_the_pixel_range_and_the_ball(generator):
    network = trained_like(tiny_config())
    images = torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.linspace(0, 2, 8, dtype=torch.float64)
    classes = network(images).argmax(1)
    found = attack_l2(network, images, classes, eps, steps=5, clip=True, generator=generator)
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found - images).flatten(1).norm(dim=1) <= eps + 1e-12).all()


def test_attack_refuses_a_wrong_eps():
    with pytest.raises(ModelError, match="one radius per image"):
        attack_l2(torch.nn.Flatten(), torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.ones(1))
