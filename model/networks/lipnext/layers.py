"""Layers of LipNeXt (arXiv 2601.18513): each is 1-Lipschitz in l2 by construction.

Tokens are channels-last, shape (B, H, W, C). Every module reads its own parameters in its own
forward only: under ZeRO-3 they exist nowhere else.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.networks.init import set_initial
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.lipnext.ops import ROLLS, fold_, shift_, unfold
from model.networks.tensor_ops import at_least_float32, space_to_depth
from optim.manifolds import ORTHOGONAL, declare, is_trivialized, trivialized


def _orthogonal(size: int, initial: str, *, trivializes: bool = False) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(size, size))
    declare(parameter, ORTHOGONAL, trivializes=trivializes)
    return set_initial(parameter, initial)


def shift(x: Tensor, channels: int, distance: int = 1) -> Tensor:
    """Roll four groups of channels up, down, left and right, with wrap-around.

    A circular shift is the only norm-preserving depthwise convolution (Theorem 1 of the paper).

    Args:
        x: shape (B, H, W, C).
        channels: size of each of the four groups; the other channels stay.
        distance: by how many positions.
    """
    parts = x.split([channels] * 4 + [x.shape[-1] - 4 * channels], dim=-1)
    rolled = [
        part.roll(direction * distance, axis)
        for part, (axis, direction) in zip(parts, ROLLS, strict=False)
    ]
    return torch.cat([*rolled, parts[4]], dim=-1)


def beta_abs(x: Tensor, channels: int) -> Tensor:
    """Absolute value of the first `channels` channels; the other channels pass."""
    return torch.cat([x[..., :channels].abs(), x[..., channels:]], dim=-1)


def l2_pool(x: Tensor, tau: float, windows: int = 1) -> Tensor:
    """Norms of every channel over windows of the grid, sqrt(sum x^2 + tau^2), in float32 or wider.

    1-Lipschitz by the reverse triangle inequality in each window, and the windows are disjoint; tau
    keeps the gradient finite at zero.

    Args:
        x: shape (B, H, W, C).
        tau: smoothing.
        windows: windows per side, a divisor of H and W.

    Returns:
        Features, shape (B, windows^2 C): window after window, row by row.
    """
    b, h, w, c = x.shape
    x = at_least_float32(x).reshape(b, windows, h // windows, windows, w // windows, c)
    return (x.square().sum((2, 4)) + tau**2).sqrt().flatten(1)


def flat_pool(x: Tensor) -> Tensor:
    """All values as they are, in float32 or wider: (B, H, W, C) to (B, H W C)."""
    return at_least_float32(x).flatten(1)


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
    """sigma(M R^T S(R (X + p)) + b): orthogonal R and M, circular shift S, beta-Abs sigma.

    Attributes:
        absolute: Channels under the absolute value, the first ones.
        plain: Run the operators of the formula one by one and let autograd differentiate them: the
            meaning of the fast pass, for comparisons.
    """

    plain = False

    def __init__(self, config: LipNeXtConfig, distance: int = 1) -> None:
        super().__init__()
        self.shifted, self.distance = config.shifted_channels, distance
        self.absolute = config.absolute_channels
        self.fold = config.fold
        self.R = _orthogonal(config.width, "haar", trivializes=True)
        first = "haar" if config.initial == "haar" else "identity"
        self.M = _orthogonal(config.width, first, trivializes=True)
        self.b = set_initial(nn.Parameter(torch.empty(config.width)), "zeros")
        self.p: nn.Parameter | None = None
        if config.position:
            self.p = set_initial(nn.Parameter(torch.empty(*config.grid, 1)), "zeros")

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """Tokens (B, H, W, C) to tokens of the same shape.

        Args:
            x: (B, H, W, C).
            recompute: Keep the input and the signs for the backward pass and nothing else, which
                then repeats the first product and M R^T.
        """
        if self.p is not None:
            x = x + self.p
        tokens, width = x.numel() // x.shape[-1], x.shape[-1]
        folded = self.fold == "always" or (self.fold == "auto" and tokens > width)
        shape = _Shape(
            self.shifted,
            self.distance,
            self.absolute,
            folded,
            recompute,
            differentiated=torch.is_grad_enabled(),
            trivialized=(is_trivialized(self.R), is_trivialized(self.M)),
        )
        # Two forms at once ask only two optimizers, one for R and one for M.
        if self.plain or len(set(shape.trivialized)) == 2:
            return _operators(x, self.R, self.M, self.b, shape)
        return cast(Tensor, _BlockPass.apply(x, self.R, self.M, self.b, shape))


class _Shape(NamedTuple):
    shifted: int
    distance: int
    absolute: int
    folded: bool
    recompute: bool
    differentiated: bool
    trivialized: tuple[bool, bool]
    """Whether the gradients of R and M are R^T dR and M^T dM."""


def _operators(x: Tensor, R: Tensor, M: Tensor, b: Tensor, shape: _Shape) -> Tensor:
    """A block after its translation, (B, H, W, C) to (B, H, W, C)."""
    asked = shape.trivialized
    R, M = (trivialized(R) if asked[0] else R), (trivialized(M) if asked[1] else M)
    v = shift(F.linear(x, R), shape.shifted, shape.distance)
    z = F.linear(v, M @ R.mT, b) if shape.folded else F.linear(F.linear(v, R.mT), M, b)
    return beta_abs(z, shape.absolute)


def _factors(x: Tensor, R: Tensor, M: Tensor, shape: _Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Shifted tokens (T, C), and the factors of the last product: (T, C) and (C, C)."""
    u = F.linear(x.reshape(-1, x.shape[-1]), R)
    v = shift_(u.view(x.shape), shape.shifted, shape.distance).view_as(u)
    return (v, v, M @ R.mT) if shape.folded else (v, F.linear(v, R.mT), M)


class _BlockPass(torch.autograd.Function):
    """`_operators`, bit for bit, with little traffic beside the products.

    What no other function can hold is overwritten, and what a product reads is all that is kept:
    its two (unfolded three) inputs of tokens, M R^T, and a byte for each folded value. Weights are
    kept as the parameters that they are, where a product of autograd keeps a transposed view, with
    which ZeRO-3 could not release them.

    R^T dR and M^T dM take no product more than dR and dM, unfolded one less
    (docs/explanation/optimizer.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, M: Tensor, b: Tensor, shape: _Shape) -> Tensor:
        v, inner, outer = _factors(x, R, M, shape)
        # The bias joins the product, where it costs no pass and is rounded with it.
        z = F.linear(inner, outer, b)
        signs = fold_(z, shape.absolute, keep=shape.differentiated)
        ctx.shape = shape
        factors = () if shape.recompute else (v, inner, outer)
        ctx.save_for_backward(x, R, M, b, signs, *factors)
        return z.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, R, M, b, signs, *factors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return (*_recorded(gradients[0], (x, R, M, b), wanted, ctx.shape), None)
        shape, tokens = ctx.shape, x.reshape(-1, x.shape[-1])
        v, inner, outer = factors or _factors(x, R, M, shape)
        dz, db = unfold(gradients[0].reshape(tokens.shape).contiguous(), signs)
        d_inner = dz @ outer
        lie, dR, dM = all(shape.trivialized), None, None
        if any(wanted[1:]):
            dR, dM = _of_last_product(dz, d_inner, (v, inner), R, M, shape)
        dv = d_inner if shape.folded else F.linear(d_inner, R)
        du = shift_(dv.view(x.shape), shape.shifted, shape.distance, back=True).view_as(dv)
        dx = du @ R if wanted[0] or lie else None
        if dR is not None:
            left = dx if lie and dx is not None else du
            dR = torch.addmm(dR, left.mT, tokens)
        dx = None if dx is None else dx.view(x.shape)
        return dx, dR, dM, db, None


def _of_last_product(
    dz: Tensor,
    d_inner: Tensor,
    factors: tuple[Tensor, Tensor],
    R: Tensor,
    M: Tensor,
    shape: _Shape,
) -> tuple[Tensor, Tensor]:
    """What the last product adds to the gradient of R, and the gradient of M."""
    v, inner = factors
    if all(shape.trivialized):
        B = M.mT @ (dz.mT @ inner @ R) if shape.folded else d_inner.mT @ inner
        return B.mT, B
    d_outer = dz.mT @ inner
    if shape.folded:
        return d_outer.mT @ M, d_outer @ R
    return v.mT @ d_inner, d_outer


def _recorded(
    gradient: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    wanted: tuple[bool, ...],
    shape: _Shape,
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: from the inputs, by operators that record."""
    sources = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    found = iter(
        torch.autograd.grad(_operators(*inputs, shape), sources, gradient, create_graph=True)
    )
    return [next(found) if want else None for want in wanted]
