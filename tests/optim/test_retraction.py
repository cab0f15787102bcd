"""The fast retraction: the theorem in many digits, the forms in float64, and the drift."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import matrix_exp
from optim.manifolds import ORTHOGONAL
from optim.matmul import float32_products, rounded, symmetric_product
from optim.matrix_exp import (
    Decisions,
    Expected,
    finished,
    norms,
    product_rounding,
    read,
    spectral_bound,
)
from optim.retraction import (
    CORRECT_EVERY,
    DEFECT,
    DRIFT,
    _splits,
    coefficients,
    corrected,
    correction_due,
    defect,
    distance,
    refined,
    retract,
    retraction_move,
    third_order,
)
from tests.optim.test_matrix_exp import adam_like, normal, orthogonal, plane, rotations, skew

ORDERS = (2, 3, 4, 5)
# One angle for each form alone, then for two and for many substeps.
ANGLES = [0.02, 0.16, 0.4, 0.7, 1.2, 9.0]


def reach(order):
    """Largest norm that a form is allowed."""
    return DEFECT ** (1 / (2 * order)) / math.sin(math.pi / (2 * order))


def defect_of(X):
    return torch.linalg.matrix_norm(X.double().mT @ X.double() - torch.eye(len(X)), 2).item()


# -- the theorem ---------------------------------------------------------------------------------


def butterworth(order):
    """Its coefficients from its roots, in the digits of the context."""
    polynomial = [mpmath.mpc(1)]
    for m in range(1, order + 1):
        root = mpmath.expjpi(mpmath.mpf(2 * m + order - 1) / (2 * order))
        shifted, scaled = [0, *polynomial], [-root * c for c in polynomial] + [0]
        polynomial = [a + b for a, b in zip(shifted, scaled, strict=True)]
    scale = mpmath.sin(mpmath.pi / (2 * order))
    return [c.real * scale**j for j, c in enumerate(polynomial)]


@pytest.mark.parametrize("order", ORDERS)
def test_coefficients_are_butterworth_s(order):
    with mpmath.workdps(50):
        for found, expected in zip(coefficients(order), butterworth(order), strict=True):
            assert abs(found - expected) < 3e-16
        assert [coefficients(order)[j] for j in (0, 1)] == [1.0, 1.0]
        assert coefficients(order)[2] == pytest.approx(0.5, abs=3e-16)


def test_coefficients_of_the_forms_in_closed_form():
    c = (2 - math.sqrt(2)) / 4
    assert coefficients(3)[3] == pytest.approx(1 / 8, rel=1e-15)
    assert coefficients(4)[3:] == pytest.approx([c, c * c], rel=1e-15)


@pytest.mark.parametrize("order", ORDERS)
@given(st.floats(1e-3, 2.0))
def test_defect_is_exact_on_the_imaginary_axis(order, theta):
    with mpmath.workdps(100):
        t = mpmath.mpf(theta)
        p = sum(c * mpmath.mpc(0, t) ** j for j, c in enumerate(butterworth(order)))
        off = abs(p) ** 2 - 1
        assert abs(off / (t * mpmath.sin(mpmath.pi / (2 * order))) ** (2 * order) - 1) < 1e-30
        assert defect(order, theta) == pytest.approx(float(off), rel=1e-13)


@pytest.mark.parametrize("order", ORDERS)
@given(st.floats(1e-3, 1.0))
def test_distance_from_the_exponential_is_bounded(order, theta):
    with mpmath.workdps(60):
        z = mpmath.mpc(0, theta)
        p = sum(c * z**j for j, c in enumerate(butterworth(order)))
        off = float(abs(p - mpmath.exp(z)))
    assert off <= distance(order, theta) * (1 + 1e-12)
    assert distance(order, theta) < 2.5 * off  # and not far from it


# -- the matrices --------------------------------------------------------------------------------


def substeps_of(angle, order):
    substeps = 1
    while substeps * defect(order, angle / substeps) > DEFECT:
        substeps += 1
    return substeps


@pytest.mark.parametrize("angle", ANGLES)
def test_in_one_plane_the_form_is_the_cheapest(angle):
    """There theta is known, so the form is that of the angle."""
    order = next((k for k in ORDERS if angle <= reach(k)), 5)
    substeps = substeps_of(angle, order)
    D, X = plane(angle), orthogonal(3)
    found = retract(X, D, "fast")
    expected = (1 + defect(order, angle / substeps)) ** substeps - 1
    assert defect_of(found) == pytest.approx(expected, rel=1e-6, abs=1e-14 * (1 + angle))
    off = torch.linalg.matrix_norm(found - X @ torch.linalg.matrix_exp(D), 2).item()
    step = distance(order, angle / substeps)
    assert off <= (1 + 1e-6) * substeps * step + 1e-13
    assert substeps > 1 or off > step / 2


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("n", [12, 40])
def test_defect_and_distance_are_those_of_a_form(n, angle):
    D, X = rotations([angle] * (n // 2)), orthogonal(n)
    found = retract(X, D, "fast")
    off = torch.linalg.matrix_norm(found - X @ torch.linalg.matrix_exp(D), 2).item()
    admitted = []
    for order in ORDERS:
        substeps = substeps_of(angle, order) if order == 5 else 1
        expected = (1 + defect(order, angle / substeps)) ** substeps - 1
        if defect_of(found) == pytest.approx(expected, rel=1e-4, abs=1e-14 * (1 + angle)):
            admitted.append(off <= (1 + 1e-6) * substeps * distance(order, angle / substeps))
    assert admitted
    assert any(admitted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12), st.floats(1e-3, 6.0))
def test_no_move_exceeds_the_proved_defect(dtype, angles, scale):
    D = rotations([scale * angle for angle in angles], dtype)
    found = retract(orthogonal(len(D), dtype), D, "fast")
    rounding = 20 * len(D) * torch.finfo(dtype).eps * (1 + scale)
    assert defect_of(found) <= DEFECT + rounding


def work_of(monkeypatch, X, D):
    """Products of n x n matrices, and the result."""
    work = 0.0

    def counted(function):
        def call(*arguments, **options):
            nonlocal work
            left, right = arguments[-2:]
            work += left.shape[0] * right.shape[1] / X.shape[0] ** 2
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", counted(torch.mm))
        patch.setattr(torch, "addmm", counted(torch.addmm))
        result = retract(X, D, "fast")
    return work, result


@pytest.mark.parametrize(
    ("n", "lr", "products"),
    [
        pytest.param(1024, 5e-5, 1.625, marks=pytest.mark.slow),
        (1024, 1e-3, 2.25),  # theta 0.063
        pytest.param(1024, 4.4e-3, 2.625, marks=pytest.mark.slow),  # theta 0.28
        (1024, 6e-3, 3.25),
        (200, 2e-3, 3),  # small products are not mirrored
    ],
)
def test_products_of_an_adam_step(n, lr, products, monkeypatch):
    X, D = orthogonal(n, torch.float32), adam_like(n, lr)
    work, _ = work_of(monkeypatch, X, D)
    assert work == products


@pytest.mark.parametrize("precision", ["full", "tf32", "bf16"])
@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("scale", [1e-3, 0.05, 0.3])
def test_theta_of_the_third_order_is_an_upper_bound(precision, order, scale):
    D = rounded(rotations([scale * k for k in (1, 1.9, 2, 0.3)], torch.float32), precision)
    S = symmetric_product(D, D)
    m1, m2 = D.double().square().sum().item(), S.double().square().sum().item()
    first = spectral_bound(m1, m2, product_rounding(D, precision))
    splits = _splits(order, D, m1, m2, first, precision)
    norm = norms(third_order(order, splits, D, S, precision)).item()
    second = refined(order, splits, D, m1, m2, first, norm, precision)
    norm_2 = torch.linalg.matrix_norm(D.double(), 2).item()
    assert norm_2 * (1 - 1e-14) <= second <= first < 2 * norm_2


@pytest.mark.parametrize("spike", [0.1, 0.3, 0.9])
def test_an_increment_that_is_not_what_was_expected(spike):
    """Many small eigenvalues and a large one: the form tried first is not enough."""
    n = 120
    D = skew(n, 0.02 * math.sqrt(n), seed=3)
    v, w = torch.linalg.qr(normal(n, 2))[0].T
    D = D + spike * (torch.outer(v, w) - torch.outer(w, v))
    D = (D - D.T) / 2
    assert defect_of(retract(orthogonal(n), D, "fast")) <= DEFECT


def test_a_fourth_order_that_is_not_enough_becomes_the_fifth(monkeypatch):
    n = 120
    D = skew(n, 0.13 * math.sqrt(n), seed=3)
    work, _ = work_of(monkeypatch, orthogonal(n), D)
    assert work == 3
    v, w = torch.linalg.qr(normal(n, 2))[0].T
    D = D + 0.5 * (torch.outer(v, w) - torch.outer(w, v))
    D = (D - D.T) / 2
    work, found = work_of(monkeypatch, orthogonal(n), D)
    assert work == 4
    theta = torch.linalg.matrix_norm(D, 2).item()
    assert reach(4) < theta < reach(5)
    assert defect_of(found) == pytest.approx(defect(5, theta), rel=1e-6)


@pytest.mark.parametrize("n", [5, 511, 515, 700])
def test_skew_products_are_products(n):
    D = skew(n, 1.0)
    S = D @ D
    torch.testing.assert_close(symmetric_product(S, D, sign=-1), S @ D, rtol=0, atol=1e-15)


def test_zero_moves_nothing_and_what_is_broken_stays_visible():
    X = torch.randn(5, 5)
    assert torch.equal(retract(X, torch.zeros(5, 5), "fast"), X)
    for bad in (math.nan, math.inf, 1e30, 1e4):
        D = torch.zeros(3, 3)
        D[0, 1], D[1, 0] = bad, -bad
        assert not retract(torch.eye(3), D, "fast").isfinite().all()
    tiny = skew(8, 1e-25, dtype=torch.float32)
    assert torch.equal(retract(torch.eye(8), tiny, "fast"), torch.eye(8) + tiny)


def test_one_plane_turns_the_right_way():
    for theta in (0.1, 0.8, 3.1):
        found = retract(torch.eye(3, dtype=torch.float64), plane(theta), "fast")
        assert found[1, 0].item() == pytest.approx(math.sin(theta), abs=0.05 * theta**3)


# -- corrections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead_steps", [0, 1, 2, 5, 6, 7, 31, 32, 33, 100])
def test_no_matrix_moves_more_often_between_two_corrections(lookahead_steps):
    """Moves since the last correction of the fast and of the slow matrix, followed step by step."""
    fast = slow = worst = corrections = 0
    for step in range(1, 2001):
        fast += 1
        synchronises = lookahead_steps and step % lookahead_steps == 0
        if synchronises:
            fast = slow = slow + 1
        worst = max(worst, fast, slow)
        if correction_due(step, lookahead_steps):
            corrections += 1
            fast = 0
            slow = 0 if synchronises else slow
    assert worst <= CORRECT_EVERY
    assert corrections <= 2000 / CORRECT_EVERY * 1.1 + 2000 / max(lookahead_steps, 32)


@pytest.mark.parametrize("off", [1e-6, 1e-3, 0.1])
def test_a_correction_leaves_the_square_of_the_residual(off):
    X = orthogonal(30) @ torch.diag(torch.linspace(1 - off, 1 + off, 30, dtype=torch.float64))
    before = defect_of(X)
    assert defect_of(corrected(X)) <= 0.75 * before**2 + 0.25 * before**3 + 1e-14


def residuals(n, lr, steps, dtype, precision="full"):
    """||X^T X - I||_2 after each of many moves in random directions, corrected where due."""
    X, found = ORTHOGONAL.random((n, n), torch.Generator().manual_seed(1)).to(dtype), []
    for step in range(1, steps + 1):
        X = retract(X, adam_like(n, lr, step).to(dtype), "fast", precision)
        if correction_due(step, 0):
            X = corrected(X)
        found.append(defect_of(X))
    return found


@pytest.mark.parametrize(("n", "lr"), [(64, 1e-3), (64, 8e-3), (64, 0.02), (64, 0.1)])
def test_truncation_between_corrections_stays_within_its_bound(n, lr):
    found = residuals(n, lr, 2 * CORRECT_EVERY, torch.float64)
    assert max(found) <= (1 + DEFECT) ** CORRECT_EVERY - 1 <= DRIFT * (1 + DRIFT)
    assert found[CORRECT_EVERY - 1] < 0.75 * DRIFT**2 + 1e-13


@pytest.mark.parametrize("precision", ["full", "tf32", "bf16"])
@pytest.mark.parametrize(("n", "lr"), [(64, 1e-3), (128, 0.012)])
def test_drift_between_corrections_is_truncation_and_rounding(n, lr, precision):
    """The rounding of a step as in `optim.matrix_exp`, and DEFECT; in the spectral norm."""
    u = {"full": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}[precision]
    of_a_step = 0.7 * u**2 * lr * n + 2.0**-24 * math.sqrt(n)
    worst = max(residuals(n, lr, 2 * CORRECT_EVERY, torch.float32, precision))
    assert worst < DRIFT + 4 * math.sqrt(CORRECT_EVERY) * of_a_step


EXPECTED = (None, (3, False), (3, True), (4, False), (4, True))


@pytest.mark.parametrize(
    ("rule", "precision"),
    [("fast", "full"), ("fast", "bf16"), ("spectral", "full"), ("spectral", "tf32"),
     ("frobenius", "full")],
)  # fmt: skip
def test_what_is_expected_changes_no_bit_and_how_often_norms_are_read(rule, precision, monkeypatch):
    reads = []

    def counted(asked):
        reads.append(len(asked))
        return read(asked)

    monkeypatch.setattr(matrix_exp, "read", counted)
    X, increments = orthogonal(120, torch.float32), [adam_like(120, lr) for lr in LRS]
    alone = [retract(X, D, rule, precision) for D in increments]
    for third in EXPECTED:
        kept = [Expected(third) for _ in increments]
        for again in range(2):
            reads.clear()
            decisions, moves = Decisions(), []
            with float32_products(precision):
                for D, expected in zip(increments, kept, strict=True):
                    moves.append(retraction_move(X, D, rule, precision, expected))
                    decisions.begin(moves[-1])
                decisions.take()
                together = [finished(move) for move in moves]
            assert all(map(torch.equal, together, alone)), third
            # Of all moves together; the second time what the first one has needed is expected.
            assert reads[0] == len(increments)
            assert len(reads) <= 2 - again, (third, again)


LRS = (1e-5, 1e-3, 6e-3, 2e-2, 5e-2)
