"""l-infinity distances of many points to many weight vectors, in bounded memory (SortNet).

For points x_b and weights w_o, a_boi = |x_bi - w_oi|. Training takes the power mean of a over i,
(sum_i a_i^p)^(1/p), which approaches the l-infinity distance; inference takes a weighted sum of its
largest values (SortNet, arXiv 2210.01787). The tensor a itself, B x O x n, is never made: tiles of
it live in a buffer of fixed size, in the forward pass and once more in the backward pass.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.device_copy import to_device
from model.networks.tensor_ops import at_least_float32

_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24, "meta": 1 << 24}
"""A tile and its copy stay in a core's cache; a GPU needs more work for each launch. What is only
planned (meta) is planned for a GPU."""
TRAINED_OPERATIONS = {"additions": 7, "comparisons": 3, "logarithms and powers": 4}
"""Of a coordinate of a distance in the forward and backward pass of a power mean."""
_CHUNK = 8
_SMALLEST_POWER = -64.0
"""Terms below 2^-64 of the largest are raised to it: denormal numbers are slow, and no sum in
float32 can tell."""


class Subsets(NamedTuple):
    """The inputs and outputs of a layer that take part, one subset for each group of samples."""

    group: int
    """Samples of a group; the last group may be smaller."""
    inputs: Tensor | None = None
    """Indices, int64 (groups, kept inputs); None: all."""
    outputs: Tensor | None = None
    """Indices, int64 (groups, kept outputs); None: all."""


class Reduction(ABC):
    """From distances per coordinate to one value, for x (B, n) and w (O, n)."""

    @abstractmethod
    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, O), and what the backward pass needs beside x and w."""

    @abstractmethod
    def backward(
        self, x: Tensor, w: Tensor, saved: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x (B, n) and w (O, n)."""


@dataclasses.dataclass(frozen=True)
class PowerMean(Reduction):
    """(sum_i a_i^p)^(1/p) for a finite p >= 2; its gradient is (a_i / y)^(p-1) sign(x_i - w_i)."""

    p: float

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """See Reduction."""
        y = x.new_empty(len(x), len(w))
        tiny = torch.finfo(x.dtype).tiny
        for rows, columns, (a,) in _tiles(x, w, buffers=1):
            torch.sub(x[rows, None], w[columns], out=a).abs_()
            # Relative to the largest: a^p alone would leave the range of the type.
            scale = a.amax(-1).clamp_(min=tiny).log2_()
            torch.add(scale[..., None] * -self.p, a.log2_(), alpha=self.p, out=a)
            a.clamp_(min=_SMALLEST_POWER).exp2_()
            y[rows, columns] = (a.sum(-1).log2_() / self.p + scale).exp2_()
        return y, y

    def backward(
        self, x: Tensor, w: Tensor, saved: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See Reduction."""
        q = self.p - 1
        grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
        shift = saved.clamp(min=torch.finfo(x.dtype).tiny).log2_().mul_(-q)
        for rows, columns, (d, a) in _tiles(x, w, buffers=2):
            torch.sub(x[rows, None], w[columns], out=d)
            torch.abs(d, out=a).log2_()
            torch.add(shift[rows, columns, None], a, alpha=q, out=a)
            a.clamp_(min=_SMALLEST_POWER).exp2_()
            a.copysign_(d).mul_(gradient[rows, columns, None])
            grad_x[rows] += a.sum(1)
            grad_w[columns] -= a.sum(0)
        return grad_x, grad_w


@dataclasses.dataclass(frozen=True)
class RankedSum(Reduction):
    """sum_r c_r a_(r) over the largest values a_(1) >= a_(2) >= ...: (1,) is the maximum."""

    coefficients: tuple[float, ...]

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """See Reduction."""
        count = min(len(self.coefficients), x.shape[1])
        c = to_device(torch.tensor(self.coefficients[:count], dtype=x.dtype), x.device)
        y = x.new_empty(len(x), len(w))
        places = torch.empty(*y.shape, count, dtype=torch.int32, device=x.device)
        for rows, columns, (a,) in _tiles(x, w, buffers=1):
            torch.sub(x[rows, None], w[columns], out=a).abs_()
            values, indices = largest(a, count)
            y[rows, columns] = (values * c).sum(-1)
            places[rows, columns] = indices.int()
        return y, places

    def backward(
        self, x: Tensor, w: Tensor, saved: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See Reduction."""
        count = saved.shape[-1]
        c = to_device(torch.tensor(self.coefficients[:count], dtype=x.dtype), x.device)
        grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
        for b in range(len(x)):
            # Coordinates that the weighted sums of sample b look at, (O, count).
            at = saved[b].long()
            d = x[b][at] - w.gather(1, at)
            share = d.sign_() * c * gradient[b, :, None]
            grad_x[b].index_add_(0, at.flatten(), share.flatten())
            grad_w.scatter_add_(1, at, -share)
        return grad_x, grad_w


def largest(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of the last axis in descending order, and their indices.

    The largest values lie in those chunks whose own maxima are largest, so only these are sorted.
    """
    n = a.shape[-1]
    if count == 1:
        values, indices = a.max(-1, keepdim=True)
        return values, indices
    chunks = n // _CHUNK
    if n % _CHUNK or chunks < 4 * count:
        values, indices = a.topk(count, -1)
        return values, indices
    # Element i belongs to chunk i mod chunks: maxima over the outer axis are vector operations.
    parts = a.view(*a.shape[:-1], _CHUNK, chunks)
    best = parts.amax(-2).topk(count, -1, sorted=False).indices
    steps = torch.arange(0, n, chunks, device=a.device)
    candidates = (best[..., None] + steps).flatten(-2)
    values, order = a.gather(-1, candidates).topk(count, -1)
    return values, candidates.gather(-1, order)


def distance(
    x: Tensor, weight: Tensor, reduction: Reduction, subsets: Subsets | None = None
) -> Tensor:
    """Distances of points to weight vectors, differentiable once; computed in float32 or wider.

    Args:
        x: points, (B, n); with `subsets.inputs` (B, kept inputs), the coordinates of each group.
        weight: weight vectors, (O, n).
        reduction: what becomes of the distances per coordinate.
        subsets: what takes part; None: everything.

    Returns:
        shape (B, O), or (B, kept outputs).
    """
    wide, w = at_least_float32(x), at_least_float32(weight)
    part = Subsets(max(1, len(x))) if subsets is None else subsets
    result: Tensor = _Distance.apply(wide, w.to(wide.dtype), part, reduction)
    return result


class _Distance(torch.autograd.Function):
    """One layer over all groups: a group's part of the weight exists only while it is used."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, subsets: Subsets, reduction: Reduction
    ) -> Tensor:
        values, saved = [], []
        for group, rows in _groups(x, subsets):
            y, kept = reduction.forward(x[rows], _part(weight, subsets, group))
            values.append(y)
            saved.append(kept)
        ctx.subsets, ctx.reduction = subsets, reduction
        ctx.save_for_backward(x, weight, *saved)
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, *saved = ctx.saved_tensors
        subsets = ctx.subsets
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight)
        for (group, rows), kept in zip(_groups(x, subsets), saved, strict=True):
            w = _part(weight, subsets, group)
            grad_x[rows], part = ctx.reduction.backward(x[rows], w, kept, gradient[rows])
            _add_part(grad_w, part, subsets, group)
        return grad_x, grad_w, None, None


def _groups(x: Tensor, subsets: Subsets) -> Iterator[tuple[int, slice]]:
    for group, start in enumerate(range(0, len(x), subsets.group)):
        yield group, slice(start, start + subsets.group)


def _part(weight: Tensor, subsets: Subsets, group: int) -> Tensor:
    """The rows and columns of the weight that a group uses."""
    if subsets.outputs is not None:
        weight = weight[subsets.outputs[group]]
    if subsets.inputs is not None:
        weight = weight[:, subsets.inputs[group]]
    return weight


def _add_part(whole: Tensor, part: Tensor, subsets: Subsets, group: int) -> None:
    """Add the gradient of `_part` in place; no index occurs twice in a subset."""
    rows: Any = slice(None) if subsets.outputs is None else subsets.outputs[group]
    columns: Any = slice(None) if subsets.inputs is None else subsets.inputs[group]
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        rows = rows[:, None]
    whole[rows, columns] += part


def _tiles(
    x: Tensor, w: Tensor, *, buffers: int
) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """Cut the pairs of samples and outputs into tiles, with buffers (b, o, n) for each tile.

    On the meta device, where nothing is computed, the first tile stands for all: none is larger,
    so none needs more memory.
    """
    n = x.shape[1]
    pairs = max(1, _TILE_ELEMENTS.get(x.device.type, 1 << 18) // max(1, n))
    width = min(len(w), math.isqrt(pairs))
    height = min(len(x), pairs // width)
    memory = x.new_empty(buffers, height * width * n)
    for o in range(0, len(w), width):
        for b in range(0, len(x), height):
            rows = slice(b, min(b + height, len(x)))
            columns = slice(o, min(o + width, len(w)))
            shape = (rows.stop - b, columns.stop - o, n)
            yield rows, columns, tuple(m[: math.prod(shape)].view(shape) for m in memory)
            if x.device.type == "meta":
                return
