"""The head with one hidden layer: slopes, curvature, radii against brute force."""

import pytest
import torch

from model.certification.feature_radii import feature_radius
from model.certification.rounding import FLOAT32, FLOAT64, ErrorState
from model.certify import ProvedCertifier
from model.errors import ModelError
from model.networks.registry import build_network
from model.networks.soc.mlp_head import MLPHead, weighted_norm
from model.networks.soc.network import SocConfig
from tests.model.small_networks import trained_like


def made(features=2, hidden=12, classes=4, *, seed=0, size=2.0):
    head = MLPHead(features, hidden, classes).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(std=size / p.shape[-1] ** 0.5, generator=generator)
    return head


def hessian(head, h, i, j):
    return torch.autograd.functional.hessian(
        lambda x: (lambda y: y[0, i] - y[0, j])(head(x[None])[0]), h
    )


def test_slopes_and_curvature_are_those_of_autograd(generator):
    head = made(features=5, hidden=9)
    curvature = head.curvature_bounds()
    points = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 2
    _, slopes = head.slopes(points)
    for h, slope in zip(points, slopes, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: head(x[None])[0][0], h)
        torch.testing.assert_close(slope, torch.cdist(jacobian, jacobian), rtol=1e-9, atol=1e-12)
        for i in range(4):
            for j in range(4):
                least = torch.linalg.eigvalsh(hessian(head, h, i, j))[0]
                assert float(least) >= -float(curvature[i, j])
    assert not curvature.diagonal().any()
    assert (head.factor_bounds() >= slopes.amax(0)).all()


def test_the_three_curvature_bounds_are_ordered_and_the_smallest_is_taken(monkeypatch):
    head = made(features=6, hidden=20, classes=3)
    fine = head.curvature_bounds()
    monkeypatch.setattr("model.networks.soc.mlp_head._PAIRWISE_WORK", 0)
    coarse = head.curvature_bounds()
    assert (fine <= coarse).all()
    assert (fine < coarse).any()
    inner, outer = head.inner.detach(), head.outer.detach()
    for i in range(3):
        for j in range(3):
            weights = (outer[j] - outer[i]).clamp(min=0)
            exact = torch.linalg.matrix_norm(inner.mT @ (weights[:, None] * inner), 2) / 4
            assert float(exact) <= float(fine[i, j]) <= 1.1 * float(exact)
            fast = torch.linalg.matrix_norm(inner, 2) ** 2 * weights.max() / 4
            assert float(coarse[i, j]) <= 1.1 * float(fast)
    assert float(weighted_norm(inner, torch.zeros(20).double())) == 0


def distances_to_the_borders(head, h, i):
    """Smallest distances at which the margins over each class are 0, on a polar grid (2 features).

    A point of the grid where a margin is negative is no nearer than the border.
    """
    angle = torch.linspace(0, 2 * torch.pi, 121, dtype=torch.float64)[:-1]
    radius = torch.linspace(0, 10, 501, dtype=torch.float64)
    points = radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], 1) + h
    with torch.no_grad():
        logits, _ = head(points.flatten(0, 1))
    crossed = (logits[:, i : i + 1] <= logits).view(len(radius), len(angle), -1).any(1)
    return torch.where(crossed, radius[:, None], torch.inf).amin(0)


def test_radii_never_exceed_the_true_distance_and_come_near_to_it(generator):
    shares = []
    for seed in range(4):
        head = made(seed=seed)
        points = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            logits, slopes = head.slopes(points)
        curvature = head.curvature_bounds()
        for row, h in enumerate(points):
            i = int(logits[row].argmax())
            found = feature_radius(logits[row, i] - logits[row], slopes[row, i], curvature[i])
            true = distances_to_the_borders(head, h, i)
            others = torch.arange(4) != i
            assert (found <= true)[others].all()
            shares += (found / true)[others & true.isfinite()].tolist()
    assert 0.5 < sum(shares) / len(shares) < 1


def test_rates_bound_the_fall_of_the_margin_within_the_radius(generator):
    head = made(features=5, hidden=9)
    points = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (64,), generator=generator)
    for eps in (0.0, 0.1, 0.5):
        logits, rates = head(points, labels, eps)
        assert not rates.gather(1, labels[:, None]).any()
        step = torch.randn(64, 5, generator=generator, dtype=torch.float64)
        moved = points + eps * step / step.norm(dim=1, keepdim=True)
        there, _ = head(moved)
        fall = (logits.gather(1, labels[:, None]) - logits) - (
            there.gather(1, labels[:, None]) - there
        )
        assert (fall <= eps * rates + 1e-9).all()
    _, slopes = head.slopes(points)
    _, rates = head(points, labels, 0.0)
    torch.testing.assert_close(rates, slopes[torch.arange(64), labels], rtol=1e-9, atol=1e-12)


def test_rates_have_finite_gradients_in_every_parameter(generator):
    head = made(features=5, hidden=9).float()
    points = torch.randn(8, 5, generator=generator, requires_grad=True)
    logits, rates = head(points, torch.zeros(8).long(), 0.3)
    (logits.sum() + rates.sum()).backward()
    for p in (points, *head.parameters()):
        assert p.grad.isfinite().all()
        assert p.grad.any()


def test_stated_errors_cover_the_float32_program(generator):
    head = made(features=6, hidden=40, size=1.0).float()
    h = torch.randn(64, 6, generator=generator)
    with torch.no_grad():
        logits, _ = head.slopes(h)
    inner = build_network(
        SocConfig(input_shape=(1, 4, 4), num_classes=3, depth=2, stages=2, width=4)
    ).bound_matrix("head.inner", head.inner)
    norms = h.double().norm(dim=1) * (1 + 1e-12)

    def state(program, error):
        return ErrorState(norms, torch.full_like(norms, error), program, norms)

    single = state(FLOAT32, 0.0)
    bound = head.margin_error(single, inner)
    with torch.no_grad():
        exact, exact_slopes = head.double().slopes(h.double())
    error = logits.double() - exact
    assert ((error[:, :, None] - error[:, None]).abs().amax((1, 2)) <= bound).all()
    assert bound.max() < 1e-2
    assert (single.peak > norms).all()
    # Slopes at features that are off by 0.1 cover those at the exact ones.
    step = torch.randn(64, 6, generator=generator).double()
    away = h.double() + 0.1 * step / step.norm(dim=1, keepdim=True)
    with torch.no_grad():
        _, there = head.slopes(away)
    assert (head.slope_bounds(exact_slopes, state(FLOAT64, 0.1), inner) >= there).all()
    tight = head.slope_bounds(exact_slopes, state(FLOAT64, 0.0), inner)
    torch.testing.assert_close(tight, exact_slopes, rtol=1e-6, atol=1e-6)
    assert (tight >= exact_slopes).all()


def test_a_certificate_needs_the_slopes(generator):
    config = SocConfig(
        input_shape=(1, 4, 4), num_classes=3, depth=2, stages=2, width=4, head="mlp", hidden=12
    )
    network = trained_like(config)
    x = torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    certifier = ProvedCertifier(network, FLOAT64, network.matrix_bounds())
    with torch.no_grad():
        logits, slopes = network.logits_and_slopes(x)
    norms = x.flatten(1).norm(dim=1)
    found = certifier.certify(logits, norms, logits.argmax(1), slopes)
    assert (found.radius > 0).all()
    assert (found.error < 1e-7).all()
    with pytest.raises(ModelError, match="needs the slopes"):
        certifier.certify(logits, norms, logits.argmax(1))
