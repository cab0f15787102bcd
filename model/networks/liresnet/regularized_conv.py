"""Convolutions whose norm is free and kept small by the loss (LiResNet, arXiv 2301.12549)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.certification.conv_bounds import kernel_bound, leading_singular_pair
from model.certification.dot_products import convolve, output_side
from model.certification.matrix_bounds import MatrixBound
from model.certification.rounding import SLACK, ErrorState
from model.networks.centering import Centering
from model.networks.init import set_initial
from model.networks.liresnet.cholesky import ENTRY_ROUNDINGS, scaled_rows
from model.networks.tensor_ops import at_least_float32

_TRAINING_STEPS = 8
_STORED_STEPS = 50


class RegularisedConvolution(nn.Module):
    """K x + b, with an estimate of ||K|| that the loss can differentiate.

    In training the estimate comes from a few steps of a Krylov method whose start is a function of
    (seed, step, layer): nothing is kept between steps, and the gradient is that of <u, K v> with
    u and v fixed. In evaluation it is the stored number `norm`, not a number until `measure` was
    called. A certificate uses neither.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: side of the kernel.
        stride: step between patches.
        padding: zeros on every side.
        shape: height and width of the input.
    """

    norm: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int,
        padding: int,
        shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.side = inputs, outputs, kernel
        self.stride, self.padding, self.shape = stride, padding, shape
        self.seed = 0
        self.weight = self._parameter()
        self.bias = set_initial(nn.Parameter(torch.empty(outputs)), "zeros")
        # Not a number until it is set: a network that is not calibrated certifies nothing.
        self.register_buffer("norm", torch.full((), math.nan))

    def _parameter(self) -> nn.Parameter:
        weight = torch.empty(self.outputs, self.inputs * self.side**2)
        return set_initial(nn.Parameter(weight), "orthonormal")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (output_side(n, self.side, self.stride, self.padding) for n in self.shape)
        return height, width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, outputs, *grid) of an input (B, inputs, *shape), and ||K||, a scalar.

        Both in float32 or wider: the weight exists only here under ZeRO-3, so its norm is
        estimated here.
        """
        kernel = self._kernel(at_least_float32(self.weight))
        norm = self._estimate(kernel) if self.training else self.norm.to(kernel.dtype)
        y = self._convolved(x.to(kernel.dtype), kernel)
        return y + at_least_float32(self.bias)[:, None, None], norm

    def _kernel(self, weight: Tensor) -> Tensor:
        """The part of K that is convolved with, (outputs, inputs, side, side)."""
        return weight.view(self.outputs, self.inputs, self.side, self.side)

    def _whole(self, kernel: Tensor) -> Tensor:
        """K itself."""
        return kernel

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        if self.training:
            return F.conv2d(x, kernel, stride=self.stride, padding=self.padding)
        return convolve(x, kernel, stride=self.stride, padding=self.padding)

    def _estimate(self, kernel: Tensor) -> Tensor:
        whole = self._whole(kernel)
        u, v, _ = leading_singular_pair(
            whole.detach(), **self._geometry(), steps=_TRAINING_STEPS, seed=self.seed
        )
        return (u * F.conv2d(v, whole, stride=self.stride, padding=self.padding)).sum()

    def _geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "shape": self.shape}

    @torch.no_grad()
    def measure(self) -> None:
        """Store the observed norm of K."""
        whole = self._whole(self._kernel(at_least_float32(self.weight)))
        self.norm.copy_(leading_singular_pair(whole, **self._geometry(), steps=_STORED_STEPS)[2])

    @torch.no_grad()
    def bound(self, name: str, stored: Tensor) -> MatrixBound:
        """Proved bounds of the operator; `stored` is the value of the parameter `name`."""
        kernel = self._kernel(stored.double())
        return kernel_bound(
            self._whole(kernel),
            self._whole(kernel.abs()),
            stored=stored,
            name=name,
            **self._geometry(),
        )

    def carry(self, state: ErrorState, bound: MatrixBound) -> None:
        """Carry bounds of the input through the layer."""
        state.multiply(
            self.inputs * self.side**2 + 1,
            upper=bound.upper,
            absolute=bound.absolute,
            bias=self._translation(),
            copies=2,
            # Of an entry of the kernel, of the product, and when mean, identity and bias are added.
            roundings=ENTRY_ROUNDINGS + 4,
        )

    def _translation(self) -> float:
        return math.sqrt(math.prod(self.grid)) * float(self.bias.double().norm()) * SLACK


class LinearResidual(RegularisedConvolution):
    """x + centre(R x) + b with R = depth^-1/2 * gain * V, a 3x3 kernel: a linear residual block.

    The centering is a translation, so the block has the norm of K = I + R.

    Args:
        channels: of input and output.
        depth: blocks of the stack.
        shape: height and width of the input.
    """

    def __init__(self, channels: int, *, depth: int, shape: tuple[int, int]) -> None:
        self.depth = depth
        super().__init__(channels, channels, kernel=3, stride=1, padding=1, shape=shape)
        self.centre = Centering(channels)

    def _parameter(self) -> nn.Parameter:
        # V and, in the last column, the gains.
        weight = torch.empty(self.outputs, self.inputs * self.side**2 + 1)
        return set_initial(nn.Parameter(weight), "residual_3x3")

    def _kernel(self, weight: Tensor) -> Tensor:
        return super()._kernel(scaled_rows(weight, self.depth))

    def _whole(self, kernel: Tensor) -> Tensor:
        one = torch.eye(self.outputs, dtype=kernel.dtype, device=kernel.device)
        return kernel + F.pad(one[:, :, None, None], (1, 1, 1, 1))

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        centred: Tensor = self.centre(super()._convolved(x, kernel))
        return x + centred

    def _translation(self) -> float:
        mean = math.sqrt(math.prod(self.grid)) * float(self.centre.mean.double().norm()) * SLACK
        return super()._translation() + mean
