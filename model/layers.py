"""Layers of LipNeXt (arXiv 2601.18513): each is 1-Lipschitz in l2 by construction.

Tokens are channels-last, shape (B, H, W, C). Every module reads its own parameters in its own
forward only: under ZeRO-3 they exist nowhere else.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LipNeXtConfig
from model.initial import set_initial
from optim.manifolds import ORTHOGONAL, declare


def _orthogonal(size: int, initial: str) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(size, size))
    declare(parameter, ORTHOGONAL)
    return set_initial(parameter, initial)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself, or widened to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def space_to_depth(images: Tensor, patch: int) -> Tensor:
    """Cut (B, C, H, W) into patches: (B, H/patch, W/patch, C * patch^2), a permutation."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h // patch, w // patch, c * patch**2)


def shift(x: Tensor, channels: int) -> Tensor:
    """Roll four groups of channels by one position, up, down, left and right, with wrap-around.

    A circular shift is the only norm-preserving depthwise convolution (Theorem 1 of the paper).

    Args:
        x: shape (B, H, W, C).
        channels: size of each of the four groups; the other channels stay.
    """
    return cast(Tensor, _Shift.apply(x, channels))


def beta_abs(x: Tensor, channels: int) -> Tensor:
    """Absolute value of the first `channels` channels; the other channels pass."""
    return cast(Tensor, _BetaAbs.apply(x, channels))


class _Shift(torch.autograd.Function):
    """One copy in each direction, where rolling parts and joining them takes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: int) -> Tensor:
        ctx.channels = channels
        return _shifted(x, channels, back=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _shifted(gradients[0], ctx.channels, back=True), None


def _shifted(x: Tensor, channels: int, *, back: bool) -> Tensor:
    out = torch.empty_like(x)
    for group, (axis, step) in enumerate(((1, -1), (1, 1), (2, -1), (2, 1))):
        part = slice(group * channels, (group + 1) * channels)
        source, target = x[..., part], out[..., part]
        if back:
            step = -step
        inner = x.shape[axis] - 1
        first, rest = (inner, 0) if step > 0 else (0, inner)  # what wraps around, and whereto
        target.select(axis, rest).copy_(source.select(axis, first))
        begin = max(step, 0)
        target.narrow(axis, begin, inner).copy_(source.narrow(axis, 1 - begin, inner))
    still = 4 * channels
    out[..., still:] = x[..., still:]
    return out


class _BetaAbs(torch.autograd.Function):
    """In the backward pass slices of a tensor would each be padded with zeros and added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: int) -> Tensor:
        ctx.channels = channels
        ctx.save_for_backward(x[..., :channels])
        out = x.clone()
        out[..., :channels].abs_()
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (folded,) = ctx.saved_tensors
        out = gradients[0].clone()
        out[..., : ctx.channels].mul_(folded.sign())
        return out, None


def l2_pool(x: Tensor, tau: float) -> Tensor:
    """Norm of every channel over the grid, sqrt(sum x^2 + tau^2), in float32 or wider.

    1-Lipschitz by the reverse triangle inequality; tau keeps the gradient finite at zero.

    Args:
        x: shape (B, H, W, C).
        tau: smoothing.

    Returns:
        Features, shape (B, C).
    """
    return (at_least_float32(x).square().sum((1, 2)) + tau**2).sqrt()


class Stem(nn.Module):
    """Images to tokens: x - 0.5, patches to channels, zero channels up to C, orthogonal matrix."""

    def __init__(self, config: LipNeXtConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.used = config.stem_channels
        self.weight = _orthogonal(config.width, "haar")

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (B, H/patch, W/patch, C) of images (B, C, H, W), in the type of the weight."""
        # 0.5 is subtracted in the wider type: a bf16 pixel in [0, 1] has half as many bits.
        x = images.to(torch.promote_types(images.dtype, self.weight.dtype)) - 0.5
        x = space_to_depth(x.to(self.weight.dtype), self.patch)
        # The padding is never made: zeros meet all other columns.
        return F.linear(x, self.weight[:, : self.used])


class Block(nn.Module):
    """sigma(M R^T S(R (X + p)) + b): orthogonal R and M, circular shift S, beta-Abs sigma."""

    def __init__(self, config: LipNeXtConfig) -> None:
        super().__init__()
        self.shifted = config.shifted_channels
        self.absolute = config.absolute_channels
        self.fold = config.fold
        self.R = _orthogonal(config.width, "haar")
        self.M = _orthogonal(config.width, "haar" if config.initial == "haar" else "identity")
        self.b = set_initial(nn.Parameter(torch.empty(config.width)), "zeros")
        self.p: nn.Parameter | None = None
        if config.position:
            self.p = set_initial(nn.Parameter(torch.empty(*config.grid, 1)), "zeros")

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H, W, C) to tokens of the same shape."""
        if self.p is not None:
            x = x + self.p
        v = shift(F.linear(x, self.R), self.shifted)
        tokens, width = v.numel() // v.shape[-1], v.shape[-1]
        if self.fold == "always" or (self.fold == "auto" and tokens > width):
            z = F.linear(v, self.M @ self.R.mT, self.b)
        else:
            z = F.linear(F.linear(v, self.R.mT), self.M, self.b)
        return beta_abs(z, self.absolute)
