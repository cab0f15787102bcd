"""BRONet (arXiv 2505.15174): convolutions and dense layers that are block reflections."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.rounding import ErrorState, gamma
from model.errors import ModelError
from model.networks.config import STRICT
from model.networks.liresnet.layers import CholeskyDense, DenseReflection, ReflectionConvolution
from model.networks.liresnet.network import LiResNet, LiResNetConfig, Patches
from model.networks.liresnet.regularized_conv import LinearResidual
from model.networks.tensor_ops import at_least_float32

_POOL_TAU = 1e-6


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BRONetConfig(LiResNetConfig):
    """LiResNet's stem and head; reflections in place of free convolutions."""

    kind: Literal["bronet"] = "bronet"  # type: ignore[assignment]
    rank: int
    """Inner channels n of every reflecting convolution; n = width would give minus the identity."""
    linear_depth: int = 0
    """Linear residual blocks, as LiResNet's, before the `depth` reflecting ones; 0: none."""
    grow: bool = False
    """Keep the margin of each convolution, so that every block adds two rows and two columns."""
    neck: Literal["cholesky", "reflection", "pool"] = "cholesky"
    """The neck's matrices, or `pool`: norms over patches in place of the first of them."""
    dense_rank: int = 0
    """Rank of the reflections of the dense layers; 0: Cholesky dense layers."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        self._at_least(("rank", 1), ("linear_depth", 0), ("dense_rank", 0))
        for name, limit in (("rank", "width"), ("dense_rank", "dense_width")):
            if getattr(self, name) >= getattr(self, limit):
                raise ModelError(
                    f"{name}={getattr(self, name)} must be smaller than {limit}="
                    f"{getattr(self, limit)}"
                )
        super().__post_init__()

    @property
    def last_grid(self) -> tuple[int, int]:
        """Height and width after the last block."""
        height, width = self.stem_grid
        more = 2 * self.depth * self.grow
        return height + more, width + more


class BlockPool(nn.Module):
    """Norms over patches, sqrt(sum x^2 + tau^2): 1-Lipschitz, and tau keeps gradients finite."""

    def __init__(self, patch: int, values: int) -> None:
        super().__init__()
        self.patch, self.values = patch, values

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, values)."""
        squares = nn.functional.avg_pool2d(at_least_float32(x).square(), self.patch)
        return (squares * self.patch**2 + _POOL_TAU**2).sqrt().flatten(1)

    def carry(self, state: ErrorState) -> None:
        """Carry bounds of the input through the pool."""
        floor = self.values * _POOL_TAU**2
        pooled = (state.computed**2 + floor).sqrt()
        state.error = state.error + gamma(self.patch**2 + 6, state.program.wide) * pooled
        state.norm = (state.norm**2 + floor).sqrt()
        state.note(state.computed)


class BRONet(LiResNet):
    """The norms of stem and linear blocks are free; everything else is 1-Lipschitz."""

    @staticmethod
    def _blocks(config: Any) -> Iterable[nn.Module]:
        shape = config.stem_grid
        for _ in range(config.linear_depth):
            yield LinearResidual(config.width, depth=config.linear_depth, shape=shape)
        for _ in range(config.depth):
            block = ReflectionConvolution(
                config.width, rank=config.rank, depth=config.depth, shape=shape, grow=config.grow
            )
            shape = block.grid
            yield block

    @staticmethod
    def _neck(config: Any) -> Iterable[nn.Module]:
        patch, features, width = config.neck_patch, config.neck_features, config.dense_width
        if config.neck == "pool":
            yield BlockPool(patch, features)
            yield CholeskyDense(features, width)
        elif config.neck == "cholesky":
            yield from LiResNet._neck(config)
        else:
            inputs = config.width * patch**2
            convolution = DenseReflection(inputs, config.width, rank=config.width, bias=False)
            yield Patches(patch, convolution)
            yield DenseReflection(features, width, rank=width)

    @staticmethod
    def _dense(config: Any) -> Iterable[nn.Module]:
        if not config.dense_rank:
            return LiResNet._dense(config)
        width, depth, rank = config.dense_width, config.dense_layers, config.dense_rank
        return (DenseReflection(width, width, rank=rank, depth=depth) for _ in range(depth))
