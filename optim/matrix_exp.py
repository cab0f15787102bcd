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
from collections.abc import Callable
from typing import Literal

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
    check_series(rule, precision)
    with float32_products(precision):
        return _spectral(X, D, precision) if rule == "spectral" else _frobenius(X, D)


def check_series(rule: SeriesRule, precision: Precision) -> None:
    """Raise OptimizerError unless the rule's series has an error analysis at this precision."""
    if rule == "frobenius" and precision != "full":
        raise OptimizerError(
            f"series 'frobenius' is computed in full precision only, not in {precision!r}: "
            "take series 'spectral'"
        )


# -- the spectral rule ---------------------------------------------------------------------------


def _spectral(X: Tensor, D: Tensor, precision: Precision) -> Tensor:
    """Even order 2j costs j + 1 products: D^2, one for every two further orders, and X M."""
    factor = rounded(D, precision)
    D, square = factor.to(D.dtype), symmetric_product(factor, factor)
    m1, m2 = (norm * norm for norm in norms(D, square))
    theta = spectral_bound(m1, m2, product_rounding(D, precision))
    if not theta <= LARGEST_NORM:
        return torch.full_like(X, math.nan)
    substeps = max(1, math.ceil(theta / _SUBSTEP_NORM))
    if substeps > 1:
        D, square = D / substeps, square / substeps**2
        m1, m2, theta = m1 / substeps**2, m2 / substeps**4, theta / substeps
    M = _increment(D, square, m1, m2, theta, precision)
    del factor, D, square
    for _ in range(substeps):
        X = moved(X, M, precision)
    return X


def _increment(
    D: Tensor, square: Tensor, m1: float, m2: float, theta: float, precision: Precision
) -> Tensor:
    """M = exp(D) - I for ||D||_2 <= theta.

    With T_1 = D + D^2 / 2 and T_j = D^(2j-1) / (2j-1)! + D^(2j) / (2j)!, the first part skew and
    the second symmetric, T_(j+1) = D^2 (a skew(T_j) + b sym(T_j)). Horner's rule on X would need
    2j products.
    """
    tolerance = TOLERANCE[D.dtype]
    order = order_of(theta, tolerance)
    M = torch.add(D, square, alpha=0.5)
    if order == 2:
        return M
    rounding, u = product_rounding(D, precision), unit_roundoff(D.dtype, precision)
    multiply: Callable[[Tensor, Tensor, Precision], Tensor] = product
    if u and term_error(m1, m2, theta, 0.0, u) > term_limit(D.shape[0], m1, u):
        multiply, rounding, u = split_product, rounding + 4 * u * u, 0.0
    term = multiply(square, torch.add(D, square, alpha=0.25), precision).mul_(1 / 6)
    if order > 4:  # the third moment often proves that 4 is enough
        norm = norms(term)[0]
        for _ in range(3):  # what bounds theta better bounds the error of the term better
            third = norm, term_error(m1, m2, theta, rounding, u)
            theta = min(theta, spectral_bound(m1, m2, rounding, third=third))
        order = order_of(theta, tolerance)
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


def norms(*matrices: Tensor) -> list[float]:
    """Frobenius norms, summed up by rows, with one host synchronisation."""
    rows = torch.stack([torch.linalg.vector_norm(A, dim=1) for A in matrices])
    return torch.linalg.vector_norm(rows.double(), dim=1).tolist()


# -- the rule of the paper -----------------------------------------------------------------------


def frobenius_order(norm_F: float) -> int | None:
    """Order for an increment of Frobenius norm `norm_F` in LipNeXt.

    Returns:
        2 below 0.05, 3 below 0.25, 4 below 1, and None (exact exponential) from 1 on.
    """
    return next((order for limit, order in FROBENIUS_RULE if norm_F < limit), None)


def _frobenius(X: Tensor, D: Tensor) -> Tensor:
    # One host synchronisation for both norms: the order is a branch on the host.
    norm_F, norm_1 = torch.stack(
        (torch.linalg.matrix_norm(D), torch.linalg.matrix_norm(D, ord=1))
    ).tolist()
    # For skew D both are upper bounds of ||D||_2: singular values come in pairs, and D is normal.
    norm_2 = min(norm_F / math.sqrt(2.0), norm_1)
    if not norm_2 <= LARGEST_NORM:
        return torch.full_like(X, math.nan)
    order = frobenius_order(norm_F)
    if order is not None:
        return _horner(X, D, order)
    substeps = math.ceil(norm_2 / _SUBSTEP_NORM)
    terms = taylor_terms(norm_2 / substeps, D.dtype)
    for _ in range(substeps):
        X = _horner(X, D, terms, scale=1.0 / substeps)
    return X


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
