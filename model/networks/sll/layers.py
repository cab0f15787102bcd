"""Layers of SLL, CPL and AOL: 1-Lipschitz in l2 for any weights (`scaling.py` has the theorem).

Dense layers take (B, d), convolutions (B, c, H, W) with zero padding that keeps the size. Every
layer reads its own parameters in its own forward only.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.certification.dot_products import convolve, transposed
from model.certification.rounding import FLOAT64, SLACK, ErrorState, Program
from model.errors import ModelError
from model.networks.init import set_initial
from model.networks.sll.scaling import (
    absolute_norm,
    combined,
    inverse,
    norm_bound,
    norm_bound_error,
    norm_estimate,
    row_sums,
    row_sums_error,
)
from model.networks.tensor_ops import at_least_float32

Scaling = Literal["sll", "cpl"]
_LARGEST_ERROR = 0.25
"""A computed T that may be further off than this says nothing."""


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """What the rounding bounds need to know of T^-1/2 V, whose norm is at most 1."""

    absolute: float
    """Bound of its norm with all entries replaced by their absolute values."""
    bias: float
    """||T^-1/2 b||, or ||b|| where no T acts on it, for one position."""
    error: float
    """Relative error of every 1 / T_i as the program computes it, before any rounding of it."""
    root: float
    """Largest of sqrt(T_i) and 1 / sqrt(T_i): what separates scaled from actual sizes."""


def _rescaled(
    v: Tensor, t: Tensor, bias: Tensor, error: Callable[[Program], float], program: Program
) -> Rescaled:
    """Facts from V, T and the scaled bias in float64; `error` bounds a computed T."""
    if not bool(v.isfinite().all() and bias.isfinite().all()):
        raise ModelError("a layer holds values that are not finite")
    used = t[t > 0]
    here, there = error(FLOAT64), error(program)
    if max(here, there) > _LARGEST_ERROR:
        return Rescaled(math.inf, math.inf, math.inf, math.inf)
    slack = SLACK * (1 + here)
    root = inverse(t).sqrt().view(-1, *[1] * (v.ndim - 1))
    sizes = torch.cat([used, 1 / used, torch.ones(1, dtype=t.dtype, device=t.device)])
    return Rescaled(
        absolute=absolute_norm(v * root) * slack,
        bias=float(bias.norm()) * slack,
        error=there / (1 - there),
        root=float(sizes.max()) ** 0.5 * slack,
    )


class RescaledLayer(nn.Module):
    """A weight V, (rows, columns) or (rows, columns, k, k), and a bias of its rows.

    Args:
        rows: rows of V.
        columns: columns of V.
        kernel: side k of the convolution, 0 for a dense layer.
        positions: pixels of the grid, 1 for a dense layer.
        initial: kind of V's initial value.
    """

    def __init__(self, rows: int, columns: int, kernel: int, positions: int, initial: str) -> None:
        super().__init__()
        self.kernel, self.positions = kernel, positions
        shape = (rows, columns, kernel, kernel) if kernel else (rows, columns)
        self.weight = set_initial(nn.Parameter(torch.empty(shape)), initial)
        self.bias = set_initial(nn.Parameter(torch.empty(rows)), "zeros")
        self._known: tuple[object, Rescaled] | None = None

    def _wide(self, x: Tensor) -> Tensor:
        """What T is computed in: float64 in evaluation, where its error costs certified radius."""
        return at_least_float32(x) if self.training else x.double()

    def _apply_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """V x + b; in evaluation by products, see model.certification.dot_products."""
        if not self.kernel:
            return F.linear(x, weight, self.bias)
        if self.training:
            return F.conv2d(x, weight, self.bias, padding=self.kernel // 2)
        return convolve(x, weight, padding=self.kernel // 2) + self.bias[:, None, None]

    def _inner(self) -> int:
        """Terms of a dot product of V x + b."""
        return self.weight[0].numel() + 1

    @torch.no_grad()
    def rescaled(self, program: Program) -> Rescaled:
        """Facts of the stored weights for one program, computed once per value."""
        key = (program, self._versions())
        if self._known is None or self._known[0] != key:
            self._known = key, self._rescale(program)
        return self._known[1]

    def _versions(self) -> tuple[object, ...]:
        """Changes with every assignment to a parameter."""
        return tuple((p.data_ptr(), p.dtype, p._version) for p in self.parameters())

    def _rescale(self, program: Program) -> Rescaled:
        raise NotImplementedError

    @torch.no_grad()
    def carry(self, state: ErrorState) -> None:
        """Bounds of the output from those of the input, in place (docs/explanation/families.md)."""
        known = self.rescaled(state.program)
        if not math.isfinite(known.error):
            state.error = torch.full_like(state.error, math.inf)
            return
        self._carry(state, known, known.bias * math.sqrt(self.positions))

    def _carry(self, state: ErrorState, known: Rescaled, bias: float) -> None:
        """See carry; `bias` is the norm of the scaled bias over all positions."""
        raise NotImplementedError


class Residual(RescaledLayer):
    """x - 2 V^T T^-1 relu(V x + b), T of SLL or CPL.

    SLL's dense layer learns q; its convolution has q = 1, as in the corrected reference code, where
    q cancels. CPL's T is an estimate in training and the bound `norm_bound` in evaluation, so the
    certified function is 1-Lipschitz for any weights.

    Args:
        channels: channels or features of input and output.
        inner: rows of V.
        kernel: side of the convolution, 0 for a dense layer.
        positions: pixels of the grid, 1 for a dense layer.
        scaling: `sll` or `cpl`.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        *,
        kernel: int = 0,
        positions: int = 1,
        scaling: Scaling,
    ) -> None:
        super().__init__(inner, channels, kernel, positions, "xavier_normal")
        self.scaling = scaling
        self._bound: tuple[object, Tensor] | None = None
        self.log_q: nn.Parameter | None = None
        if scaling == "sll" and not kernel:
            self.log_q = set_initial(nn.Parameter(torch.empty(inner)), "standard_normal")

    def forward(self, x: Tensor) -> Tensor:
        """Output of the input's shape."""
        t = inverse(self._diagonal(self._wide(self.weight))).to(x.dtype)
        if self.kernel:
            z = t.view(-1, 1, 1) * self._apply_rows(x, self.weight).relu()
            return x - 2 * self._transposed(z)
        return x - 2 * F.linear(t * self._apply_rows(x, self.weight).relu(), self.weight.mT)

    def _transposed(self, z: Tensor) -> Tensor:
        """V^T z of a convolution."""
        if self.training:
            return F.conv_transpose2d(z, self.weight, padding=self.kernel // 2)
        return convolve(z, transposed(self.weight), padding=self.kernel // 2)

    def _diagonal(self, v: Tensor) -> Tensor:
        """T, shape (inner,)."""
        if self.scaling == "sll":
            return row_sums(v, None if self.log_q is None else self._wide(self.log_q))
        number = norm_estimate(v) if self.training else self._norm_bound(v.detach())
        return number.expand(v.shape[0])

    def _norm_bound(self, v: Tensor) -> Tensor:
        """The bound of the stored weight, computed once per value: an attack asks many times."""
        key = self._versions()
        if self._bound is None or self._bound[0] != key:
            self._bound = key, norm_bound(v)
        return self._bound[1]

    def _rescale(self, program: Program) -> Rescaled:
        v = self.weight.double()
        log_q = None if self.log_q is None else self.log_q.double()

        def error(of: Program) -> float:
            if self.scaling == "cpl":
                return norm_bound_error(v, norm_bound(v), of)
            return row_sums_error(v, log_q, row_sums(v, log_q), of)

        t = norm_bound(v).expand(len(v)) if self.scaling == "cpl" else row_sums(v, log_q)
        return _rescaled(v, t, self.bias.double() * inverse(t).sqrt(), error, program)

    def _carry(self, state: ErrorState, known: Rescaled, bias: float) -> None:
        """Everything is measured after scaling by T^-1/2."""
        program, size = state.program, state.computed
        # V x + b, then relu: exact, so the size is that of the exact value and its error.
        product = known.absolute * size + bias
        error = program.product(self._inner(), roundings=2) * product
        hidden = size + bias + error
        # T^-1, its cast and the product; what was wrong before passes T^-1/2 V with norm <= 1.
        scale = combined(known.error, program.wide, program.activation, program.activation)
        columns = self.weight[:, 0].numel()
        back = program.product(columns) * known.absolute * (1 + scale)
        state.error = state.error + 2 * (error + (scale + back) * hidden)
        state.norm = state.norm + 2 * bias
        state.error = state.error + program.activation * state.computed
        state.note(known.root * torch.maximum(product, hidden * (1 + scale) * known.absolute))
        state.note(state.computed)


class AlmostOrthogonal(RescaledLayer):
    """V T^-1/2 x + b with T_jj = sum_i |V^T V|_ij: AOL (arXiv 2208.03160).

    Args:
        columns: channels or features of the input.
        rows: of the output.
        kernel: side of the convolution, 0 for a dense layer.
        positions: pixels of the grid, 1 for a dense layer.
        initial: kind of V's initial value, `dirac` or `orthonormal`.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        *,
        kernel: int = 0,
        positions: int = 1,
        initial: str = "dirac",
    ) -> None:
        super().__init__(rows, columns, kernel, positions, initial)

    def forward(self, x: Tensor) -> Tensor:
        """Output, rows instead of columns."""
        v = self._wide(self.weight)
        root = inverse(row_sums(v.transpose(0, 1))).sqrt()
        scaled = v * root.view(-1, 1, 1) if self.kernel else v * root
        return self._apply_rows(x, scaled.to(x.dtype))

    def _rescale(self, program: Program) -> Rescaled:
        v = self.weight.double().transpose(0, 1)
        t = row_sums(v)

        def error(of: Program) -> float:
            return row_sums_error(v, None, t, of)

        return _rescaled(v, t, self.bias.double(), error, program)

    def _carry(self, state: ErrorState, known: Rescaled, bias: float) -> None:
        """A product with a matrix of norm <= 1 whose entries err relatively."""
        program = state.program
        # The root of 1 / T, the products with V and the stored copy of the result.
        entry = combined(known.error, *[program.wide] * 3, program.activation, program.weight)
        size = state.computed
        state.multiply(
            self._inner(),
            upper=1.0,
            absolute=known.absolute * (1 + entry),
            bias=bias,
            roundings=2,
        )
        state.error = state.error + entry * known.absolute * size
        state.note(state.computed * known.root)


def finish(
    blocks: Iterable[RescaledLayer], state: ErrorState, error: Tensor, largest_factor: float
) -> Tensor:
    """The error of a logit difference with what underflow may add; infinite near overflow.

    Args:
        blocks: layers that were carried through.
        state: bounds of the features.
        error: error without underflow, (B,).
        largest_factor: what the head multiplies an error of the features by, at most.
    """
    program = state.program
    operations, root = 0, 1.0
    for block in blocks:
        rows = block.weight.shape[0] + block.weight.shape[1]
        operations += 64 * block.weight.numel() * (block.positions + rows) * (rows + 64)
        root = max(root, block.rescaled(program).root)
    size = root**2 * max(1.0, largest_factor) * state.peak.clamp(min=1)
    underflow = operations * program.tiny * size
    return state.finish(error, underflow)


def max_min(x: Tensor) -> Tensor:
    """Maximum and minimum of neighbouring channels 2i and 2i + 1: a permutation of each pair.

    Args:
        x: shape (B, C, ...), C even.
    """
    pairs = x.unflatten(1, (-1, 2))
    return torch.stack([pairs.amax(2), pairs.amin(2)], 2).flatten(1, 2)
