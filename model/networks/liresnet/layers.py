"""Layers that are 1-Lipschitz for any weights: LiResNet++ (2310.02513), BRONet (2505.15174).

They compute in float32 or wider, whatever the type of the weights.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.certification.dot_products import product
from model.certification.matrix_bounds import MatrixBound
from model.certification.rounding import FLOAT64, SLACK, ErrorState, Program
from model.networks.centering import Centering
from model.networks.init import set_initial
from model.networks.liresnet.cholesky import (
    ComputedBound,
    carry_reflection,
    computed_bound,
    entry_error,
    orthonormal_rows,
    rows_error,
    scaled_rows,
)
from model.networks.liresnet.fft import entrywise_error, images_of, spectrum, transform_error
from model.networks.tensor_ops import at_least_float32

CHOLESKY_SHARE = 1e-3
REFLECTION_SHARE = 1e-7
NECK_SHARE = 1e-5
"""eta of `orthonormal_rows`, as published for each kind of layer."""


class _Computed(nn.Module):
    """A layer whose operator is computed from one parameter; see `orthonormal_rows`.

    Args:
        shape: (rows, columns) of the stored values, gains not counted.
        depth: layers of the stack: X = [I; 0] + depth^-1/2 * gain * V. 0: X is the stored matrix.
        kind: kind of the initial value.
        share: eta.
    """

    def __init__(self, shape: tuple[int, int], *, depth: int, kind: str, share: float) -> None:
        super().__init__()
        self.rows, self.columns = shape
        self.depth, self.share = depth, share
        size = torch.empty(self.rows, self.columns + (depth > 0))
        self.weight = set_initial(nn.Parameter(size), kind)
        self._known: tuple[object, Tensor] | None = None

    def _x(self, weight: Tensor, *, fast: bool = False) -> Tensor:
        """X of the parameter's value, by a library's transforms where `fast`."""
        raise NotImplementedError

    def _q(self) -> Tensor:
        """Q in float32 or wider.

        In evaluation it is computed in float64, measured, rounded once, and kept while the weight
        stays: an attack asks many times, and what was measured is what is used.
        """
        if self.training:
            return orthonormal_rows(self._x(at_least_float32(self.weight), fast=True), self.share)
        key = (self.weight.data_ptr(), self.weight.dtype, self.weight._version)
        if self._known is not None and self._known[0] == key and not self._differentiated():
            return self._known[1]
        q = orthonormal_rows(self._x(self.weight.double()), self.share, measured=True)
        working = torch.promote_types(self.weight.dtype, torch.float32)
        q = q.to(working.to_complex() if q.is_complex() else working)
        if not q.requires_grad:
            self._known = key, q
        return q

    def _differentiated(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def stored(self, weight: Tensor) -> Tensor:
        """The part of X that is stored, (rows, columns)."""
        return scaled_rows(weight, self.depth) if self.depth else weight

    def identity(self, like: Tensor) -> Tensor:
        """The part of X that is not."""
        if not self.depth:
            return like.new_zeros(())
        return torch.eye(self.rows, self.columns, dtype=like.dtype, device=like.device)


class _Dense(_Computed):
    """What Q x and (I - 2 Q^* Q) x have in common."""

    transposed = False
    bias: nn.Parameter | None

    def _x(self, weight: Tensor, *, fast: bool = False) -> Tensor:
        """See _Computed."""
        x = self.identity(weight) + self.stored(weight)
        return x.mT if self.transposed else x

    @torch.no_grad()
    def bound(self, name: str, stored: Tensor) -> MatrixBound:
        """Proved bounds; `stored` is the value of the parameter `name`."""
        weight = stored.double()
        sizes = self.identity(weight) + self.stored(weight.abs())
        return computed_bound(
            stored,
            name,
            self._x(weight),
            size=sizes.square().sum() * SLACK,
            defect=entry_error(FLOAT64),
            share=self.share,
        )

    def _q_error(self, bound: MatrixBound, program: Program) -> float:
        m, k = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return rows_error(cast(ComputedBound, bound), m, k, entry_error(program), program)

    def _add_bias(self, state: ErrorState) -> None:
        if self.bias is not None:
            state.translate(float(self.bias.double().norm()) * SLACK)


class CholeskyDense(_Dense):
    """Q x + b, of LiResNet++.

    Args:
        inputs: columns of Q.
        outputs: rows of Q, at most `inputs`.
        depth: see _Computed; needs as many outputs as inputs.
        bias: add b.
    """

    def __init__(self, inputs: int, outputs: int, *, depth: int = 0, bias: bool = True) -> None:
        kind = "residual" if depth else "normal"
        super().__init__((outputs, inputs), depth=depth, kind=kind, share=CHOLESKY_SHARE)
        self.bias = set_initial(nn.Parameter(torch.empty(outputs)), "zeros") if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        q = self._q()
        bias = None if self.bias is None else at_least_float32(self.bias)
        return F.linear(x.to(q.dtype), q, bias)

    def carry(self, state: ErrorState, bound: MatrixBound) -> None:
        """Carry bounds of the input through the layer."""
        error, size = self._q_error(bound, state.program), state.computed
        absolute = bound.absolute + math.sqrt(self.rows) * error
        state.multiply(self.columns + 1, upper=1.0, absolute=absolute, copies=0)
        state.error = state.error + error * size
        self._add_bias(state)


class DenseReflection(_Dense):
    """The first `outputs` rows of (I - 2 Q^* Q) x, plus b, of BRONet.

    Args:
        inputs: columns of Q.
        outputs: rows of the result, at most `inputs`.
        rank: rows of Q.
        depth: see _Computed.
        bias: add b.
    """

    def __init__(
        self, inputs: int, outputs: int, *, rank: int, depth: int = 0, bias: bool = True
    ) -> None:
        # With a gain for every output, V is stored as (inputs, rank).
        self.transposed = depth > 0
        super().__init__(
            (inputs, rank) if depth else (rank, inputs),
            depth=depth,
            kind="residual" if depth else "normal",
            share=REFLECTION_SHARE if depth else NECK_SHARE,
        )
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        self.bias = set_initial(nn.Parameter(torch.empty(outputs)), "zeros") if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        q = self._q()
        x = x.to(q.dtype)
        y = x[..., : self.outputs] - 2 * F.linear(F.linear(x, q), q[:, : self.outputs].mT)
        return y if self.bias is None else y + at_least_float32(self.bias)

    def carry(self, state: ErrorState, bound: MatrixBound) -> None:
        """Carry bounds of the input through the layer."""
        error = self._q_error(bound, state.program)
        carry_reflection(state, terms=self.inputs, rank=self.rank, error=error)
        self._add_bias(state)


class ReflectionConvolution(_Computed):
    """centre(W x) + b with W = I - 2 V (V^* V + eta I)^-1 V^*, V a circular 3x3 convolution.

    The image gets a margin of one zero on every side and lies on a torus of that size, where W is
    one reflection for each frequency. The margin is cut off again, or kept (`grow`).

    Args:
        channels: of input and output.
        rank: inner channels of V.
        depth: layers of the stack.
        shape: height and width of the input.
        grow: keep the margin.
    """

    def __init__(
        self, channels: int, *, rank: int, depth: int, shape: tuple[int, int], grow: bool = False
    ) -> None:
        super().__init__(
            (channels, 9 * rank), depth=depth, kind="residual_3x3", share=REFLECTION_SHARE
        )
        self.channels, self.rank, self.grow = channels, rank, grow
        self.torus = (shape[0] + 2, shape[1] + 2)
        self.grid = self.torus if grow else shape
        self.bias = set_initial(nn.Parameter(torch.empty(channels)), "zeros")
        self.centre = Centering(channels)

    def identity(self, like: Tensor) -> Tensor:
        """See _Computed: ones at the centre of the kernel."""
        one = torch.eye(self.channels, self.rank, dtype=like.dtype, device=like.device)
        return F.pad(one[..., None], (4, 4)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, *grid)."""
        q = self._q()
        z = spectrum(F.pad(x.to(q.real.dtype), (1, 1, 1, 1)), fast=self.training)
        z = z.permute(2, 3, 1, 0)
        z = z - 2 * product(q.mH, product(q, z))
        y = images_of(z.permute(3, 2, 0, 1), self.torus[1], fast=self.training)
        if not self.grow:
            y = y[:, :, 1:-1, 1:-1]
        centred: Tensor = self.centre(y)
        return centred + at_least_float32(self.bias)[:, None, None]

    def _x(self, weight: Tensor, *, fast: bool = False) -> Tensor:
        """V^* at every frequency, complex (H, W // 2 + 1, rank, channels)."""
        kernel = self.identity(weight) + self.stored(weight)
        kernel = kernel.view(self.channels, self.rank, 3, 3)
        height, width = self.torus
        kernel = F.pad(kernel, (0, width - 3, 0, height - 3))
        return spectrum(kernel, fast=fast).permute(2, 3, 0, 1).mH

    @torch.no_grad()
    def bound(self, name: str, stored: Tensor) -> MatrixBound:
        """Proved bounds; `stored` is the value of the parameter `name`."""
        weight = stored.double()
        sizes = self.identity(weight) + self.stored(weight.abs())
        sizes = sizes.view(self.channels, self.rank, 9).sum(2)
        return computed_bound(
            stored,
            name,
            self._x(weight),
            size=sizes.square().sum() / math.prod(self.torus) * SLACK,
            defect=self._entry_error(FLOAT64),
            share=self.share,
        )

    def _entry_error(self, program: Program) -> float:
        one, other = entry_error(program), entrywise_error(self.torus, FLOAT64)
        return one + other * (1 + one)

    def carry(self, state: ErrorState, bound: MatrixBound) -> None:
        """Carry bounds of the input through the layer; mean and bias are translations."""
        program = state.program
        error = rows_error(
            cast(ComputedBound, bound),
            self.rank,
            self.channels,
            self._entry_error(program),
            program,
            complex_terms=True,
        )
        there = transform_error(self.torus, program)
        state.error = state.error + there * state.computed
        carry_reflection(
            state, terms=self.channels, rank=self.rank, error=error, complex_terms=True
        )
        state.error = state.error + there * state.computed
        state.note(2 * state.computed)
        root = math.sqrt(math.prod(self.grid)) * SLACK
        for stored in (self.centre.mean, self.bias):
            state.translate(root * float(stored.double().norm()))
