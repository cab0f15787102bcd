import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from pipeline.losses.certificate_regularization import certificate_loss
from pipeline.losses.emma import EmmaLoss, emma_loss
from pipeline.losses.hinge import MixtureLoss, ce_hinge_loss, mixture_loss
from pipeline.losses.logit_annealing import logit_annealing_loss
from pipeline.losses.offset import offset_loss
from pipeline.training.schedules import learning_rate_factor, triangular_factor

ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
FACTORS = torch.cdist(ROWS, ROWS)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((2.0, 1.9, -1.0), 0.758624),
        ((2.0, 2.5, -1.0), 1.028103),
        ((2.0, -1.0, -1.0), 0.212130),
    ],
)
def test_emma_equals_published_values(logits, expected):
    y = torch.tensor([logits], dtype=torch.float64)
    loss = emma_loss(y, FACTORS[:1], torch.tensor([0]), eps=0.5, scale=1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradient_does_not_pass_through_the_shift():
    """A rival at a tie: d loss / d r of the tie is the softmax weight, not zero."""
    y = torch.tensor([[2.0, 1.9, -1.0]], dtype=torch.float64, requires_grad=True)
    emma_loss(y, FACTORS[:1], torch.tensor([0]), eps=0.5, scale=1.0).backward()
    weights = torch.softmax(torch.tensor([0.0, 0.0, -2.0], dtype=torch.float64), 0)
    assert torch.allclose(y.grad[0, 1:], weights[1:])


def test_scale_multiplies_the_margins():
    y = torch.tensor([[2.0, -1.0, -1.0]], dtype=torch.float64)
    label = torch.tensor([0])
    shifted = torch.tensor([[0.0, -2.292893, -2.0]], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(7 * shifted, label)
    assert emma_loss(y, FACTORS[label], label, 0.5, 7.0).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


def test_emma_of_several_radii_is_the_mean_of_those_of_each():
    y = torch.tensor([[2.0, 1.9, -1.0], [0.5, 1.5, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    arguments = (y, FACTORS[labels], labels)
    one, several = EmmaLoss(scale=3.0), EmmaLoss(scale=3.0, radii=(0.5, 1, 4))
    each = [emma_loss(*arguments, 0.2 * radius, 3.0).item() for radius in (0.5, 1, 4)]
    assert several.mean(*arguments, eps=0.2, progress=0).item() == pytest.approx(sum(each) / 3)
    assert one.mean(*arguments, eps=0.2, progress=0).item() == each[1]


@pytest.mark.parametrize("radii", [(), (1, 0), (-1,), (math.nan,), (math.inf,)])
def test_radii_that_are_none_are_refused(radii):
    with pytest.raises(ValidationError, match="radii"):
        EmmaLoss(radii=radii)


def test_learning_rate_warms_up_then_falls_to_the_floor():
    factors = [learning_rate_factor(s, total=100, warmup=10, floor=1e-3) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[99] == pytest.approx(1e-3)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate_factor(0, total=10, warmup=0, floor=0.0) == 1.0


def test_radius_grows_over_the_ramp_and_stays():
    def radius(step, ramp):
        loss = EmmaLoss(eps=0.1, eps_start=0.1, eps_end=3.0, eps_ramp=ramp)
        return loss.training_radius(step, total=100)

    assert radius(0, 0.5) == pytest.approx(0.01)
    assert radius(25, 0.5) == pytest.approx(0.1 * (0.1 + 2.9 * 0.5))
    assert radius(50, 0.5) == radius(99, 0.5) == pytest.approx(0.3)
    assert radius(0, 0.0) == pytest.approx(0.3)


def test_offset_loss_lowers_the_logit_of_the_label():
    y = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    t = torch.tensor([0, 1])
    # Margins 1 and 3, lowered by 1: mean of log(1 + e^(-4 * 0)) and log(1 + e^(-4 * 2)), over 4.
    expected = (math.log(2) + math.log1p(math.exp(-8))) / 8
    assert float(offset_loss(y, t, 1.0, 4.0)) == pytest.approx(expected, rel=1e-6)


def test_triangular_schedule_passes_its_corners():
    factors = [triangular_factor(s, total=1000) for s in range(1000)]
    assert factors[0] == pytest.approx(0.5 / 400)
    assert factors[399] == pytest.approx(1, abs=2e-3)
    assert factors[800] == pytest.approx(1 / 20, abs=2e-3)
    assert 0 < factors[-1] < 1e-3
    assert max(abs(a - b) for a, b in itertools.pairwise(factors)) <= 1 / 400 + 1e-12


def test_certificate_regularisation_rewards_the_radius_of_correct_samples():
    """Radii min(0.1 / sqrt(2), 3 / 2) and, for the wrong prediction, nothing."""
    y = torch.tensor([[2.0, 1.9, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0])
    plain = torch.nn.functional.cross_entropy(3 * y, labels)
    loss = certificate_loss(y, FACTORS[labels], labels, 3.0, 0.5)
    assert loss.item() == pytest.approx(plain.item() - 0.5 * (0.1 / 2**0.5) / 2, abs=1e-12)
    gradient = torch.autograd.grad(loss - plain, y)[0]
    expected = torch.tensor([[-0.25 / 2**0.5, 0.25 / 2**0.5, 0.0], [0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [((2.0, 1.9, -1.0), 1.531213), ((2.0, 2.5, -1.0), 2.163056), ((2.0, -1.0, -1.0), 0.071219)],
)
def test_logit_annealing_equals_published_values(logits, expected):
    y = torch.tensor([logits], dtype=torch.float64)
    loss = logit_annealing_loss(
        y, FACTORS[:1], torch.tensor([0]), 0.5, 1.0, offset=2.0, temperature=0.75, exponent=5.0
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_mixture_counts_what_is_not_certified_and_adds_a_cross_entropy():
    """Margins 2 and 0.5 at eps d = 1: certified, and half way; then far on the wrong side."""
    y = torch.tensor([[2.0, 0.0, 0.0], [0.5, 0.0, -9.0], [-5.0, 0.0, 0.0]], dtype=torch.float64)
    d = torch.tensor([[0.0, 2.0, 2.0]] * 3, dtype=torch.float64)
    t = torch.zeros(3, dtype=torch.int64)
    hinge = (0 + 0.5 + 1) / 3
    assert mixture_loss(y, d, t, 0.5, 3.0, 0.0).item() == pytest.approx(hinge)
    entropy = torch.nn.functional.cross_entropy(3 * y, t).item()
    assert mixture_loss(y, d, t, 0.5, 3.0, 0.1).item() == pytest.approx(hinge + 0.1 * entropy)
    # Logits and rates in another unit: the hinge does not change.
    assert mixture_loss(7 * y, 7 * d, t, 0.5, 3.0, 0.0).item() == pytest.approx(hinge)


def test_ce_hinge_raises_the_worst_margins_of_correct_samples():
    """Margins at eps: 2 (enough), 0.25 (0.75 missing), -1 (2 missing); a wrong one counts not."""
    y = torch.tensor([[3.0, 0.0, 0.0], [1.25, 0.0, -9], [1.0, 0.0, 0.0], [-5, 0.0, 0.0]]).double()
    y.requires_grad_()
    d = torch.tensor([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [0.0, 1.0, 4.0], [0.0, 2.0, 2.0]]).double()
    t = torch.zeros(4, dtype=torch.int64)
    loss = ce_hinge_loss(y, d, t, 0.5, 3.0, 0.0)
    assert loss.item() == pytest.approx((0 + 0.75 + 2 + 0) / 4)
    (gradient,) = torch.autograd.grad(loss, y)
    expected = torch.zeros(4, 3).double()
    expected[1, :2] = expected[2, ::2] = torch.tensor([-0.25, 0.25])
    torch.testing.assert_close(gradient, expected)
    entropy = torch.nn.functional.cross_entropy(3 * y, t).item()
    assert ce_hinge_loss(y, d, t, 0.5, 3.0, 0.1).item() == pytest.approx(
        loss.item() + 0.1 * entropy
    )


def test_weight_of_the_cross_entropy_holds_before_and_after_its_decay():
    loss = MixtureLoss(ce_start=1.0, ce_end=0.01, ce_from=0.2, ce_to=0.6)
    found = [loss.ce_weight(p) for p in (0.0, 0.2, 0.6, 0.9)]
    assert found == pytest.approx([1, 1, 0.01, 0.01])
    assert loss.ce_weight(0.4) == pytest.approx(0.1)
