"""BRONet: LiResNet's stem and head, with reflections I - 2 Q^* Q: docs/explanation/families.md.

A reflecting convolution works on the torus of the image with a margin of one zero: every frequency
is reflected on its own. Margin, reflection and cutting off do not expand.
"""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from model.verifier.families.liresnet import LiResNet
from model.verifier.families.liresnet_layers import Layer, linear_block, patches, stem_grid
from model.verifier.mathematics.cholesky import Rows
from model.verifier.mathematics.eigen_bounds import adjoint, multiply
from model.verifier.mathematics.orthogonal_layers import (
    NECK,
    REFLECTION,
    carry_transform,
    dense_rows,
    from_waves,
    to_waves,
    wave_rows,
)
from model.verifier.mathematics.rounding import ErrorState, Floats, gamma, norm_of
from model.verifier.network_config import SIDE, Choice, Config, Flag, Setting, Whole

_TAU = 1e-6


class BRONet(LiResNet):
    """See LiResNet."""

    settings: ClassVar[Mapping[str, Setting]] = {
        **LiResNet.settings,
        "rank": Whole(1, SIDE),
        "linear_depth": Whole(0, 10_000, 0),
        "grow": Flag(False),
        "neck": Choice(("cholesky", "reflection", "pool"), "cholesky"),
        "dense_rank": Whole(0, SIDE, 0),
    }

    @classmethod
    def last_grid(cls, config: Config) -> tuple[int, int]:
        """See LiResNet."""
        height, width = stem_grid(config)
        more = 2 * config["depth"] * config["grow"]
        return height + more, width + more

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        if config["rank"] >= config["width"] or config["dense_rank"] >= config["dense_width"]:
            return "rank and dense_rank must be smaller than the widths"
        return super().misfit(config)

    @classmethod
    def blocks(cls, config: Config) -> Iterator[Layer]:
        """See LiResNet."""
        for _ in range(config["linear_depth"]):
            yield linear_block(config, config["linear_depth"])
        (height, width), C, depth = stem_grid(config), config["width"], config["depth"]
        for _ in range(depth):
            height, width = height + 2 * config["grow"], width + 2 * config["grow"]
            shape = (C, 9 * config["rank"] + 1)
            yield Layer("wave", shape, C, depth, REFLECTION, grid=(height, width))

    @classmethod
    def neck(cls, config: Config) -> Iterator[Layer | None]:
        """See LiResNet; None: the pool, which stores nothing."""
        if config["neck"] == "cholesky":
            yield from super().neck(config)
            return
        C, dense = config["width"], config["dense_width"]
        grid = patches(config, cls.last_grid(config))
        features = C * math.prod(grid)
        if config["neck"] == "pool":
            yield None
            yield Layer("rows", (dense, features), dense)
            return
        shape = (C, C * config["neck_patch"] ** 2)
        yield Layer("reflection", shape, C, share=NECK, bias=False, grid=grid)
        yield Layer("reflection", (dense, features), dense, share=NECK)

    @classmethod
    def dense(cls, config: Config) -> Iterator[Layer]:
        """See LiResNet."""
        if not config["dense_rank"]:
            yield from super().dense(config)
            return
        width, depth = config["dense_width"], config["dense_layers"]
        for _ in range(depth):
            shape = (width, config["dense_rank"] + 1)
            yield Layer("reflection", shape, width, depth, REFLECTION)

    @classmethod
    def rows(cls, config: Config, layer: Layer, weight: Floats) -> Rows:
        """See LiResNet."""
        if layer.kind == "wave":
            return wave_rows(weight, layer.depth, config["rank"], _torus(config, layer))
        flip = layer.kind == "reflection" and layer.depth > 0
        return dense_rows(weight, layer.depth, layer.share, transposed=flip)

    def carry_layer(self, state: ErrorState, name: str, layer: Layer) -> None:
        """See LiResNet."""
        if name == "neck.1" and self.config["neck"] == "pool":
            self._carry_pool(state)
        if layer.kind not in ("wave", "reflection"):
            super().carry_layer(state, name, layer)
            return
        if layer.kind == "wave":
            carry_transform(state, _torus(self.config, layer))
        self.orthonormal(name).carry_reflection(state)
        if layer.kind == "wave":
            carry_transform(state, _torus(self.config, layer))
        for each in (f"{name}.centre.mean", f"{name}.bias"):
            if each in self.tensors:
                state.translate(math.sqrt(math.prod(layer.grid)) * norm_of(self.tensors[each]))

    def _carry_pool(self, state: ErrorState) -> None:
        grid, wide = patches(self.config, self.last_grid(self.config)), state.program.wide
        smoothing = self.config["width"] * math.prod(grid) * _TAU**2
        pooled = np.sqrt(np.square(state.size) + smoothing)
        state.e = state.e + gamma(self.config["neck_patch"] ** 2 + 6, wide) * pooled
        state.n = np.sqrt(np.square(state.n) + smoothing)
        state.see(state.size)

    def apply(self, name: str, layer: Layer, x: Floats) -> Floats:
        """See LiResNet."""
        if layer.kind != "wave":
            return super().apply(name, layer, x)
        z = to_waves(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))))
        Q = self.orthonormal(name).Q.reshape(*z.shape[2:], -1, z.shape[1])
        moved = z.transpose(2, 3, 1, 0)
        moved = moved - 2 * multiply(adjoint(Q), multiply(Q, moved))
        y = from_waves(moved.transpose(3, 2, 0, 1), _torus(self.config, layer)[1])
        if not self.config["grow"]:
            y = y[:, :, 1:-1, 1:-1]
        shift = self.wide(f"{name}.bias") - self.wide(f"{name}.centre.mean")
        return y + shift[:, None, None]

    def points(self, name: str, x: Floats) -> Floats:
        """See LiResNet; in place of the neck's first layer there may be norms over patches."""
        if name == "neck.1" and self.config["neck"] == "pool":
            b, c, h, w = x.shape
            p = self.config["neck_patch"]
            squares = np.square(x).reshape(b, c, h // p, p, w // p, p).sum(axis=(3, 5))
            return np.sqrt(squares + _TAU**2).reshape(b, -1)
        return super().points(name, x)

    def product(self, name: str, layer: Layer, x: Floats) -> Floats:
        """See LiResNet; a reflection keeps its first outputs."""
        if layer.kind != "reflection":
            return super().product(name, layer, x)
        Q = self.orthonormal(name).Q[0]
        result: Floats = x[..., : layer.outputs] - 2 * (x @ Q.T) @ Q[:, : layer.outputs]
        return result


def _torus(config: Config, layer: Layer) -> tuple[int, int]:
    """Sides of the image with its margin; a growing block keeps the margin."""
    more = 0 if config["grow"] else 2
    return layer.grid[0] + more, layer.grid[1] + more
