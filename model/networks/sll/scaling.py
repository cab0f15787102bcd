"""Diagonals T with G <= T, for layers that one matrix inequality makes 1-Lipschitz.

h: inner channels (rows), c: input channels, k: side of the kernel; a dense weight has k = 1.

Let the rows of V, a matrix (h, c) or a convolution (h, c, k, k) on the infinite grid, have the Gram
operator G = V V^T, and let T be diagonal with G <= T (the Loewner order). Then

- x -> x - 2 V^T T^-1 relu(V x + b) is 1-Lipschitz (arXiv 2303.03169, theorem 3), and
- ||T^-1/2 V|| <= 1 (arXiv 2208.03160, theorem 1, for the transposed weight).

Zero padding restricts the operator to fewer points and wrapping folds it: both keep G <= T.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.certification.dot_products import convolve
from model.certification.rounding import SLACK, U64, Program, gamma

LARGEST_LOG_Q = 32.0
"""Beyond this the exponential of a weight's logarithm may overflow: nothing is certified."""
_SQUARINGS = {2: 6, 4: 3}
_BLOCK, _BLOCK_STEPS = 8, 8
_GRID = 16


def gram(v: Tensor) -> Tensor:
    """V V^T: shape (h, h), or the kernel (h, h, 2k - 1, 2k - 1) of a convolution.

    In float64, in which evaluation and bounds compute it, its rounding is that of products.
    """
    if v.ndim == 2:
        return v @ v.mT
    convolution = convolve if v.dtype == torch.float64 else F.conv2d
    return convolution(v, v, padding=v.shape[-1] - 1)


def row_sums(v: Tensor, log_q: Tensor | None = None) -> Tensor:
    """T of AOL and SLL, T_i = sum over j and offsets of |G_ij| q_j / q_i, shape (h,).

    T - G is similar to a matrix whose Gershgorin discs lie in the right half plane. One dense
    product of order h x c x h, or its convolution.

    Args:
        v: the weight.
        log_q: logarithms of q, shape (h,); q = 1 by default, which is AOL's T.
    """
    g = gram(v).abs()
    if v.ndim == 4:
        g = g.sum((2, 3))
    return g.sum(1) if log_q is None else (g @ log_q.exp()) * (-log_q).exp()


def norm_bound(v: Tensor) -> Tensor:
    """T of CPL without estimation, a number >= ||V||^2: ||G^(2^m)||_inf^(1 / 2^m).

    The norm is the largest row sum of absolute values, an upper bound of the spectral norm, and
    ||G^2|| = ||G||^2. A dense G takes m = 6 squarings, which leaves at most the factor h^(1/128); a
    kernel, whose side doubles each time, takes 3.
    """
    powers, scales = _powers(v)
    bound = powers[-1].abs().flatten(1).sum(1).amax()
    for scale in scales[:0:-1]:
        bound = (scale * bound).sqrt()
    return scales[0] * bound


def _powers(v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """G, G^2, G^4 ..., each divided by a power of two, and these."""
    powers: list[Tensor] = []
    scales: list[Tensor] = []
    for i in range(_SQUARINGS[v.ndim] + 1):
        g = gram(powers[-1] if i else v)
        # A power of two: the scaling itself has no rounding error.
        scales.append(_power_of_two(g))
        powers.append(g / scales[-1])
    return powers, scales


def _power_of_two(g: Tensor) -> Tensor:
    largest = g.detach().abs().amax()
    return torch.where(largest > 0, torch.exp2(largest.log2().floor()), 1.0)


def norm_estimate(v: Tensor) -> Tensor:
    """||V||^2 from below, within some per cent, for training.

    A function of the weight alone, so that a resumed run and every number of ranks see the same:
    block power iteration from a fixed start for a dense weight, whose gradient is that of the
    Rayleigh quotient, and the largest of the grid's frequencies for a convolution.
    """
    if v.ndim == 4:
        symbol = torch.fft.rfft2(v, (_GRID, _GRID)).permute(2, 3, 0, 1)
        return torch.linalg.eigvalsh(symbol @ symbol.mH)[..., -1].amax()
    with torch.no_grad():
        index = torch.arange(v.shape[1] * _BLOCK, device=v.device, dtype=v.dtype)
        block = (index + 1).cos().view(v.shape[1], _BLOCK)[:, : min(_BLOCK, *v.shape)]
        # Vectors are rows: V times a narrow matrix takes several times as long on a CPU.
        for _ in range(_BLOCK_STEPS):
            rows = torch.linalg.qr(block).Q.mT.contiguous()
            block = ((rows @ v.mT) @ v).mT
        rows = torch.linalg.qr(block).Q.mT.contiguous()
        right, _, left = torch.linalg.svd(rows @ v.mT, full_matrices=False)
        column, row = left[0], right[:, 0] @ rows
    return (column @ (v @ row)).square()


def inverse(t: Tensor) -> Tensor:
    """1 / t, and 0 where t is 0: there the row of V is 0 as well."""
    return torch.where(t > 0, 1 / torch.where(t > 0, t, 1.0), 0.0)


def row_sums_error(v: Tensor, log_q: Tensor | None, t: Tensor, program: Program) -> float:
    """Relative error of every computed T_i of `row_sums`; infinite where nothing can be said.

    A computed G_ij errs by at most kappa (|V| |V|^T)_ij, the sums and factors add their own.

    Args:
        v: stored weight, float64.
        log_q: stored logarithms of q, float64.
        t: row_sums(v, log_q) in float64.
        program: the arithmetic; T is computed in float64 from its copy of the weights.
    """
    largest = 0.0 if log_q is None else float(log_q.abs().max())
    used = t > 0
    if largest > LARGEST_LOG_Q or not _in_range(t[used], program):
        return math.inf
    # (|V| |V|^T r)_i over all offsets: the sums over the kernel separate.
    magnitude = v.abs() if v.ndim == 2 else v.abs().sum((2, 3))
    r = torch.ones_like(t) if log_q is None else log_q.exp()
    spread = (magnitude @ (magnitude.mT @ r)) / r
    ratio = float((spread[used] / t[used]).max()) * SLACK if bool(used.any()) else 0.0
    entries = combined(program.weight, program.weight, gamma(v[0].numel(), U64)) * ratio
    # Two exponentials: 4 units each, and what rounding their arguments does.
    exponent = 2 * (program.weight * largest + 4 * U64) * (1 + 2.0**-3)
    sums = gamma(v.shape[0] * _side(v) ** 2 + 4, U64)
    return combined(entries, exponent, sums) * (1 + 2.0**-20)


def norm_bound_error(v: Tensor, t: Tensor, program: Program) -> float:
    """Relative error of a computed `norm_bound`; infinite where nothing can be said.

    With r the error of G^(2^j) relative to its spectral norm, a squaring gives 2 r + r^2 and its
    own rounding. A spectral norm is at most the largest row sum of absolute values, at least the
    largest norm of a row.

    Args:
        v: stored weight, float64.
        t: norm_bound(v) in float64.
        program: the arithmetic; T is computed in float64 from its copy of the weights.
    """
    if not _in_range(t, program):
        return math.inf if float(t) else 0.0
    copies = combined(program.weight, program.weight, gamma(v[0].numel(), U64))
    r = copies * (absolute_norm(v) / _longest_row(v)) ** 2
    *squared, last = _powers(v)[0]
    for power in squared:
        rounding = gamma(power[0].numel(), U64)
        r = combined(r, r, rounding * (absolute_norm(power) / _longest_row(power)) ** 2)
    terms = last[0].numel()
    error = (math.sqrt(terms) * r + gamma(terms + 4, U64)) * (1 + 2.0**-10)
    if not error < 0.5:
        return math.inf
    # The root divides a relative error below 1/2 by 2^m, and each root adds its own rounding.
    return combined(2 * error / 2 ** len(squared), 4 * U64) * (1 + 2.0**-20)


def absolute_norm(scaled: Tensor) -> float:
    """Bound of || |W| || of a weight (h, c) or a convolution (h, c, k, k), float64."""
    magnitude = scaled.abs() if scaled.ndim == 2 else scaled.abs().sum((2, 3))
    return math.sqrt(float(magnitude.sum(0).max()) * float(magnitude.sum(1).max())) * SLACK


def _longest_row(v: Tensor) -> float:
    """Largest norm of a row, at most ||V||."""
    return float(v.flatten(1).norm(dim=1).max()) / SLACK


def _side(v: Tensor) -> int:
    """Side of the Gram kernel, 1 for a dense weight."""
    return 2 * v.shape[-1] - 1 if v.ndim == 4 else 1


def combined(*errors: float) -> float:
    """(1 + e_1) (1 + e_2) ... - 1 without the cancellation of the 1."""
    total = 0.0
    for error in errors:
        total = error + total * (1 + error)
    return total


def _in_range(t: Tensor, program: Program) -> bool:
    """Whether no T_i, and no product on the way to it, comes near overflow or underflow."""
    return bool(((t >= 1 / program.limit) & (t <= program.limit)).all())
