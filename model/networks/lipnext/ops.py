"""The element-wise parts of LipNeXt's block: kernels on a GPU with Triton, operators elsewhere.

Both record no graph; `model/networks/lipnext/layers.py` differentiates them. What they overwrite is
theirs.
"""

import functools
import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor

_kernels: Any
try:
    from model.networks.lipnext import triton_kernels as _kernels
except ModuleNotFoundError as missing:
    if (missing.name or "").split(".")[0] != "triton":
        raise
    _kernels = None  # builds of torch for processors come without it

ROLLS = ((1, -1), (1, 1), (2, -1), (2, 1))
"""Axis and direction of each shifted group of channels: up, down, left, right."""


def uses_kernels(x: Tensor) -> bool:
    """Whether the kernels are there and can reach the tensor."""
    return _kernels is not None and x.is_cuda and _startable()


def c_compiler() -> str | None:
    """The C compiler with which Triton builds what starts a kernel."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def _startable() -> bool:
    if c_compiler():
        return True
    warnings.warn(
        "no C compiler (CC, gcc, clang): Triton's kernels cannot be started, and the network takes "
        "torch's operators, which are slower",
        stacklevel=3,
    )
    return False


def shift_(x: Tensor, channels: int, distance: int = 1, *, back: bool = False) -> Tensor:
    """Roll four groups of channels, in place.

    Args:
        x: contiguous (B, H, W, C), overwritten.
        channels: size of each group; the other channels stay.
        distance: by how many positions, at most a side of the grid.
        back: the inverse, which is also the gradient.

    Returns:
        `x`.
    """
    if uses_kernels(x):
        _kernels.shift_(x, channels, distance, back=back)
        return x
    for group, (axis, direction) in enumerate(ROLLS):
        part = x[..., group * channels : (group + 1) * channels]
        part.copy_(part.roll(direction * (-distance if back else distance), axis))
    return x


def fold_(x: Tensor, channels: int, *, keep: bool) -> Tensor | None:
    """Absolute value of the first channels, in place.

    Args:
        x: contiguous (T, C), overwritten.
        channels: how many are folded.
        keep: return what the gradient needs.

    Returns:
        Signs of the folded values (-1, 0, 1), int8 (T, channels), one byte where the values
        themselves would be two to eight; None unless `keep`.
    """
    signs = x.new_empty((len(x), channels), dtype=torch.int8) if keep else None
    if uses_kernels(x):
        _kernels.fold_(x, channels, signs)
        return signs
    folded = x[:, :channels]
    if signs is not None:
        signs.copy_(folded.sign())
    folded.abs_()
    return signs


def unfold(gradient: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the values that `fold_` overwrote, and of a bias in them.

    Args:
        gradient: contiguous (T, C), left as it is.
        signs: int8 (T, channels) of `fold_`.

    Returns:
        (T, C), and its sums over the tokens, (C,), added in float32 or wider.
    """
    if uses_kernels(gradient):
        out, sums = _kernels.unfold(gradient, signs)
        return out, sums
    out = gradient.clone()
    out[:, : signs.shape[1]].mul_(signs)
    return out, out.sum(0)
