"""The head with a tanh layer: falls of margins, radii against brute force and long arithmetic."""

import mpmath
import pytest
import torch

from model.certification.rounding import BFLOAT16, FLOAT32, FLOAT64, ErrorState
from model.networks.linf.tanh_head import TanhHead


def made(features=2, hidden=12, classes=4, *, seed=0, size=2.0):
    head = TanhHead(features, hidden, classes).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(std=size, generator=generator)
    return head


def radii_at(head, h, errors=0.0):
    """Logits, margins, predictions and radii at some features."""
    with torch.no_grad():
        logits, intervals = head.intervals(h)
    prediction = logits.argmax(1)
    margins = logits.gather(1, prediction[:, None]) - logits
    intervals = head.interval_bounds(intervals, torch.full((len(h),), errors).double())
    return logits, margins, intervals, prediction, head.radii(margins, intervals, prediction)


def fall(head, h, i, j, r):
    """F_j(r) of the module's docstring at one image, in 60 digits."""
    with mpmath.workdps(60):
        outer, inner = head.outer.tolist(), head.inner.tolist()
        c1, c2 = map(mpmath.mpf, head.scales)
        total = mpmath.mpf(0)
        for k, row in enumerate(inner):
            spread = c1 * mpmath.fsum(abs(mpmath.mpf(w)) for w in row)
            z = c1 * mpmath.fdot(row, h.tolist()) + mpmath.mpf(head.inner_bias[k].item())
            a = c2 * (mpmath.mpf(outer[i][k]) - mpmath.mpf(outer[j][k]))
            side = z - r * spread if a > 0 else z + r * spread
            total += a * (mpmath.tanh(z) - mpmath.tanh(side))
        return total


def margin(head, h, i, j):
    """Of class i over class j, in 60 digits."""
    with mpmath.workdps(60):
        c1, c2 = map(mpmath.mpf, head.scales)
        hidden = [
            mpmath.tanh(c1 * mpmath.fdot(row, h.tolist()) + mpmath.mpf(bias))
            for row, bias in zip(head.inner.tolist(), head.inner_bias.tolist(), strict=True)
        ]
        y = [
            c2 * mpmath.fdot(row, hidden) + mpmath.mpf(bias)
            for row, bias in zip(head.outer.tolist(), head.outer_bias.tolist(), strict=True)
        ]
        return y[i] - y[j]


def test_the_fall_at_a_proved_radius_leaves_the_exact_margin_positive(generator):
    """Also where only rounding stands between the two, and the radius is nearly the largest."""
    head = made(features=3, hidden=20)
    h = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    _, margins, intervals, prediction, _ = radii_at(head, h, errors=1e-13)
    state = ErrorState(h.abs().amax(1), torch.zeros(6).double(), FLOAT64, h.abs().amax(1))
    error = head.margin_error(state)
    assert (error < 1e-11).all()
    radii = head.radii(margins - error[:, None], intervals, prediction)
    for b, own in enumerate(prediction.tolist()):
        rival = int(radii[b].argmin())
        r = mpmath.mpf(float(radii[b, rival]))
        assert r > 0
        for j in {0, 1, 2, 3} - {own}:
            assert margin(head, h[b], own, j) > fall(head, h[b], own, j, r)
        more = r * (1 + mpmath.mpf(2) ** -27)
        assert margin(head, h[b], own, rival) < fall(head, h[b], own, rival, more)


def test_no_point_of_the_square_changes_the_class(generator):
    shares = []
    for seed in range(4):
        head = made(seed=seed)
        points = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        _, _, _, prediction, radii = radii_at(head, points)
        line = torch.linspace(-1, 1, 41, dtype=torch.float64)
        square = torch.cartesian_prod(line, line)
        for h, own, radius in zip(points, prediction, radii.amin(1), strict=True):
            # Squares of growing size around the point.
            sizes = radius * torch.logspace(0, 6, 60, base=2, dtype=torch.float64) * (1 - 1e-9)
            around = h + sizes[:, None, None] * square
            with torch.no_grad():
                changed = (head(around.flatten(0, 1))[0].argmax(1) != own).view(60, -1).any(1)
            assert not changed[0]
            shares += (radius / sizes[changed][:1]).tolist()
    assert len(shares) > 10
    assert sum(shares) / len(shares) > 0.4


def test_the_radius_is_the_distance_where_all_units_pull_one_way():
    """One feature, rising units, a larger logit for all of them: intervals lose nothing."""
    head = made(features=1, hidden=8, classes=2, size=0.5)
    with torch.no_grad():
        head.inner.abs_()
        head.outer[0].abs_()
        head.outer[1] = -head.outer[0]
        head.outer_bias.zero_()
    h = torch.tensor([[2.0], [7.0]], dtype=torch.float64)
    _, _, _, prediction, radii = radii_at(head, h)
    assert prediction.tolist() == [0, 0]
    with torch.no_grad():
        there = h - radii[:, 1:] * (1 + torch.tensor([[-1e-9], [1e-9]]).double())
        logits, _ = head(
            torch.cat([there, h - radii[:, 1:] * (1 - 1e-9), h - radii[:, 1:] * (1 + 1e-9)])
        )
    assert logits.argmax(1).tolist() == [0, 1, 0, 0, 1, 1]


def test_nothing_is_certified_without_a_margin_or_with_an_infinite_error(generator):
    head = made()
    h = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    _, margins, intervals, prediction, radii = radii_at(head, h)
    assert (radii.amin(1) > 0).all()
    assert (radii.isinf().sum(1) == 3).all()
    for bad in (
        head.radii(margins - margins.max() - 1, intervals, prediction),
        head.radii(margins - torch.inf, intervals, prediction),
        radii_at(head, h, errors=torch.inf)[4],
    ):
        assert bad.amin(1).tolist() == [0, 0, 0]
        assert (bad.argmin(1) != prediction).all()


def test_rates_are_the_falls_over_the_radius_in_parts_as_in_one(generator, monkeypatch):
    head = made(features=5, hidden=9)
    points = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (7,), generator=generator)
    gradients = []
    for elements in (1 << 26, 80):
        monkeypatch.setattr("model.networks.linf.tanh_head._ELEMENTS", elements)
        h = points.clone().requires_grad_()
        logits, rates = head(h, labels, 0.3)
        torch.testing.assert_close(logits, head(h)[0])
        gradients.append(torch.autograd.grad(rates.square().sum(), [h, head.inner, head.outer]))
    for whole, parts in zip(*gradients, strict=True):
        assert whole.isfinite().all()
        assert whole.any()
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    for b, t in enumerate(labels.tolist()):
        exact = [float(fall(head, points[b], t, j, 0.3)) / 0.3 for j in range(4)]
        torch.testing.assert_close(rates[b].tolist(), exact, rtol=1e-9, atol=1e-12)
    assert (head.factor_bounds()[labels] >= rates).all()
    _, at_zero = head(points.float().double(), labels, 0.0)
    assert at_zero.isfinite().all()


@pytest.mark.parametrize("program", [FLOAT32, BFLOAT16], ids=lambda program: program.name)
def test_stated_errors_cover_the_program(generator, program):
    head = made(features=6, hidden=40, size=1.0).float()
    h = torch.randn(64, 6, generator=generator).bfloat16().float()
    with torch.no_grad():
        computed = made(features=6, hidden=40, size=1.0).to(program.dtype)(h)[0].double()
        exact = made(features=6, hidden=40, size=1.0).float().double()(h.double())[0]
    norms = h.double().abs().amax(1)
    state = ErrorState(norms, torch.zeros_like(norms), program, norms)
    bound = head.margin_error(state)
    error = computed - exact
    assert ((error[:, :, None] - error[:, None]).abs().amax((1, 2)) <= bound).all()
    assert bound.max() < (1e-3 if program is FLOAT32 else 2)
    assert (state.peak > norms).all()
    head.carry_hidden(state)
    with torch.no_grad():
        z = made(features=6, hidden=40, size=1.0).to(program.dtype).intervals(h)[1][:, 0].double()
        off = (
            z
            - made(features=6, hidden=40, size=1.0).float().double().intervals(h.double())[1][:, 0]
        )
    assert (off.abs().amax(1) <= state.error).all()
    assert state.error.max() < 1e4 * off.abs().max()
