"""AOL's patch-wise network: almost orthogonal layers (arXiv 2208.03160, section 5)."""

import math
from collections.abc import Iterator
from typing import Literal, cast

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.matrix_bounds import Matrices
from model.certification.rounding import ErrorState, Program, up
from model.errors import ModelError
from model.networks.base import LipschitzByConstruction
from model.networks.config import STRICT, NetworkConfig
from model.networks.sll.layers import AlmostOrthogonal, finish, max_min
from model.networks.tensor_ops import space_to_depth

_FACTOR = math.sqrt(2)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AolConfig(NetworkConfig):
    """Patches to channels, convolutions, channel reduction, dense layers; MaxMin in between.

    The logits are the first values of the last dense layer.
    """

    kind: Literal["aol"] = "aol"
    patch: int = 4
    """Side of the patches that become channels."""
    channels: int = 192
    """Channels of the convolutions, an even number."""
    conv_layers: int = 12
    """Number of 3x3 convolutions."""
    kept_channels: int
    """Channels that the dense layers see at every position, `size` of the paper."""
    dense_layers: int = 14
    """Number of dense layers."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        super().__post_init__()
        for name, least in (
            ("patch", 1),
            ("channels", 2),
            ("conv_layers", 0),
            ("kept_channels", 1),
            ("dense_layers", 1),
        ):
            if getattr(self, name) < least:
                raise ModelError(f"{name}={getattr(self, name)} must be at least {least}")
        _, height, width = self.input_shape
        if height % self.patch or width % self.patch:
            raise ModelError(f"patch={self.patch} does not divide the image of {height}x{width}")
        if self.kept_channels > self.channels:
            raise ModelError(f"kept_channels={self.kept_channels} exceeds channels={self.channels}")
        if self.channels % 2 or self.features % 2:
            raise ModelError(
                f"channels={self.channels} and the {self.features} values of a dense layer must "
                "be even: MaxMin takes them in pairs"
            )
        if self.num_classes > self.features:
            raise ModelError(
                f"num_classes={self.num_classes} exceeds the {self.features} values of the last "
                "dense layer, whose first ones are the logits"
            )

    @property
    def positions(self) -> int:
        """Number of patches."""
        return self.input_shape[1] * self.input_shape[2] // self.patch**2

    @property
    def features(self) -> int:
        """Values of a dense layer."""
        return self.positions * self.kept_channels


class Aol(LipschitzByConstruction):
    """Every layer is 1-Lipschitz for any weights; two logits differ by sqrt(2) as much at most."""

    norm = "l2"

    def __init__(self, config: AolConfig) -> None:
        super().__init__(config)
        self.patch, self.kept = config.patch, config.kept_channels
        self.convolutions = config.conv_layers + 2
        self.blocks = nn.ModuleList([*_convolutions(config), *_dense(config)])

    def features(self, images: Tensor) -> Tensor:
        """See CertifiedNetwork; all values of the last dense layer."""
        self.check_images(images)
        working = cast(AlmostOrthogonal, self.blocks[0]).weight.dtype
        x = (images.to(torch.promote_types(images.dtype, working)) - 0.5).to(working)
        x = space_to_depth(x, self.patch).permute(0, 3, 1, 2)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if i == self.convolutions - 1:
                x = x[:, : self.kept].flatten(1)
            elif i < last:
                x = max_min(x)
        return x

    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork."""
        x = self.features(images)
        logits = x[:, : self.num_classes]
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        return logits, self._factors(_FACTOR, logits)

    def _factors(self, factor: float, like: Tensor) -> Tensor:
        factors = like.new_full((self.num_classes, self.num_classes), factor)
        return factors.fill_diagonal_(0)

    @property
    def head_rule(self) -> str:
        """The logits are values of the last layer."""
        return "coordinates"

    def margin_factor_bounds(self) -> Tensor:
        """See CertifiedNetwork."""
        weight = cast(AlmostOrthogonal, self.blocks[0]).weight
        return self._factors(
            up(_FACTOR), torch.zeros((), dtype=torch.float64, device=weight.device)
        )

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/explanation/families.md."""
        state = ErrorState.images(norms, math.prod(self.input_shape), program)
        blocks = [cast(AlmostOrthogonal, block) for block in self.blocks]
        for block in blocks:
            block.carry(state)
        return finish(blocks, state, largest_factor * state.error, largest_factor)


def _convolutions(config: AolConfig) -> Iterator[AlmostOrthogonal]:
    """A 1x1 convolution to the channels, the 3x3 ones, and the 1x1 one before the reduction."""
    stem = config.input_shape[0] * config.patch**2
    width, positions = config.channels, config.positions
    yield AlmostOrthogonal(stem, width, kernel=1, positions=positions, initial="orthonormal")
    for _ in range(config.conv_layers):
        yield AlmostOrthogonal(width, width, kernel=3, positions=positions)
    yield AlmostOrthogonal(width, width, kernel=1, positions=positions)


def _dense(config: AolConfig) -> Iterator[AlmostOrthogonal]:
    for _ in range(config.dense_layers):
        yield AlmostOrthogonal(config.features, config.features)
