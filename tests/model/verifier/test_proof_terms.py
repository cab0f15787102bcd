"""Terms of a proof that honest inputs do not need: each test fails where its term is left out.

Rounding is far below what the last factors of a bound cover. So either the unit roundoff is made
large and every product errs by as much as it may, or a library returns what the residual just
allows, or the formula is compared with the document's in 50 digits.
"""

import itertools
import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch

from model.certification import eigen_bounds
from model.certification.rounding import PROGRAMS as EVALUATED
from model.networks.liresnet.cholesky import ComputedBound, entry_error, rows_error
from model.verifier.mathematics import cholesky, radii
from model.verifier.mathematics import eigen_bounds as verifier_eigen_bounds
from model.verifier.mathematics.orthogonal_layers import dense_rows
from model.verifier.mathematics.rounding import PROGRAMS, ErrorState
from tests.model.small_networks import trained_like
from tests.model.test_conformance import NETWORKS
from tests.model.verifier.honest import derived, stated

U = 2.0**-12
"""A unit roundoff that no last factor covers."""


class Evaluator:
    """model/certification/eigen_bounds.py."""

    module, roundoff, product = eigen_bounds, "U64", "product"

    @staticmethod
    def library(patch, eigenvalues, factor):
        def cholesky_ex(matrices):
            return SimpleNamespace(L=torch.from_numpy(factor).expand_as(matrices))

        patch.setattr(torch.linalg, "eigvalsh", lambda gram: torch.tensor([eigenvalues]))
        patch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)

    @staticmethod
    def largest(matrix):
        return eigen_bounds.proved_norm(torch.from_numpy(matrix)[None]) ** 2

    @staticmethod
    def least(gram, estimate):
        values = torch.tensor([estimate], dtype=torch.float64)
        return float(eigen_bounds.proved_least(torch.from_numpy(gram)[None], values))


class Verifier:
    """model/verifier/mathematics/eigen_bounds.py."""

    module, roundoff, product = verifier_eigen_bounds, "U", "multiply"

    @staticmethod
    def library(patch, eigenvalues, factor):
        patch.setattr(np.linalg, "eigvalsh", lambda gram: np.array([eigenvalues]))
        patch.setattr(np.linalg, "cholesky", lambda matrix: factor)

    @staticmethod
    def largest(matrix):
        return float(verifier_eigen_bounds.largest_eigenvalues(matrix[None])[0])

    @staticmethod
    def least(gram, estimate):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.linalg, "eigvalsh", lambda gram: np.array([[estimate]]))
            return float(verifier_eigen_bounds.smallest_eigenvalues(gram[None])[0])


@pytest.fixture(params=[Evaluator, Verifier], ids=["evaluator", "verifier"])
def side(request, monkeypatch):
    """One of the two programs, with a large unit roundoff."""
    monkeypatch.setattr(request.param.module, request.param.roundoff, U)
    return request.param


def test_the_rounding_of_a_gram_matrix_is_in_its_norm(side, monkeypatch):
    exact = getattr(side.module, side.product)
    rows = 400
    monkeypatch.setattr(side.module, side.product, lambda a, b: exact(a, b) * (1 - rows * U))
    assert side.largest(np.ones((rows, 1))) >= rows


def lower_factor(matrix):
    """L L^T is the nearest positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root = vectors * np.sqrt(np.maximum(values, 1e-12))
    L = np.linalg.qr(root.T)[1].T
    return L * np.sign(L.diagonal())


def test_a_residual_that_is_accepted_is_in_the_norm(side, monkeypatch):
    """The library states a largest eigenvalue that is too small, by what its factor may hide."""
    matrix = np.ones((6, 4))
    due = 24.0
    stated = due * (1 - 100 * U) / (1 + 2.0**-20)
    factor = lower_factor(due * (1 - 100 * U) * np.eye(4) - matrix.T @ matrix)
    side.library(monkeypatch, [0.0, 0.0, 0.0, stated], factor)
    found = side.largest(matrix)
    assert due <= found < 2 * due  # believed, and charged: the trace of G would be as large


def test_a_residual_that_is_accepted_is_in_the_least_eigenvalue(side, monkeypatch):
    """The library states a least eigenvalue that is too large."""
    stated = (1 + 80 * U) / 0.99
    side.library(monkeypatch, [stated] * 4, 1e-6 * np.eye(4))
    found = side.least(np.eye(4), stated)
    assert 0.5 < found <= 1


def test_a_residual_that_is_too_large_proves_nothing(side, monkeypatch):
    side.library(monkeypatch, [2.0] * 4, 1e-6 * np.eye(4))
    assert side.least(np.eye(4), 2.0) == 0


# Rows made orthonormal


def exact_rows(X, share):
    """Q by 50 digits."""
    with mpmath.workdps(50):
        x = mpmath.matrix(X.tolist())
        S, m = x * x.T, len(X)
        S += share * sum(S[i, i] for i in range(m)) / m * mpmath.eye(m)
        return np.array((mpmath.cholesky(S) ** -1 * x).tolist(), dtype=float)


@pytest.mark.parametrize("function", ["cholesky", "solve"])
@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-9, 1e-6])
def test_the_verifier_charges_its_own_solver(function, size, monkeypatch):
    weight = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32).astype(np.float64)
    rows = dense_rows(weight, 0, 1e-3, transposed=False)
    rho = cholesky.condition(rows)
    exact = getattr(np.linalg, function)

    def sloppy(*arguments):
        result = exact(*arguments)
        return result + size * np.tril(np.ones_like(result))

    monkeypatch.setattr(np.linalg, function, sloppy)
    Q, error = cholesky.orthonormal(rows, rho)
    wrong = float(np.linalg.norm(Q[0] - exact_rows(rows.X[0], rows.share)))
    assert wrong > size / 10
    assert wrong <= error < 1e3 * (size + 1e-12)


def stated_rows_error(m, k, rho, delta, program, c):
    """`Rounding of Q` of docs/explanation/families.md, in 50 digits."""
    with mpmath.workdps(50):
        u, rho, delta = mpmath.mpf(2) ** -53, mpmath.mpf(rho), mpmath.mpf(delta)

        def gamma(n):
            return n * u / (1 - n * u)

        h = 4 * gamma(c * (m + 3)) * (1 + delta) ** 2
        a = 4 * (delta + gamma(c * (k + m + 4)) * (1 + delta) ** 2)
        q = rho * (a + h)
        if q > 0.25:
            return math.inf
        of_factor = q / (1 - q)
        of_rows = mpmath.sqrt(rho) * (delta + h * mpmath.sqrt(m)) / (1 - q)
        error = of_factor + of_rows
        return float(error + program.wide * mpmath.sqrt(m) * (1 + error))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("c", [1, 4])
def test_both_charge_the_rounding_of_rows_that_the_document_states(name, c):
    finite = 0
    for m, k, rho in itertools.product((1, 5, 40), (40, 300), (1.0, 30.0, 1e6, 1e10)):
        X = np.ones((1, m, k), dtype=complex if c == 4 else float)
        rows = cholesky.Rows(X, 1e-3, 1.0, 0.0)
        bound = ComputedBound("x", (m, k), "", 1.0, 0.0, math.sqrt(m), 1.0, rho)
        delta = entry_error(EVALUATED[name])
        assert delta == pytest.approx(cholesky.entry_error(rows, PROGRAMS[name]), rel=1e-12)
        due = stated_rows_error(m, k, rho, delta, EVALUATED[name], c)
        found = rows_error(bound, m, k, delta, EVALUATED[name], complex_terms=c == 4)
        assert found == pytest.approx(due, rel=2e-9)
        assert cholesky.program_error(rows, rho, PROGRAMS[name]) == pytest.approx(due, rel=1e-9)
        finite += math.isfinite(due)
    assert finite >= 6


# Pixels


@pytest.mark.parametrize("name", PROGRAMS)
def test_three_roundings_of_a_pixel_are_charged(name):
    """What is given, the reciprocal of 255 and the product with it; then 1/2, and the storage."""
    program, norms, shift = PROGRAMS[name], np.array([0.0, 3.0, 40.0]), 2.5
    found = ErrorState.of_images(norms, shift, program)
    for norm, error in zip(norms, found.e, strict=True):
        with mpmath.workdps(50):
            us, up = mpmath.mpf(program.wide), mpmath.mpf(program.stored)
            n, due = mpmath.mpf(norm) + shift, 3 * us / (1 - 3 * us) * mpmath.mpf(norm)
            due += us * (n + due)
            due += up * (n + due)
            assert abs(error / due - 1) < 1e-14


def test_one_rounding_does_not_cover_a_pixel():
    """float32 images of one grey level, as the two programs of section 1 may see them."""
    program, u = PROGRAMS["float32"], 2.0**-24
    levels = np.arange(1, 256)
    reciprocal = levels.astype(np.float32) * np.float32(1 / 255)
    wrong = np.abs(reciprocal.astype(np.float64) - levels / 255)
    charged = ErrorState.of_images(levels / 255, 0.0, program._replace(stored=0.0)).e
    assert (wrong <= charged).all()
    assert (wrong > u / (1 - u) * levels / 255).any()


# The proof of one radius


@pytest.mark.parametrize("name", ["lipnext", "sll", "sortnet", "groupsort"])
def test_a_radius_pays_for_both_programs_and_the_constant(name, monkeypatch):
    """The largest r with g - E_own(N) - E(N + r) >= L factor r is proved, and no larger one."""
    own = PROGRAMS["float64"]._replace(stored=2.0**-38, accumulated=2.0**-38, wide=2.0**-38)
    program = own._replace(stored=2.0**-36)
    monkeypatch.setattr(radii, "VERIFIER", own)
    found = stated(NETWORKS[name], trained_like(NETWORKS[name]).float().eval())
    network = derived(found)
    values, local = network.evaluate(found.pixels)
    prediction, norms = values.argmax(axis=1), radii.image_norms(found.pixels, network.norm)
    rows = np.arange(len(values))
    margins = values[rows, prediction][:, None] - values
    margins[rows, prediction] = np.inf
    slopes = network.bound * network.head.factors[prediction]

    def left(r):
        taken = network.margin_error(norms, own) + network.margin_error(norms + r, program)
        return (margins - taken[:, None] - slopes * r[:, None]).min(axis=1)

    low, high = np.zeros(len(values)), np.full(len(values), 100.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            np.where(left(middle) >= 0, middle, low),
            np.where(left(middle) >= 0, high, middle),
        )
    assert (low > 0).sum() >= 3
    assert (network.margin_error(norms, own) > 1e-9 * margins.min(axis=1)).all()
    certain = low > 0

    def proved(r):
        return radii.judge(network, program, values, local, norms, prediction, r).proved

    assert proved(low * (1 - 1e-11))[certain].all()
    assert not proved(low * (1 + 1e-11))[certain].any()
