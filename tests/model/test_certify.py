import pytest
import torch

from model.certification.feature_radii import feature_radius
from model.certify import certify
from model.errors import ModelError
from model.networks.head import pairwise_distances


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
    labels = torch.zeros(2).long()
    found = certify(logits, torch.ones(3, 3).fill_diagonal_(0), labels, lipschitz=1.0)
    assert found.radius.tolist() == [0.0, 1.0]
    assert found.margin.tolist() == [0.0, 1.0]
    assert not found.error.any()
    found = certify(logits, torch.zeros(3, 3), labels, lipschitz=1.0)
    assert found.radius.tolist() == [0.0, float("inf")]
    assert (int(found.rival[1]), float(found.margin[1])) == (2, 1.0)


def test_radius_solves_the_quadratic_also_where_it_is_hardly_one():
    generator = torch.Generator().manual_seed(0)
    m, s, c = torch.rand(3, 200, generator=generator, dtype=torch.float64).exp2().sub(1) * 3
    c[:50] *= 1e-14
    r = feature_radius(m, s, c)
    assert (r > 0).all()
    assert ((s * r + c * r**2 / 2 - m).abs() <= 1e-14 * m.clamp(min=1)).all()
    flat = feature_radius(m, s, torch.zeros_like(c))
    assert torch.equal(flat, m / s)
    assert (r <= flat * (1 + 1e-15)).all()
    assert (r[50:] < flat[50:]).all()
    assert (feature_radius(-m, s, c) < 0).all()
    zero = torch.zeros(3, dtype=torch.float64)
    margins = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    assert feature_radius(margins, zero, zero).tolist() == [torch.inf, 0.0, 0.0]
    steep = feature_radius(margins, zero, zero + 2.0)
    assert float(steep[0]) == pytest.approx(1.0)
    assert (steep[1:] <= 0).all()


def test_slopes_of_each_image_and_curvature_enter_the_certificate():
    """Class 2 of the second image: 1 = 1 r + 1 r^2 / 2."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 2.0]], dtype=torch.float64)
    slopes = torch.ones(2, 3, 3, dtype=torch.float64)
    slopes[0] *= 2
    curvature = torch.zeros(3, 3, dtype=torch.float64)
    curvature[1, 2] = 1.0
    labels = torch.tensor([0, 1])
    found = certify(logits, slopes, labels, lipschitz=1.0, curvature=curvature)
    assert found.rival.tolist() == [1, 2]
    assert found.radius.tolist() == pytest.approx([1.0, 3**0.5 - 1])
    halved = certify(logits, slopes, labels, lipschitz=2.0, curvature=curvature)
    torch.testing.assert_close(halved.radius, found.radius / 2)
    with pytest.raises(ModelError, match="curvatures must be finite"):
        certify(logits, slopes, labels, lipschitz=1.0, curvature=-curvature)
    with pytest.raises(ModelError, match=r"curvature of shape \(2, 3, 3\)"):
        certify(logits, slopes, labels, lipschitz=1.0, curvature=slopes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.tensor([[1.0, torch.nan]])}, "logits hold"),
        ({"logits": torch.tensor([[1.0, torch.inf]])}, "logits hold"),
        ({"logits": torch.zeros(1, 3)}, r"factors of shape \(2, 2\)"),
        ({"slopes": torch.full((2, 2), -1.0)}, "margin factors"),
        ({"labels": torch.tensor([2])}, r"outside of 0\.\.1"),
        ({"labels": torch.tensor([0, 1])}, r"labels of shape \(2,\)"),
        ({"lipschitz": float("nan")}, "lipschitz=nan"),
        ({"lipschitz": 0.0}, "lipschitz=0.0"),
    ],
)
def test_certify_refuses(changes, message):
    settings = {
        "logits": torch.tensor([[1.0, 0.0]]),
        "slopes": torch.ones(2, 2).fill_diagonal_(0),
        "labels": torch.tensor([0]),
        "lipschitz": 1.0,
        **changes,
    }
    with pytest.raises(ModelError, match=message):
        certify(**settings)
