"""SLL and CPL: residual layers from one matrix inequality (arXiv 2303.03169, section 5)."""

import math
from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.matrix_bounds import Matrices
from model.certification.rounding import ErrorState, Program
from model.errors import ModelError
from model.networks.base import LipschitzByConstruction
from model.networks.config import STRICT, NetworkConfig
from model.networks.head import Head
from model.networks.sll.layers import Residual, Scaling, finish
from model.networks.tensor_ops import at_least_float32


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SllConfig(NetworkConfig):
    """Zero channels up to `channels`, convolutions, pool, dense layers, linear head."""

    kind: Literal["sll"] = "sll"
    scaling: Scaling = "sll"
    """T of every layer: `sll` sums rows of |V V^T| weighted with a learned q, `cpl` (arXiv
    2110.12690) has the squared norm of V."""
    channels: int
    """Channels of the convolutions."""
    conv_layers: int
    """Number of 3x3 convolutional layers at full resolution."""
    conv_inner: int = 5
    """Inner channels of a convolutional layer."""
    pool: int = 4
    """Side of the squares whose values are summed and divided by the side; 1 pools nothing."""
    dense_layers: int
    """Number of dense layers."""
    dense_inner: int = 2048
    """Inner width of a dense layer."""
    head: Literal["unit", "linear"] = "unit"
    """`unit`: the rows of the classifier are normalised; `linear`: used as they are."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        super().__post_init__()
        for name, least in (
            ("conv_layers", 0),
            ("conv_inner", 1),
            ("pool", 1),
            ("dense_layers", 0),
            ("dense_inner", 1),
            ("channels", self.input_shape[0]),
        ):
            if getattr(self, name) < least:
                raise ModelError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.conv_layers + self.dense_layers:
            raise ModelError("conv_layers=0 and dense_layers=0: the network would be linear")
        _, height, width = self.input_shape
        if height % self.pool or width % self.pool:
            raise ModelError(f"pool={self.pool} does not divide the image of {height}x{width}")

    @property
    def features(self) -> int:
        """Values that the dense layers and the head see."""
        return self.channels * math.prod(self.input_shape[1:]) // self.pool**2


class Sll(LipschitzByConstruction):
    """Every layer is 1-Lipschitz for any weights, so the features are."""

    norm = "l2"

    def __init__(self, config: SllConfig) -> None:
        super().__init__(config)
        self.channels, self.pool = config.channels, config.pool
        self.convolutions = config.conv_layers
        convolutions = (
            Residual(
                config.channels,
                config.conv_inner,
                kernel=3,
                positions=math.prod(config.input_shape[1:]),
                scaling=config.scaling,
            )
            for _ in range(config.conv_layers)
        )
        dense = (
            Residual(config.features, config.dense_inner, scaling=config.scaling)
            for _ in range(config.dense_layers)
        )
        self.blocks = nn.ModuleList([*convolutions, *dense])
        self.head = Head(config.features, config.num_classes, config.head)

    def features(self, images: Tensor) -> Tensor:
        """See CertifiedNetwork."""
        self.check_images(images)
        # The parameters of the head have the working type, also where ZeRO-3 holds no value.
        working = self.head.weight.dtype
        x = (images.to(torch.promote_types(images.dtype, working)) - 0.5).to(working)
        x = F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))
        x = self._run(list(self.blocks)[: self.convolutions], x)
        return self._run(list(self.blocks)[self.convolutions :], self._pooled(x))

    def _run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            x = self.run_block(block, x)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        """Sums over squares divided by their side, an operator of norm 1, flattened."""
        wide = at_least_float32(x)
        return (F.avg_pool2d(wide, self.pool) * self.pool).to(x.dtype).flatten(1)

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/explanation/families.md."""
        state = ErrorState.images(norms, math.prod(self.input_shape), program)
        blocks = [cast(Residual, block) for block in self.blocks]
        for block in blocks[: self.convolutions]:
            block.carry(state)
        state.multiply(self.pool**2 + 1, upper=1.0, absolute=1.0)
        for block in blocks[self.convolutions :]:
            block.carry(state)
        error = self.head.margin_error(state, largest_factor)
        return finish(blocks, state, error, largest_factor)
