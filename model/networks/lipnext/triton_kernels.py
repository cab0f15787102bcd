"""Triton kernels of the element-wise parts of LipNeXt's block, in place where values may be lost.

Next to the products of a block these parts only move bytes, so each kernel reads and writes what
changes and nothing else. Imported by `ops.py` where Triton is; every kernel takes float64, float32,
bfloat16 and float16 and computes what the operators of torch compute, bit for bit, sums excepted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Elements that one program holds in registers."""
_ROWS = 8
"""Tiles that one program of the backward pass adds up."""
_WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}
"""What a kernel computes in."""


def shift_(x: Tensor, channels: int, distance: int, *, back: bool) -> None:
    """See `ops.shift_`: half a pass over memory where a quarter is shifted.

    Args:
        x: contiguous (B, H, W, C).
        channels: size of each of the four groups.
        distance: by how many positions, at most a side of the grid.
        back: the inverse.
    """
    if not channels:
        return
    images, height, breadth, width = x.shape
    line = triton.next_power_of_2(max(height, breadth))
    block = max(16, min(triton.next_power_of_2(channels), _TILE // line))
    grid = (images * max(height, breadth), 4 * triton.cdiv(channels, block))
    with torch.cuda.device_of(x):
        _shift[grid](
            x, height, breadth, width, channels, distance, BACK=back, LINE=line, BLOCK=block
        )  # fmt: skip


def fold_(x: Tensor, channels: int, signs: Tensor | None) -> None:
    """See `ops.fold_`: the channels that pass are not touched.

    Args:
        x: contiguous (T, C).
        channels: the first of them are folded.
        signs: int8 (T, channels), overwritten with their signs.
    """
    if not channels:
        return
    tokens, width = x.shape
    block = _block(channels)
    grid = (triton.cdiv(tokens, _TILE // block), triton.cdiv(channels, block))
    target = x if signs is None else signs
    with torch.cuda.device_of(x):
        _fold[grid](
            x, target, tokens, width, channels,
            WIDE=_WIDE[_wide(x)], SIGNS=signs is not None, TOKENS=_TILE // block, BLOCK=block,
        )  # fmt: skip


def unfold(gradient: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.unfold`: the sums are formed while the gradient is in registers.

    Sums are float32, or float64 for float64; their order depends on the shape alone.

    Args:
        gradient: contiguous (T, C).
        signs: int8 (T, channels).
    """
    tokens, width = gradient.shape
    block = _block(width)
    rows = _TILE // block * _ROWS
    grid = (triton.cdiv(tokens, rows), triton.cdiv(width, block))
    out = torch.empty_like(gradient)
    sums = gradient.new_empty((grid[0], width), dtype=_wide(gradient))
    with torch.cuda.device_of(gradient):
        _unfold[grid](
            gradient, signs, out, sums, tokens, width, signs.shape[1],
            WIDE=_WIDE[sums.dtype], TILES=_ROWS, TOKENS=_TILE // block, BLOCK=block,
        )  # fmt: skip
    return out, sums.sum(0).to(gradient.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _block(channels: int) -> int:
    return max(16, min(triton.next_power_of_2(channels), 256))


@triton.jit
def _shift(
    x: tl.tensor, height: tl.tensor, breadth: tl.tensor, width: tl.tensor, channels: tl.tensor,
    distance: tl.tensor,
    BACK: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program moves one row or column of the grid: it reads all of it before it writes."""
    blocks = tl.cdiv(channels, BLOCK)
    group = tl.program_id(1) // blocks
    vertical = group < 2
    length = tl.where(vertical, height, breadth)
    stride = tl.where(vertical, breadth, 1)
    lines = tl.where(vertical, breadth, height)
    per_image = tl.maximum(height, breadth)
    number = tl.program_id(0) % per_image
    image = (tl.program_id(0) // per_image).to(tl.int64)
    begin = image * height * breadth + number * tl.where(vertical, 1, breadth)
    step = (group % 2 * 2 - 1) * distance  # groups go up, down, left, right
    if BACK:
        step = -step
    place = tl.arange(0, LINE)
    column = tl.program_id(1) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (place < length)[:, None] & (column < channels)[None, :] & (number < lines)
    column += group * channels
    source = (begin + place * stride) * width
    target = (begin + (place + step + length) % length * stride) * width
    values = tl.load(x + source[:, None] + column[None, :], mask=inside)
    tl.debug_barrier()
    tl.store(x + target[:, None] + column[None, :], values, mask=inside)


@triton.jit
def _fold(
    x: tl.tensor, signs: tl.tensor, tokens: tl.tensor, width: tl.tensor, channels: tl.tensor,
    WIDE: tl.constexpr, SIGNS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < channels)[None, :]
    place = x + token[:, None] * width + column[None, :]
    values = tl.load(place, mask=inside).to(WIDE)
    if SIGNS:
        sign = (values > 0).to(tl.int8) - (values < 0).to(tl.int8)
        tl.store(signs + token[:, None] * channels + column[None, :], sign, mask=inside)
    tl.store(place, tl.abs(values).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _unfold(
    gradient: tl.tensor, signs: tl.tensor, out: tl.tensor, sums: tl.tensor,
    tokens: tl.tensor, width: tl.tensor, channels: tl.tensor,
    WIDE: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * (TILES * TOKENS)
    total = tl.zeros((TOKENS, BLOCK), WIDE)
    for tile in range(TILES):
        token = first + tile * TOKENS + tl.arange(0, TOKENS)
        inside = (token < tokens)[:, None] & (column < width)[None, :]
        folded = inside & (column < channels)[None, :]
        sign = tl.load(signs + token[:, None] * channels + column[None, :], mask=folded, other=1)
        place = token[:, None] * width + column[None, :]
        values = tl.load(gradient + place, mask=inside, other=0.0).to(WIDE) * sign.to(WIDE)
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)
        total += values
    partial = sums + tl.program_id(0).to(tl.int64) * width + column
    tl.store(partial, tl.sum(total, 0), mask=column < width)
