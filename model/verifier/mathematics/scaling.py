"""T of SLL, CPL and AOL: V V^T <= T for any finite weights (docs/explanation/families.md).

V is a filter (h, c, k, k) on the infinite grid; a matrix is a filter with k = 1. G = V V^T.

    sll: T_i = sum_j,offsets |G_ij| q_j / q_i          (Gershgorin for D^-1 G D, D = diag q)
    cpl: T_i = (largest row sum of |G^(2^m)|)^(1/2^m)  (||G||^(2^m) = ||G^(2^m)||)
    aol: the first, of V^T and q = 1
"""

import math
from typing import NamedTuple

import numpy as np

from model.verifier.mathematics.convolution import gram
from model.verifier.mathematics.rounding import Floats, Program, U, combined, gamma


class Scaling(NamedTuple):
    """T and the relative error of 1 / T as a program computes it, delta."""

    inverse: Floats
    """1 / T, 0 where T is 0; shape (h,)."""
    delta: float


EXACT = Program("exact weights", 0.0, 0.0, 0.0, 0.0, 0.0, 2.0**500)
LARGEST_DELTA, LARGEST_EXPONENT = 0.25, 32.0


def row_sums(kernel: Floats, program: Program, log_q: Floats | None = None) -> Scaling:
    """T of `sll`; that of `aol` of the transposed filter."""
    rows, terms = len(kernel), kernel[0].size
    q = np.ones(rows) if log_q is None else np.exp(log_q)
    T = (np.abs(gram(kernel)).sum(axis=(2, 3)) @ q) / q
    # An entry of G errs by the given share of (|V| |V|^T)_ij.
    entry = combined(program.weights, program.weights, gamma(terms, U))
    taps = np.abs(kernel).sum(axis=(2, 3))
    sizes = (taps @ (taps.T @ q)) / q
    worst = float((sizes[T > 0] / T[T > 0]).max(initial=0.0))
    largest = 0.0 if log_q is None else float(np.abs(log_q).max())
    # Two exponentials of copies of log_q: e^x - 1 <= 1.125 x for x <= 0.2.
    exponential = 1.125 * 2 * (program.weights * largest + 4 * U)
    if largest > LARGEST_EXPONENT:
        exponential = math.inf
    numbers = rows * (2 * kernel.shape[-1] - 1) ** 2 + 4
    return _checked(T, combined(entry * worst, exponential, gamma(numbers, U)), program)


class Powers(NamedTuple):
    """T of `cpl`, one number for all rows, and what its rounding depends on."""

    T: float
    first: float
    """(|| |V| || / longest row of V)^2."""
    ratios: list[float]
    """(row-sum norm / longest row)^2 of G^(2^j), for every squaring."""
    terms: list[int]
    """Terms of the dot products of G, of every squaring, and of the row sums."""


def powers(kernel: Floats, squarings: int) -> Powers:
    """Square G again and again."""
    G, terms = gram(kernel), [kernel[0].size]
    longest = float(np.sqrt(np.square(kernel).sum(axis=(1, 2, 3)).max()))
    if longest == 0:
        return Powers(0.0, 0.0, [], [])
    taps = np.abs(kernel).sum(axis=(2, 3))
    size = math.sqrt(float(taps.sum(axis=0).max()) * float(taps.sum(axis=1).max()))
    ratios, exponent = [], 0.0
    for j in range(squarings):
        step = math.frexp(float(np.abs(G).max()))[1]
        G, exponent = np.ldexp(G, -step), exponent + step / 2**j
        longest_square = float(np.square(G).sum(axis=(1, 2, 3)).max())
        ratios.append(_largest_row_sum(G) ** 2 / longest_square)
        terms.append(G[0].size)
        G = gram(G)
    T = float(np.exp2(exponent)) * _largest_row_sum(G) ** (0.5**squarings)
    return Powers(T, (size / longest) ** 2, ratios, [*terms, G[0].size])


def norm_bound(known: Powers, rows: int, program: Program) -> Scaling:
    """T of `cpl` as a program computes it."""
    if not known.T:
        return _checked(np.zeros(rows), 0.0, program)
    # r: error of G^(2^j) relative to its norm, which is at least that of a row.
    r = combined(program.weights, program.weights, gamma(known.terms[0], U)) * known.first
    for ratio, terms in zip(known.ratios, known.terms[1:-1], strict=True):
        r = 2 * r + r * r + gamma(terms, U) * ratio
    # (1 + x)^(1 / 2^m) <= 1 + x / 2^m; twice that, and the root's own rounding.
    numbers, squarings = known.terms[-1], len(known.ratios)
    delta = 2 * (math.sqrt(numbers) * r + gamma(numbers, U)) / 2**squarings + 4 * U
    return _checked(np.full(rows, known.T), delta, program)


def _largest_row_sum(G: Floats) -> float:
    return float(np.abs(G).sum(axis=(1, 2, 3)).max())


def _checked(T: Floats, delta: float, program: Program) -> Scaling:
    positive = T[T > 0]
    limit = program.limit
    if positive.size and not (positive.min() >= 1 / limit and positive.max() <= limit):
        delta = math.inf
    # T (1 + d) means a relative error of at most d / (1 - d) of 1 / T.
    delta = delta / (1 - delta) if delta <= LARGEST_DELTA else math.inf
    with np.errstate(all="ignore"):
        return Scaling(np.where(T > 0, 1 / T, 0.0), delta)
