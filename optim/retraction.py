"""Where an increment takes a matrix: X exp(D), or X p(D) that is as near to orthogonal.

X has to stay orthogonal; that it moves by exp(D) and not by another map of second order matters to
nothing. The polynomials p_k(z) = B_k(z sin(pi / 2k)), with B_k of Butterworth (Wireless Engineer 7,
1930), are 1 + z + z^2 / 2 and go on as orthogonality asks: for ||D||_2 = theta

    ||p_k(D)^T p_k(D) - I||_2 = (theta sin(pi / 2k))^(2k), exactly.

With S = D^2, Q = D^3 and coefficients c_j of p_k:

| k | form of M = p_k(D) - I                | products with X M |
|---|---------------------------------------|-------------------|
| 2 | D + S / 2                             | 1.625             |
| 3 | D + S / 2 + Q / 8                     | 2.25              |
| 4 | D + S / 2 + S (c_3 D + c_4 S)         | 2.625             |
| 5 | D + S / 2 + S (c_3 D + c_4 S + c_5 Q) | 3.25              |

`docs/explanation/optimizer.md` has the proofs. The form is the cheapest whose defect is proved to
be at most `DEFECT`; larger increments are cut into substeps. Defects add up, so `correction_due`
says after which steps one Newton-Schulz step takes away what has gathered: the truncations
between two of them move ||X^T X - I||_2 by no more than `DRIFT`. Rounding is as for
the exponential (`matrix_exp`), whose bounds of theta and of products are used here. Who moves a
sharded matrix: its owner, in `manifold_step.py`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from optim.matmul import (
    Precision,
    float32_products,
    product,
    rounded,
    split_product,
    symmetric_product,
    unit_roundoff,
)
from optim.matrix_exp import (
    LARGEST_NORM,
    Expected,
    Move,
    SeriesRule,
    exponential_move,
    moved,
    norms,
    product_rounding,
    spectral_bound,
    taken,
    term_error,
    term_limit,
)

RetractionRule = SeriesRule | Literal["fast"]

CORRECT_EVERY = 24
"""Most moves of a matrix between two corrections, which cost 13/8 products each."""

DRIFT = 2e-5
"""What truncation may move ||X^T X - I||_2 between two corrections, by proof."""

DEFECT = DRIFT / CORRECT_EVERY
"""Largest proved ||p(D)^T p(D) - I||_2 of one move, in every dtype."""

_SEMICIRCLE = 1.25
"""m3 m1 / m2^2, the moments of `spectral_bound`, for a matrix of many independent entries. It only
decides which form is tried first."""


def retract(
    X: Tensor, D: Tensor, rule: RetractionRule = "spectral", precision: Precision = "full"
) -> Tensor:
    """X exp(D) by one of its series, or with the rule "fast" X p(D); see the module.

    Args:
        X: Matrix (n, n), float32 or float64.
        D: Skew increment (n, n), same dtype and device.
        rule: See the module and `optim.matrix_exp`.
        precision: Of the products in float32; float64 is always full.

    Returns:
        A new (n, n) tensor, equal to X when D is zero. NaN as in `apply_exponential`.

    Raises:
        OptimizerError: The rule is the paper's and the precision is reduced.
    """
    with float32_products(precision):
        return taken(retraction_move(X, D, rule, precision, Expected()))


def retraction_move(
    X: Tensor, D: Tensor, rule: RetractionRule, precision: Precision, expected: Expected
) -> Move:
    """`retract` as a move, to be taken inside of `float32_products`."""
    if rule != "fast":
        return exponential_move(X, D, rule, precision, expected)
    return _fast(X, D, precision, expected)


def correction_due(step: int, lookahead_steps: int) -> bool:
    """Whether the matrix that is the fast one after this step is corrected.

    Under Lookahead the slow matrix has to be corrected, which moves at synchronisations alone and
    of which the fast one is a copy then; where those are far apart, the fast one between them too.
    No matrix moves more than CORRECT_EVERY times without a correction, counted along its copies.

    Args:
        step: From 1.
        lookahead_steps: Steps between two synchronisations; 0 without Lookahead.
    """
    if not lookahead_steps:
        return step % CORRECT_EVERY == 0
    synchronisations, since = divmod(step, lookahead_steps)
    if since:
        return since % CORRECT_EVERY == 0
    return synchronisations % max(1, CORRECT_EVERY // lookahead_steps) == 0


def corrected(X: Tensor) -> Tensor:
    """One Newton-Schulz step X (3 I - X^T X) / 2: E = X^T X - I becomes -3/4 E^2 + 1/4 E^3."""
    with float32_products():
        E = symmetric_product(X.mT, X)
        E.diagonal().sub_(1.0)
        return torch.addmm(X, X, E, alpha=-0.5)


# -- the forms -----------------------------------------------------------------------------------


def coefficients(order: int) -> list[float]:
    """c_0 ... c_k of p_k, k >= 2; c_0 = c_1 = 1, c_2 = 1/2."""
    angle = math.pi / (2 * order)
    found = [1.0]
    for j in range(1, order + 1):
        # Butterworth's recursion, its variable scaled by sin(angle).
        factor = math.cos((j - 1) * angle) * math.sin(angle) / math.sin(j * angle)
        found.append(found[-1] * factor)
    return found


def defect(order: int, theta: float) -> float:
    """Largest ||p_k(D)^T p_k(D) - I||_2 for ||D||_2 <= theta."""
    return (theta * math.sin(math.pi / (2 * order))) ** (2 * order)


def distance(order: int, theta: float) -> float:
    """Bound of ||p_k(D) - exp(D)||_2 for ||D||_2 <= theta: coefficient by coefficient."""
    terms = enumerate(coefficients(order))
    remainder = theta ** (order + 1) / math.factorial(order + 1)
    return sum(abs(c - 1 / math.factorial(j)) * theta**j for j, c in terms) + remainder


_C3, _C4, _C5 = coefficients(3), coefficients(4), coefficients(5)
_THIRD = {3: (_C3[3], 0.0), 4: (_C4[3], _C4[4] / _C4[3])}
"""c_3, and c_4 / c_3: what form 3 or 4 adds to D + S / 2 is c_3 S (D + c_4 / c_3 S)."""


def _fast(X: Tensor, D: Tensor, precision: Precision, expected: Expected) -> Move:
    factor = rounded(D, precision)
    D, S = factor.to(D.dtype), symmetric_product(factor, factor)
    del factor
    # Sums of squares again: those of equal entries, as of a first step of Adam, are all rounded to
    # the same side by a product, and X would grow a little with every step.
    S.diagonal().copy_(torch.linalg.vector_norm(D, dim=1).square_().neg_())
    ahead = expected.third
    T = None if ahead is None else third_order(*ahead, D, S, precision)
    m1, m2, *third = yield norms(D, S, *([] if T is None else [T]))
    m1, m2 = m1 * m1, m2 * m2
    theta = spectral_bound(m1, m2, product_rounding(D, precision))
    if not theta <= LARGEST_NORM:
        yield None
        yield torch.full_like(X, math.nan)
        return
    expected.third, order = None, 2
    if defect(2, theta) > DEFECT:
        order = _first_form(m1, m2, theta)
        splits = _splits(order, D, m1, m2, theta, precision)
        expected.third = order, splits
        if T is None or ahead != expected.third:
            T = third_order(order, splits, D, S, precision)
            third = yield norms(T)
        theta = refined(order, splits, D, m1, m2, theta, third[0], precision)
    yield None
    M, substeps = _increment(D, S, T, order, theta, precision)
    del D, S, T
    for _ in range(substeps):
        X = moved(X, M, precision)
    yield X


def _increment(
    D: Tensor, S: Tensor, T: Tensor | None, order: int, theta: float, precision: Precision
) -> tuple[Tensor, int]:
    """M, and how often it is applied; T is the `third_order` of form 3 or 4."""
    if T is None or order == 2:
        return torch.add(D, S, alpha=0.5), 1
    if defect(order, theta) <= DEFECT:
        return torch.add(D, S, alpha=0.5).add_(T, alpha=_THIRD[order][0]), 1
    Q = T if order == 3 else torch.sub(T, T.mT).mul_(0.5)
    substeps = 1
    while substeps * defect(5, theta / substeps) > DEFECT:
        substeps += 1
    h = 1 / substeps
    V = Q.mul_(_C5[5] * h**5).add_(D, alpha=_C5[3] * h**3).add_(S, alpha=_C5[4] * h**4)
    M = split_product(S, V, precision)
    return M.add_(D, alpha=h).add_(S, alpha=0.5 * h * h), substeps


def _first_form(m1: float, m2: float, theta: float) -> int:
    """3 or 4: what will probably be proved to be enough, or lies on the way of the fifth."""
    m3 = _SEMICIRCLE * m2 * m2 / m1
    likely = min(theta, spectral_bound(m1, m2, 0.0, third=(math.sqrt(m3) / 6, 0.0)))
    return 4 if defect(4, likely) <= DEFECT < defect(3, likely) else 3


def third_order(order: int, splits: bool, D: Tensor, S: Tensor, precision: Precision) -> Tensor:
    """T = D^3, for form 4 with its multiple of D^4, from rounded factors or split ones."""
    V = D if order == 3 else torch.add(D, S, alpha=_THIRD[order][1])
    if splits:
        return split_product(S, V, precision)
    return product(S, V, precision) if order == 4 else _skew(S, V, precision)


def _splits(
    order: int, D: Tensor, m1: float, m2: float, theta: float, precision: Precision
) -> bool:
    """Whether rounding the factors of T once has a larger proved error than is admitted."""
    rounding, u = _errors(order, False, D, precision)
    c, d = _THIRD[order]
    error = c * term_error(m1, m2, theta, rounding, u, 1.0, d)
    return u > 0 and error > term_limit(len(D), m1, u)


def refined(
    order: int,
    splits: bool,
    D: Tensor,
    m1: float,
    m2: float,
    theta: float,
    norm: float,
    precision: Precision,
) -> float:
    """The better bound of theta that the norm of T gives."""
    rounding, u = _errors(order, splits, D, precision)
    for _ in range(3):  # what bounds theta better bounds the error of T better
        third = norm / 6, term_error(m1, m2, theta, rounding, u, 1.0, _THIRD[order][1]) / 6
        theta = min(theta, spectral_bound(m1, m2, rounding, third=third))
    return theta


def _errors(order: int, splits: bool, D: Tensor, precision: Precision) -> tuple[float, float]:
    """Rounding of the product T, and of its factors."""
    rounding, u = product_rounding(D, precision), unit_roundoff(D.dtype, precision)
    if order == 3:  # mirrored: what the computed half has of an error the other half has, too
        rounding, u = math.sqrt(2) * rounding, math.sqrt(2) * u
    return (rounding + 4 * u * u, 0.0) if splits else (rounding, u)


def _skew(S: Tensor, V: Tensor, precision: Precision) -> Tensor:
    """S V where that is skew, from rounded factors."""
    return symmetric_product(rounded(S, precision), rounded(V, precision), sign=-1)
