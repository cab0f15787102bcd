"""Skew orthogonal convolution (arXiv 2105.11417), with the cheaper backward pass of 2211.08453.

A filter J that equals minus its own transpose is a skew-symmetric map under zero padding, so exp(J)
is orthogonal. exp(J) x is a truncated series; `Skew` states what the truncation can cost.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from model.certification.dot_products import convolve, transposed
from model.certification.matrix_bounds import MatrixBound, matrix_bound, tensor_digest
from model.certification.rounding import SLACK, U64, ErrorState
from model.networks.init import set_initial
from model.networks.soc.power_iteration import estimated_norm
from model.networks.tensor_ops import at_least_float32


def skew(weight: Tensor) -> Tensor:
    """(W - W^T) / 2 for a filter (C, C, k, k), an orthogonal projection."""
    return _Skew.apply(weight)


class _Skew(torch.autograd.Function):
    """An orthogonal projection is its own derivative and its own transpose."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return transposed(weight).sub_(weight).mul_(-0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return skew(gradient)


def reshapes(kernel: Tensor) -> list[Tensor]:
    """Matrices of a skew filter (C, C, k, k) whose smallest norm, times k, bounds that of the map.

    Output position p sees R x_p with R of shape (C, C k^2), and each pixel lies in k^2 patches:
    ||J|| <= k ||R||. One spatial axis after the other gives the same for shape (C k, C k). The two
    other arrangements of arXiv 2105.11417 are, for a skew filter, transposes of these two up to
    signs and order.
    """
    channels, side = kernel.shape[0], kernel.shape[2]
    wide = kernel.reshape(channels, -1)
    if side == 1:
        return [wide]
    return [wide, kernel.permute(0, 2, 1, 3).reshape(channels * side, -1)]


def series(x: Tensor, kernel: Tensor, terms: int) -> Tensor:
    """Sum of J^i x / i! for i < terms, by Horner's rule, with products of known rounding.

    Args:
        x: shape (B, C, H, W).
        kernel: J, shape (C, C, k, k) with odd k.
        terms: at least 1.
    """
    return _horner(x, kernel, terms - 1, 1, convolve)


def fast_series(x: Tensor, kernel: Tensor, terms: int) -> Tensor:
    """The same values as `series` with a cheaper backward pass; the filter has to be skew.

    The gradient in x is exact for the truncated series. That in the filter is one convolution of
    two averages in place of the average of convolutions: see _FastSeries.
    """
    return _FastSeries.apply(x, kernel, terms)


def _horner(
    x: Tensor, kernel: Tensor, last: int, first: int, convolution: Callable[..., Tensor] = F.conv2d
) -> Tensor:
    """Nested sum x + J/first (x + J/(first+1) (... x + J/last x))."""
    z = x
    for i in range(last, first - 1, -1):
        z = x + convolution(z, kernel, padding=kernel.shape[-1] // 2) / i
    return z


class _FastSeries(torch.autograd.Function):
    """exp(J) x; d/dJ is the integral over s in [0, 1] of <exp(sJ) x, exp(-(1-s)J) g>.

    Both factors are replaced by their averages, sum J^i x / (i+1)! and sum (-J)^i g / (i+1)!, the
    first of which Horner's rule meets on its way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, terms: int) -> Tensor:
        average = _horner(x, kernel, terms - 1, 2)
        ctx.save_for_backward(average, kernel)
        ctx.terms = terms
        return x + F.conv2d(average, kernel, padding=kernel.shape[-1] // 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        average, kernel = ctx.saved_tensors
        padding = kernel.shape[-1] // 2
        back = _horner(gradient, -kernel, ctx.terms - 1, 2)
        to_x, to_kernel = None, None
        if ctx.needs_input_grad[0]:
            to_x = gradient - F.conv2d(back, kernel, padding=padding)
        if ctx.needs_input_grad[1]:
            to_kernel = conv2d_weight(average, kernel.shape, back, padding=padding)
        return to_x, to_kernel, None


def remainder(norm: float, terms: int) -> float:
    """Bound of ||exp(J) - series|| for a skew J of norm at most `norm`: norm^n / n!.

    The eigenvalues are imaginary, where Taylor's remainder is no larger than its next term.
    """
    if norm == 0:
        return 0.0
    if not 0 < norm < math.inf:  # not a number: the scale was never stored
        return math.inf
    try:
        return math.exp(terms * math.log(norm) - math.lgamma(terms + 1))
    except OverflowError:
        return math.inf


def skew_kernel_bound(weight: Tensor, name: str) -> MatrixBound:
    """Bounds of the map of the filter (W - W^T) / 2, for images of any size, zero padded.

    `upper` is k times the smallest proved norm of `reshapes`; `absolute` bounds the map of
    (|W| + |W|^T) / 2 by its row sums (Schur); `frobenius` is the norm of the filter's entries;
    `lower`, observed, holds on images that are no smaller than the filter.

    Raises:
        ModelError: an entry is not finite.
    """
    stored = weight.detach().double()
    kernel = skew(stored)
    found = [matrix_bound(matrix, name) for matrix in reshapes(kernel)]
    # The difference of two float64 entries is rounded once.
    slip = 2 * U64 * found[0].frobenius
    side = weight.shape[-1]
    sizes = (stored.abs() + transposed(stored.abs())) / 2
    return MatrixBound(
        name=name,
        shape=found[0].shape,
        sha256=tensor_digest(weight),
        upper=side * (min(bound.upper for bound in found) + slip) * SLACK,
        lower=max(0.0, found[0].lower - slip),
        absolute=float(sizes.sum((1, 2, 3)).max()) * SLACK,
        frobenius=found[0].frobenius + slip,
    )


class SkewConvolution(nn.Module):
    """exp(J) x + b with J = scale * (W - W^T) / 2, zero padding.

    In training, scale is 1 / min of the estimated norms of `reshapes`, taken anew from the weights,
    and few terms of the series are used. In evaluation it is the stored number, so that the stored
    weights alone say which function is meant.

    Args:
        inputs: channels of the input, padded with zeros up to `outputs`.
        outputs: channels of the output, at least the (for stride 2: four times the) input's.
        side: side of the filter, odd.
        stride: 1, or 2: a permutation of 2 x 2 pixels into channels comes first.
        train_terms: terms of the series in training.
        terms: terms of the series in evaluation.
    """

    scale: Tensor

    def __init__(
        self, inputs: int, outputs: int, side: int, *, stride: int, train_terms: int, terms: int
    ) -> None:
        super().__init__()
        self.stride, self.side = stride, side
        self.padded = outputs - inputs * stride**2
        self.channels = outputs
        self.train_terms, self.terms = train_terms, terms
        shape = (outputs, outputs, side, side)
        self.weight = set_initial(nn.Parameter(torch.empty(shape)), "filter")
        self.bias = set_initial(nn.Parameter(torch.empty(outputs)), "uniform")
        # Not a number until it is set: a network that is not calibrated certifies nothing.
        self.register_buffer("scale", torch.full((), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride), in the type of the weight."""
        x = F.pixel_unshuffle(x.to(self.weight.dtype), self.stride)
        x = F.pad(x, (0, 0, 0, 0, 0, self.padded))
        kernel = skew(at_least_float32(self.weight))
        if self.training:
            kernel = (kernel * _scale(kernel)).to(self.weight.dtype)
            y = fast_series(x, kernel, self.train_terms)
        else:
            y = series(x, (kernel * self.scale).to(self.weight.dtype), self.terms)
        return y + self.bias[:, None, None]

    @torch.no_grad()
    def store_scale(self) -> None:
        """Store the scale that training would use with these weights."""
        self.scale.copy_(_scale(skew(at_least_float32(self.weight))))

    @property
    def operations(self) -> int:
        """Floating-point operations per position of the output, at most."""
        return self.terms * self.channels * (2 * self.side**2 * self.channels + 8)

    def growth(self, bound: MatrixBound) -> float:
        """Bound of what an error inside of the series is multiplied by: exp ||J||."""
        return math.exp(min(self._size(bound), 700.0))

    def norm(self, bound: MatrixBound) -> float:
        """Bound of the norm of the evaluated series: 1 + remainder."""
        return (1 + remainder(self._size(bound), self.terms) * SLACK) * (1 + 2.0**-50)

    def _size(self, bound: MatrixBound) -> float:
        return bound.upper * self._stored_scale * SLACK

    @property
    def _stored_scale(self) -> float:
        """|scale|: its sign is whatever somebody stored, and no norm is negative."""
        return abs(float(self.scale))

    def carry(self, state: ErrorState, bound: MatrixBound, pixels: int) -> None:
        """Carry bounds of the input through this layer (docs/explanation/families.md).

        Args:
            state: of the input.
            bound: of the filter.
            pixels: positions of the output, for the bias.
        """
        program, start = state.program, state.computed
        size, absolute = self._size(bound), bound.absolute * self._stored_scale * SLACK
        # W and scale are copies; the difference, the scaling, the product and the quotient round.
        kappa = program.product(self.side**2 * self.channels, copies=2, roundings=4)
        norm, error, peak = 1.0, 0.0, 1.0
        for i in range(self.terms - 1, 0, -1):
            partial = absolute * (norm + error)
            error = (size * error + kappa * partial) / i
            norm = 1 + size * norm / i
            error += program.activation * (norm + error)
            peak = max(peak, partial, norm + error)
        state.norm = self.norm(bound) * state.norm
        state.error = self.norm(bound) * state.error + error * start
        # A scale that is flushed costs as much as the filter is large before it is scaled.
        state.note(torch.maximum(peak * start, bound.absolute * start))
        state.translate(math.sqrt(pixels) * float(self.bias.detach().double().norm()) * SLACK)


def _scale(kernel: Tensor) -> Tensor:
    norms = torch.stack([estimated_norm(matrix) for matrix in reshapes(kernel)])
    return 1 / norms.min().clamp_min(torch.finfo(norms.dtype).tiny)
