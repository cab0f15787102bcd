"""LiResNet++ (arXiv 2301.12549, 2310.02513): linear residual convolutions, Cholesky layers."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.dot_products import output_side
from model.certification.matrix_bounds import Matrices, MatrixBound
from model.certification.rounding import ErrorState, Program
from model.errors import ModelError
from model.networks.base import CertifiedNetwork, LipschitzBound
from model.networks.config import STRICT, NetworkConfig
from model.networks.head import Head
from model.networks.liresnet.cholesky import SMALLEST
from model.networks.liresnet.layers import CholeskyDense
from model.networks.liresnet.regularized_conv import LinearResidual, RegularisedConvolution
from model.networks.soc.activations import MaxMin
from model.networks.tensor_ops import space_to_depth

_OBSERVED_SHARE = 0.99
"""Both are found by a Krylov method from different starts, from below."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LiResNetConfig(NetworkConfig):
    """Stem, linear residual blocks, neck, dense layers, head with unit rows."""

    kind: Literal["liresnet"] = "liresnet"
    stem_kernel: int = 5
    """Side of the kernel of the first convolution."""
    stem_stride: int = 2
    """Its step."""
    stem_padding: int = 2
    """Its zeros on every side."""
    width: int
    """Channels of the blocks."""
    depth: int = 12
    """Blocks."""
    neck_patch: int = 4
    """Side of the patches that the neck's first matrix maps to `width` channels."""
    dense_width: int = 2048
    """Width of the dense layers."""
    dense_layers: int = 8
    """Dense layers after the neck."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        super().__post_init__()
        self._at_least(("stem_kernel", 1), ("stem_stride", 1), ("stem_padding", 0))
        self._at_least(("depth", 1), ("neck_patch", 1), ("dense_layers", 0))
        for name in ("width", "dense_width"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ModelError(f"{name}={getattr(self, name)} must be positive and even")
        if min(self.stem_grid) < 1:
            raise ModelError(
                f"stem_kernel={self.stem_kernel} is larger than the image {self.input_shape}"
            )
        height, width = self.last_grid
        if height % self.neck_patch or width % self.neck_patch:
            raise ModelError(f"neck_patch={self.neck_patch} does not divide {height}x{width}")
        if self.neck_features < self.dense_width:
            raise ModelError(
                f"dense_width={self.dense_width} is larger than the {self.neck_features} values "
                "that the neck sees"
            )

    def _at_least(self, *limits: tuple[str, int]) -> None:
        for name, least in limits:
            if getattr(self, name) < least:
                raise ModelError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def stem_grid(self) -> tuple[int, int]:
        """Height and width after the stem."""
        height, width = (
            output_side(n, self.stem_kernel, self.stem_stride, self.stem_padding)
            for n in self.input_shape[1:]
        )
        return height, width

    @property
    def last_grid(self) -> tuple[int, int]:
        """Height and width after the last block."""
        return self.stem_grid

    @property
    def neck_features(self) -> int:
        """Values that the first dense matrix sees."""
        return self.width * math.prod(self.last_grid) // self.neck_patch**2


class Patches(nn.Module):
    """A dense layer on every patch of an image: a convolution whose stride is its side."""

    def __init__(self, patch: int, layer: nn.Module) -> None:
        super().__init__()
        self.patch, self.layer = patch, layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, values)."""
        y: Tensor = self.layer(space_to_depth(x, self.patch))
        return y.flatten(1)


class LiResNet(CertifiedNetwork):
    """The norms of stem and blocks are free; neck and dense layers are 1-Lipschitz."""

    norm = "l2"

    def __init__(self, config: LiResNetConfig) -> None:
        super().__init__(config)
        channels, height, width = config.input_shape
        self.stem = RegularisedConvolution(
            channels,
            config.width,
            kernel=config.stem_kernel,
            stride=config.stem_stride,
            padding=config.stem_padding,
            shape=(height, width),
        )
        self.blocks = nn.ModuleList(self._blocks(config))
        self.activation = MaxMin(config.width)
        self.neck = nn.ModuleList(self._neck(config))
        self.dense = nn.ModuleList(self._dense(config))
        self.head = Head(config.dense_width, config.num_classes)

    @staticmethod
    def _blocks(config: Any) -> Iterable[nn.Module]:
        for _ in range(config.depth):
            yield LinearResidual(config.width, depth=config.depth, shape=config.stem_grid)

    @staticmethod
    def _neck(config: Any) -> Iterable[nn.Module]:
        patch = config.neck_patch
        convolution = CholeskyDense(config.width * patch**2, config.width, bias=False)
        yield Patches(patch, convolution)
        yield CholeskyDense(config.neck_features, config.dense_width)

    @staticmethod
    def _dense(config: Any) -> Iterable[nn.Module]:
        width, depth = config.dense_width, config.dense_layers
        return (CholeskyDense(width, width, depth=depth) for _ in range(depth))

    def features(self, images: Tensor) -> Tensor:
        """See CertifiedNetwork."""
        return self._run(images)[0]

    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork; the factors hold the estimated norms of stem and blocks."""
        features, lipschitz = self._run(images)
        logits, factors = self.head(features)
        return logits, lipschitz * factors

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, dense_width) and the product of the estimated norms."""
        self.check_images(images)
        # The parameters of the head have the working type, also where ZeRO-3 holds no value.
        wide = torch.promote_types(self.head.weight.dtype, torch.float32)
        x = images.to(torch.promote_types(images.dtype, wide)) - 0.5
        lipschitz = x.new_ones(())
        for block in (self.stem, *self.blocks):
            y = block(x) if block is self.stem else self.run_block(block, x)
            if isinstance(y, tuple):  # its norm is free, and comes with it
                y, lipschitz = y[0], lipschitz * y[1]
            x = self.activation(y)
        *start, last = self.neck
        for layer in start:
            x = layer(x)
        x = self.activation(last(x))
        for layer in self.dense:
            x = self.activation(layer(x))
        return x, lipschitz

    def begin_step(self, *, step: int, progress: float, seed: int) -> None:
        """See CertifiedNetwork: where the estimates of the norms begin."""
        for i, (_, layer) in enumerate(self._regularised()):
            layer.seed = ((seed * 1_000_003 + step) * 1_009 + i) % 2**63

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """See CertifiedNetwork; the observed norms of stem and blocks are stored as well."""
        super().calibrate(batches)
        for _, layer in self._regularised():
            layer.measure()

    def _layers(self) -> Iterator[tuple[str, Any]]:
        """All layers that change bounds, by name, in the order of the forward pass."""
        yield "stem", self.stem
        for part in ("blocks", "neck", "dense"):
            for i, layer in enumerate(self.get_submodule(part).children()):
                inner = isinstance(layer, Patches)
                yield f"{part}.{i}{'.layer' * inner}", layer.layer if inner else layer

    def _regularised(self) -> Iterator[tuple[str, RegularisedConvolution]]:
        for name, layer in self._layers():
            if isinstance(layer, RegularisedConvolution):
                yield name, layer

    @property
    def bounded_matrices(self) -> tuple[str, ...]:
        """See CertifiedNetwork."""
        return tuple(f"{name}.weight" for name, layer in self._layers() if hasattr(layer, "weight"))

    def bound_matrix(self, name: str, stored: Tensor) -> MatrixBound:
        """See CertifiedNetwork; of the operator that the layer makes of the parameter."""
        bound: MatrixBound = dict(self._layers())[name.removesuffix(".weight")].bound(name, stored)
        return bound

    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        """Product of the proved norms of stem and blocks.

        All other layers, MinMax and centering are 1-Lipschitz exactly, for any weights. The stored
        norms do not enter; but a nominal column made of numbers that are no norms of these
        convolutions would be a fiction.

        Raises:
            ModelError: a weight is not finite, or a stored norm is below an observed one.
        """
        known = self.matrix_bounds() if matrices is None else matrices
        for name, layer in self._regularised():
            _check_stored_norm(name, float(layer.norm), known[f"{name}.weight"].lower)
        parts = {name: known[f"{name}.weight"].upper for name, _ in self._regularised()}
        return LipschitzBound.product(parts)

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/explanation/families.md."""
        pixels = math.prod(self.input_shape)
        state = ErrorState.images(norms, pixels, program)
        growth, condition, stored = max(1.0, largest_factor), 1.0, 1.0
        for name, layer in self._layers():
            bound = matrices.get(f"{name}.weight")
            if bound is None:  # a pool
                layer.carry(state)
                continue
            layer.carry(state, bound)
            growth *= max(1.0, bound.upper)
            condition = max(condition, getattr(bound, "condition", 1.0))
            stored = max(stored, float(layer.weight.abs().max()))
        error = self.head.margin_error(state, largest_factor)
        # Whatever is smaller than the smallest normal number may be lost, in any operation. An
        # entry of S that is off by it moves Q by condition / SMALLEST times as much, and a gain
        # that is lost takes with it what it is multiplied with.
        values = pixels + sum(p.numel() for p in self.parameters())
        size = 4 * condition / SMALLEST * stored * state.peak.clamp(min=1)
        state.note(torch.full_like(state.peak, stored))
        underflow = 1024.0 * values**2 * program.tiny * growth * size
        return state.finish(error, underflow)


def _check_stored_norm(name: str, stored: float, observed: float) -> None:
    # Not a number: nobody has measured it yet, and `certify` refuses what is made of it.
    if stored < _OBSERVED_SHARE * observed:
        raise ModelError(
            f"{name} stores {stored:.6g} as the norm of its convolution, where {observed:.6g} is "
            "observed: the nominal radii would be those of another network"
        )
