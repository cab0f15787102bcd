"""GroupSort and MaxMin networks in l-infinity (arXiv 1811.05381).

Rows of every matrix have an l1 norm of at most 1, so a layer is 1-Lipschitz in l-infinity; so is
sorting within groups of channels, in every norm.
"""

import itertools
import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.matrix_bounds import Matrices
from model.certification.rounding import SLACK, U64, ErrorState, Program, gamma
from model.errors import ModelError
from model.networks.base import LipschitzByConstruction
from model.networks.config import STRICT, NetworkConfig
from model.networks.init import set_initial
from model.networks.linf.common import centred_pixels, largest_entry, proved_error
from model.networks.tensor_ops import at_least_float32


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupSortConfig(NetworkConfig):
    """Dense layers with rows of l1 norm at most 1, and sorting in groups between them."""

    kind: Literal["groupsort"] = "groupsort"
    width: int
    """Channels of every hidden layer."""
    depth: int
    """Matrices, the head counted."""
    sorted_channels: int = 2
    """Channels that are sorted together: 2 is MaxMin, `width` a full sort."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        super().__post_init__()
        for name, least in (("width", 1), ("depth", 2), ("sorted_channels", 2)):
            if getattr(self, name) < least:
                raise ModelError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.width % self.sorted_channels:
            raise ModelError(
                f"sorted_channels={self.sorted_channels} does not divide width={self.width}"
            )


def bounded_rows(weight: Tensor) -> Tensor:
    """Rows w / max(1, ||w||_1) of a weight (O, n), in float32 or wider."""
    wide = at_least_float32(weight)
    return wide / wide.abs().sum(1, keepdim=True).clamp(min=1)


def group_sort(x: Tensor, size: int) -> Tensor:
    """Sort each group of `size` neighbouring channels of (B, C), in ascending order."""
    groups = x.unflatten(1, (-1, size))
    if size == 2:  # much cheaper than a sort
        low, high = groups.amin(2), groups.amax(2)
        return torch.stack([low, high], 2).flatten(1)
    return groups.sort(2).values.flatten(1)


class RowBoundedLinear(nn.Module):
    """W x + b whose rows have an l1 norm of at most 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = set_initial(nn.Parameter(torch.empty(outputs, inputs)), "selecting")
        self.bias = set_initial(nn.Parameter(torch.empty(outputs)), "zeros")

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, n) to (B, O), in the type of x."""
        rows = bounded_rows(self.weight).to(x.dtype)
        return F.linear(x, rows, self.bias.to(x.dtype))


class RowBoundedHead(RowBoundedLinear):
    """Logits, and for every pair of them the l1 distance of their rows."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits (B, K) and factors (K, K) in float32 or wider, of features (B, F)."""
        rows = bounded_rows(self.weight)
        bias = at_least_float32(self.bias)
        return F.linear(x.to(rows.dtype), rows, bias), row_distances(rows)


def row_distances(rows: Tensor) -> Tensor:
    """||v_i - v_j||_1 of all pairs, (K, K): logit i - logit j moves by that in l-infinity."""
    return torch.cdist(rows, rows, p=1)


class GroupSort(LipschitzByConstruction):
    """Row-bounded matrices with GroupSort between them.

    1-Lipschitz for any weights: rows are divided by their l1 norm where it exceeds 1.
    """

    norm = "linf"

    def __init__(self, config: GroupSortConfig) -> None:
        super().__init__(config)
        self.sorted_channels = config.sorted_channels
        sizes = [math.prod(config.input_shape)] + [config.width] * (config.depth - 1)
        self.blocks = nn.ModuleList(
            RowBoundedLinear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)
        )
        self.head = RowBoundedHead(config.width, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Output of the last sort, shape (B, width); see CertifiedNetwork."""
        self.check_images(images)
        x = centred_pixels(images, 1.0).flatten(1)
        for block in self.blocks:
            x = self.run_block(block, x)
            x = group_sort(x, self.sorted_channels)
        return x

    @property
    def head_rule(self) -> str:
        """See CertifiedNetwork."""
        return "l1_rows"

    @torch.no_grad()
    def margin_factor_bounds(self) -> Tensor:
        """||v_i - v_j||_1 of the rows as normalised, at most 2; see CertifiedNetwork."""
        if not all(bool(p.isfinite().all()) for p in self.parameters()):
            raise ModelError("the network holds values that are not finite")
        weight = self.head.weight.double()
        n = weight.shape[1]
        # A row, of norm at most 1, errs by gamma(2n + 2); the distance of two by gamma(n + 1) more.
        error = 2 * gamma(2 * n + 2, U64) + 2 * gamma(n + 1, U64)
        bounds = (row_distances(bounded_rows(weight)) + error) * SLACK
        return bounds.fill_diagonal_(0)

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/explanation/families.md, GroupSort."""
        state = ErrorState.images(norms, 1, program)
        layers = [cast(RowBoundedLinear, layer) for layer in (*self.blocks, self.head)]
        for layer in layers[:-1]:
            state.error = state.error + _carry(state, layer)
        # Logits i and j differ by (v_i - v_j) h: h errs into them by the factor of the pair.
        error = largest_factor * state.error + 2 * _carry(state, layers[-1])
        widest = max(layer.weight.shape[1] for layer in layers)
        return proved_error(state, error, 8 + len(layers) * (4 * widest + 8), 1.0)


def _carry(state: ErrorState, layer: RowBoundedLinear) -> Tensor:
    """Carry the norm through a layer; what its own arithmetic adds to the error, (B,).

    A computed row has a relative error of gamma(2n + 2): n roundings of its norm, which divides,
    and two of the quotient. The program's copy of the weights errs in numerator and norm.
    """
    inputs, bias = layer.weight.shape[1], largest_entry(layer.bias)
    size = state.computed + bias
    state.norm = state.norm + bias
    # A row whose norm overflows is divided by infinity and becomes 0.
    state.note(size.clamp(min=float(layer.weight.double().abs().sum(1).max()) * SLACK))
    return state.program.product(3 * inputs + 3, copies=3, roundings=3) * size
