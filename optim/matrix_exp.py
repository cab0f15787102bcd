"""The exponential of a skew matrix D applied to X, as a truncated series; exp(D) is never formed.

Two rules for the order. `spectral` (the default) proves the truncation error: the eigenvalues of a
skew D are i t with |t| <= theta, and |exp(i t) - p_k(i t)| <= theta^(k+1) / (k+1)! for the Taylor
polynomial p_k, so ||exp(D) - p_k(D)||_2 is at most that. Its theta comes from norms of the powers
that the series needs anyway. `frobenius` is the paper's table of ||D||_F, which for large matrices
is sqrt(n) times ||D||_2 and asks for the exact exponential almost always.

Neither pads, batches or communicates, so the result for one matrix does not depend on what else is
updated.

Reduced precision (`spectral` alone) never touches X: X exp(D) = X + X M, and only X M has rounded
factors. With u the unit roundoff of a factor:

- D itself is rounded, entry by entry, so it stays skew and only the direction changes, by at most u
  per entry. D^2 then has exact factors.
- T = D^3 / 6 + D^4 / 24 and what follows are small; their factors are rounded once where the proved
  error of T is below `term_limit`, else split.
- X M is split: its error is at most 4 u^2 |X| |M|, entry by entry.

The last two move X away from the manifold, in random directions. In s steps ||X^T X - I||_F grows
by about 0.7 u^2 ||M||_F sqrt(s) for X M, by 2^-24 sqrt(n s) because X is stored in float32, and for
T by no more than these. With TF32 the first is smaller than the second; with bfloat16 it is 3 to 7
times as large.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from optim.errors import OptimizerError
from optim.matmul import (
    Precision,
    float32_products,
    product,
    rounded,
    split_product,
    symmetric_product,
    unit_roundoff,
)

SeriesRule = Literal["spectral", "frobenius"]

TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-16}
"""Largest truncation error in the spectral norm that the spectral rule admits."""

FROBENIUS_RULE = ((0.05, 2), (0.25, 3), (1.0, 4))
"""LipNeXt: (upper limit of ||D||_F, order); from the last limit on, the exponential is exact."""

# Increments beyond this spectral norm are cut into substeps. The rounding error of the series
# grows like exp(norm), its cost per unit of norm falls slowly; 2 loses less than three bits.
_SUBSTEP_NORM = 2.0

LARGEST_NORM = 1e3
"""No rotation by more than this is meant; a broken gradient must not become hours of substeps."""

_ROOM = 8.0
"""By how much `term_error`, a bound, may exceed the other errors of a step; it is some 8 times what
is measured."""


# -- moves whose norms leave the device together ---------------------------------------------------


Move = Generator[Tensor | None, list[float], None]
"""X on its way along D. It yields norms on the device, 1-D, and is sent their values, until its
series is decided; then None; and at last X's successor. Norms have to wait for the device and may
wait for those of other moves; until the last `next`, X, D and its powers are held."""


@dataclass
class Expected:
    """What the last move of a matrix has needed, and the next one probably needs.

    It decides what is computed before the first norms are read, and so how often the host waits.
    What is taken follows from the norms alone: where the expectation was wrong the term is computed
    again, and the move is the same bit for bit.
    """

    third: tuple[int, bool] | None = None
    """Which third-order term: 3 or 4, of `fast` its form; whether its factors are split."""


class Decisions:
    """Moves that have begun and whose series are decided together."""

    def __init__(self) -> None:
        self._asked: list[tuple[Move, Tensor]] = []

    def begin(self, move: Move) -> None:
        """Queue what a move computes before its norms are read."""
        self._asked.append((move, cast(Tensor, next(move))))

    def take(self) -> None:
        """Decide all moves that have begun.

        The host waits once, and once more where a move needs another term than was expected.
        """
        while self._asked:
            moves, asked = zip(*self._asked, strict=True)
            wanted = (
                (move, move.send(values)) for move, values in zip(moves, read(asked), strict=True)
            )
            self._asked = [(move, more) for move, more in wanted if more is not None]


def finished(move: Move) -> Tensor:
    """X's successor, of a move whose series is decided."""
    return cast(Tensor, next(move))


def taken(move: Move) -> Tensor:
    """X's successor, of a move that waits for no other one."""
    decisions = Decisions()
    decisions.begin(move)
    decisions.take()
    return finished(move)


def norms(*matrices: Tensor) -> Tensor:
    """Frobenius norms, summed up by rows, float64: those of a matrix whatever stands beside it."""
    rows = (torch.linalg.vector_norm(A, dim=1).double() for A in matrices)
    return torch.stack([torch.linalg.vector_norm(row) for row in rows])


def read(asked: Sequence[Tensor]) -> list[list[float]]:
    """The values of 1-D tensors, with one host synchronisation."""
    values = iter(torch.cat([numbers.double() for numbers in asked]).tolist())
    return [[next(values) for _ in range(len(numbers))] for numbers in asked]


# -- the exponential -------------------------------------------------------------------------------


def apply_exponential(
    X: Tensor, D: Tensor, rule: SeriesRule = "spectral", precision: Precision = "full"
) -> Tensor:
    """X exp(D) for skew D.

    Args:
        X: Matrix (n, n), float32 or float64.
        D: Skew increment (n, n), same dtype and device.
        rule: See the module.
        precision: Of the products in float32; float64 is always full.

    Returns:
        A new (n, n) tensor, equal to X when D is zero. NaN when D is not finite or its norm is
        beyond 1e3: raising on the one rank that owns the matrix would leave the others waiting in
        their collective.

    Raises:
        OptimizerError: The rule is the paper's and the precision is reduced.
    """
    with float32_products(precision):
        return taken(exponential_move(X, D, rule, precision, Expected()))


def exponential_move(
    X: Tensor, D: Tensor, rule: SeriesRule, precision: Precision, expected: Expected
) -> Move:
    """X exp(D) as a move, to be taken inside of `float32_products`; else as `apply_exponential`."""
    check_series(rule, precision)
    return _spectral(X, D, precision, expected) if rule == "spectral" else _frobenius(X, D)


def check_series(rule: SeriesRule, precision: Precision) -> None:
    """Raise OptimizerError unless the rule's series has an error analysis at this precision."""
    if rule == "frobenius" and precision != "full":
        raise OptimizerError(
            f"series 'frobenius' is computed in full precision only, not in {precision!r}: "
            "take series 'spectral'"
        )


# -- the spectral rule ---------------------------------------------------------------------------


def _spectral(X: Tensor, D: Tensor, precision: Precision, expected: Expected) -> Move:
    """Even order 2j costs j + 1 products: D^2, one for every two further orders, and X M."""
    factor = rounded(D, precision)
    D, square = factor.to(D.dtype), symmetric_product(factor, factor)
    del factor
    ahead = expected.third
    term = None if ahead is None else _term(D, square, ahead[1], precision)
    m1, m2, *third = yield norms(D, square, *([] if term is None else [term]))
    m1, m2 = m1 * m1, m2 * m2
    rounding = product_rounding(D, precision)
    theta = spectral_bound(m1, m2, rounding)
    if not theta <= LARGEST_NORM:
        yield None
        yield torch.full_like(X, math.nan)
        return
    substeps = max(1, math.ceil(theta / _SUBSTEP_NORM))
    if substeps > 1:
        ahead, D, square = None, D / substeps, square / substeps**2
        m1, m2, theta = m1 / substeps**2, m2 / substeps**4, theta / substeps
    order = order_of(theta, TOLERANCE[D.dtype])
    u = unit_roundoff(D.dtype, precision)
    splits = u > 0 and term_error(m1, m2, theta, 0.0, u) > term_limit(D.shape[0], m1, u)
    expected.third = (3, splits) if order > 4 and substeps == 1 else None
    if ahead is None or ahead[1] != splits or order == 2:
        term = None
    if order > 4:  # the third moment often proves that 4 is enough
        if term is None:
            term = _term(D, square, splits, precision)
            third = yield norms(term)
        if splits:
            rounding, u = rounding + 4 * u * u, 0.0
        for _ in range(3):  # what bounds theta better bounds the error of the term better
            known = third[0], term_error(m1, m2, theta, rounding, u)
            theta = min(theta, spectral_bound(m1, m2, rounding, third=known))
        order = order_of(theta, TOLERANCE[D.dtype])
    yield None
    M = _increment(D, square, term, order, splits, precision)
    del D, square, term
    for _ in range(substeps):
        X = moved(X, M, precision)
    yield X


def _term(D: Tensor, square: Tensor, splits: bool, precision: Precision) -> Tensor:
    """D^3 / 6 + D^4 / 24."""
    multiply = split_product if splits else product
    return multiply(square, torch.add(D, square, alpha=0.25), precision).mul_(1 / 6)


def _increment(
    D: Tensor, square: Tensor, term: Tensor | None, order: int, splits: bool, precision: Precision
) -> Tensor:
    """M = exp(D) - I to an even order; `term` is that of `_term` where it is known already.

    With T_1 = D + D^2 / 2 and T_j = D^(2j-1) / (2j-1)! + D^(2j) / (2j)!, the first part skew and
    the second symmetric, T_(j+1) = D^2 (a skew(T_j) + b sym(T_j)). Horner's rule on X would need
    2j products.
    """
    M = torch.add(D, square, alpha=0.5)
    if order == 2:
        return M
    multiply: Callable[[Tensor, Tensor, Precision], Tensor] = split_product if splits else product
    if term is None:
        term = _term(D, square, splits, precision)
    M += term
    for power in range(5, order, 2):
        a, b = 1 / ((power - 1) * power), 1 / (power * (power + 1))
        mixed = torch.add(term.mT.contiguous().mul_((b - a) / 2), term, alpha=(a + b) / 2)
        term = multiply(square, mixed, precision)
        M += term
    return M


def moved(X: Tensor, M: Tensor, precision: Precision) -> Tensor:
    """X + X M."""
    if unit_roundoff(X.dtype, precision) == 0.0:
        return torch.addmm(X, X, M)
    return split_product(X, M, precision).add_(X)


def order_of(theta: float, tolerance: float) -> int:
    """Smallest even order k >= 2 with theta^(k+1) / (k+1)! <= tolerance."""
    order, error = 2, theta**3 / 6
    while error > tolerance:
        order += 2
        error *= theta * theta / (order * (order + 1))
    return order


def product_rounding(D: Tensor, precision: Precision = "full") -> float:
    """Bound c of the rounding of an n x n product P Q: ||fl(PQ) - PQ||_F <= c ||P||_F ||Q||_F.

    Higham, Accuracy and Stability, 3.5: c = n u / (1 - n u) for any order of summation, with u the
    unit roundoff of D's dtype, and twice that where tensor cores may cut off instead of rounding.
    The rounding of factors is not in it (`optim.matmul`).
    """
    truncates = unit_roundoff(D.dtype, precision) > 0.0
    n_u = D.shape[0] * torch.finfo(D.dtype).eps / (1 if truncates else 2)
    return n_u / (1 - n_u)


def term_error(
    m1: float,
    m2: float,
    theta: float,
    rounding: float,
    u: float,
    skew: float = 1 / 6,
    symmetric: float = 1 / 24,
) -> float:
    """Bound of ||fl(T) - T||_F, T = skew D^3 + symmetric D^4, for ||D||_2 <= theta.

    T = S V with S the computed D^2 and V = skew D + symmetric S: the product's own error, that of S
    times ||V||_2, and that of rounding S and V, each to within u of its entries. The first
    arguments are those of `spectral_bound`.
    """
    f1, f2 = math.sqrt(m1), math.sqrt(m2)
    bound = theta * theta
    spectral_V, frobenius_V = skew * theta + symmetric * bound, skew * f1 + symmetric * f2
    own = 2 * rounding * (f2 * frobenius_V + m1 * (spectral_V + symmetric * f2))
    spectral_S = bound + rounding * m1
    factors = f2 * (spectral_V + symmetric * rounding * m1) + (spectral_S + u * f2) * frobenius_V
    return own + u * factors


def term_limit(n: int, m1: float, u: float) -> float:
    """Largest proved error of T for which its factors are rounded once.

    It is near what X M and storing X cost anyway; the arguments are n, ||D||_F^2 and the unit
    roundoff of a factor.
    """
    return _ROOM * (2.0**-24 * math.sqrt(n) + 4 * u * u * math.sqrt(m1))


def spectral_bound(
    m1: float, m2: float, rounding: float, third: tuple[float, float] | None = None
) -> float:
    """Upper bound theta of ||D||_2 for skew D from the moments of l = t^2 over its eigenvalues i t.

    Non-zero eigenvalues come in pairs +-i t, so the largest l, L, counts twice in every sum over
    a function f(l) >= 0: 2 f(L) <= sum f(l). With m_j the sum of l^j = ||D^j||_F^2:

    - f = l and l^2: L <= m1 / 2 and L <= sqrt(m2 / 2);
    - f = l (l - c)^2 with c = m2 / m1: L (L - c)^2 <= (m3 - 2 c m2 + c^2 m1) / 2 = R. For a
      generic D this is within 1.3 to 1.9 of ||D||_2 at n = 512 to 4096, the others within 4.

    m3 is not computed: T = D^3 / 6 + D^4 / 24 has a skew and a symmetric part, which are
    orthogonal, so 36 ||T||_F^2 >= m3, hardly more for small D.

    Args:
        m1: ||D||_F^2.
        m2: ||S||_F^2 with S the computed D^2.
        rounding: `product_rounding`. Products are charged with it, and the rest, which is
            element-wise or a norm by rows, with as much again.
        third: ||T||_F with T the computed term, and its `term_error`.

    Returns:
        theta; not finite if m1 or m2 is not. Squares that underflow belong to a D far below
        the limit of order 2.
    """
    f2 = math.sqrt(m2)
    # ||S - D^2||_F <= rounding ||D||_F^2.
    e2 = 2 * rounding * m1
    low, high = max(f2 - e2, 0.0) ** 2, (f2 + e2) ** 2
    bound = min(m1 * (1 + rounding) / 2, math.sqrt(high / 2))
    theta = math.sqrt(bound)
    if third is None or not math.isfinite(theta + third[0]) or m1 == 0.0:
        return theta
    m3 = 36 * sum(third) ** 2
    c = m2 / m1
    right = max((m3 - 2 * c * low + c * c * m1 * (1 + rounding)) / 2, 0.0)
    # Newton from above on a function that is convex there: every iterate is a bound.
    L = c + right ** (1 / 3)
    for _ in range(4):
        if c < L:
            L -= (L * (L - c) ** 2 - right) / ((L - c) * (3 * L - c))
    return math.sqrt(min(bound, L * (1 + 1e-12)))


# -- the rule of the paper -----------------------------------------------------------------------


def frobenius_order(norm_F: float) -> int | None:
    """Order for an increment of Frobenius norm `norm_F` in LipNeXt.

    Returns:
        2 below 0.05, 3 below 0.25, 4 below 1, and None (exact exponential) from 1 on.
    """
    return next((order for limit, order in FROBENIUS_RULE if norm_F < limit), None)


def _frobenius(X: Tensor, D: Tensor) -> Move:
    norm_F, norm_1 = yield torch.stack(
        (torch.linalg.matrix_norm(D), torch.linalg.matrix_norm(D, ord=1))
    )
    yield None
    # For skew D both are upper bounds of ||D||_2: singular values come in pairs, and D is normal.
    norm_2 = min(norm_F / math.sqrt(2.0), norm_1)
    order = frobenius_order(norm_F)
    if not norm_2 <= LARGEST_NORM:
        X = torch.full_like(X, math.nan)
    elif order is not None:
        X = _horner(X, D, order)
    else:
        substeps = math.ceil(norm_2 / _SUBSTEP_NORM)
        terms = taylor_terms(norm_2 / substeps, D.dtype)
        for _ in range(substeps):
            X = _horner(X, D, terms, scale=1.0 / substeps)
    yield X


def taylor_terms(norm: float, dtype: torch.dtype) -> int:
    """Smallest order whose Taylor remainder of exp at spectral norm `norm` is below round-off.

    The remainder after order k is at most `norm^(k+1)/(k+1)! / (1 - norm/(k+2))`; it is compared
    with half the machine epsilon, relative to the norm 1 of an orthogonal factor.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    order, term = 1, norm * norm / 2
    while norm >= order + 2 or term / (1 - norm / (order + 2)) > unit_roundoff:
        order += 1
        term *= norm / (order + 1)
    return order


def _horner(X: Tensor, D: Tensor, order: int, scale: float = 1.0) -> Tensor:
    """X (I + A + ... + A^order / order!) with A = scale D, by Y <- X + Y A / i for i = k..1."""
    Y = X
    for i in range(order, 0, -1):
        Y = torch.addmm(X, Y, D, alpha=scale / i)
    return Y
