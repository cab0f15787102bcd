"""LiResNet++ and BRONet: docs/explanation/families.md.

Stem and linear blocks have free norms, which are the parts; everything else is 1-Lipschitz for any
weights: rows made orthonormal, reflections, centring, MaxMin, pools of patches.
"""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family, Shapes, Tensors
from model.verifier.families.liresnet_layers import (
    Layer,
    free_bounds,
    free_kernel,
    linear_block,
    misfit,
    no_norm,
    patches,
    stem_grid,
    stored_shapes,
)
from model.verifier.mathematics.activations import MaxMin
from model.verifier.mathematics.cholesky import Rows
from model.verifier.mathematics.convolution import convolve, space_to_depth
from model.verifier.mathematics.linear_head import LinearHead
from model.verifier.mathematics.matrix_bounds import MatrixBounds
from model.verifier.mathematics.orthogonal_layers import Orthonormal, bounds_of_rows, dense_rows
from model.verifier.mathematics.rounding import (
    ErrorState,
    Floats,
    Program,
    kappa,
    largest_entry,
    norm_of,
)
from model.verifier.network_config import SIDE, Config, Setting, Whole


class LiResNet(Family):
    """Stem, linear residual blocks, neck, dense layers, a head with unit rows."""

    same_bound: ClassVar[float] = 1e-7  # a theorem there and a residual here
    settings: ClassVar[Mapping[str, Setting]] = {
        "stem_kernel": Whole(1, 256, 5),
        "stem_stride": Whole(1, 256, 2),
        "stem_padding": Whole(0, 256, 2),
        "width": Whole(2, SIDE),
        "depth": Whole(1, 10_000, 12),
        "neck_patch": Whole(1, SIDE, 4),
        "dense_width": Whole(2, SIDE, 2048),
        "dense_layers": Whole(0, 10_000, 8),
    }

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        super().__init__(config, tensors, matrices)
        self.head = LinearHead(tensors["head.weight"], tensors["head.bias"], "unit")
        self.layers = self.plan(config)
        self.free = [n for n, layer in self.layers.items() if layer.kind in ("stem", "linear")]
        self._orthonormal: dict[str, Orthonormal] = {}

    @classmethod
    def plan(cls, config: Config) -> dict[str, Layer]:
        """All layers with weights, by name, in the order of the forward pass."""
        channels, grid = config["input_shape"][0], stem_grid(config)
        values = channels * config["stem_kernel"] ** 2
        plan = {"stem": Layer("stem", (config["width"], values), config["width"], grid=grid)}
        plan |= {f"blocks.{i}": layer for i, layer in enumerate(cls.blocks(config))}
        plan |= {f"neck.{i}": layer for i, layer in enumerate(cls.neck(config)) if layer}
        plan = {f"{name}.layer" if name == "neck.0" else name: plan[name] for name in plan}
        return plan | {f"dense.{i}": layer for i, layer in enumerate(cls.dense(config))}

    @classmethod
    def last_grid(cls, config: Config) -> tuple[int, int]:
        """Height and width that the neck sees."""
        return stem_grid(config)

    @classmethod
    def blocks(cls, config: Config) -> Iterator[Layer]:
        """The blocks after the stem."""
        for _ in range(config["depth"]):
            yield linear_block(config, config["depth"])

    @classmethod
    def neck(cls, config: Config) -> Iterator[Layer | None]:
        """Patches to channels, then all values to the dense width."""
        width, values = config["width"], config["width"] * config["neck_patch"] ** 2
        grid = patches(config, cls.last_grid(config))
        yield Layer("rows", (width, values), width, bias=False, grid=grid)
        dense = config["dense_width"]
        yield Layer("rows", (dense, width * math.prod(grid)), dense)

    @classmethod
    def dense(cls, config: Config) -> Iterator[Layer]:
        """The dense layers."""
        width, depth = config["dense_width"], config["dense_layers"]
        for _ in range(depth):
            yield Layer("rows", (width, width + 1), width, depth)

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        return misfit(config, cls.last_grid(config))

    @classmethod
    def shapes(cls, config: Config) -> Shapes:
        """See Family."""
        width, classes = config["dense_width"], config["num_classes"]
        layers = stored_shapes(cls.plan(config))
        return {**layers, "head.weight": (classes, width), "head.bias": (classes,)}

    @classmethod
    def bounded(cls, config: Config) -> list[str]:
        """See Family."""
        return [f"{name}.weight" for name in cls.plan(config)]

    # Bounds

    @classmethod
    def bound_matrix(
        cls, config: Config, name: str, tensor: npt.NDArray[np.float32]
    ) -> MatrixBounds:
        """See Family."""
        layer, weight = cls.plan(config)[name.removesuffix(".weight")], tensor.astype(np.float64)
        if layer.kind in ("stem", "linear"):
            return free_bounds(config, layer, weight)
        return bounds_of_rows(weight, cls.rows(config, layer, weight))

    @classmethod
    def rows(cls, config: Config, layer: Layer, weight: Floats) -> Rows:
        """X of a layer whose rows are made orthonormal."""
        return dense_rows(weight, layer.depth, layer.share, transposed=False)

    def parts(self) -> dict[str, float]:
        """Norms of the stem and of the linear blocks."""
        return {name: self.matrices[f"{name}.weight"].upper for name in self.free}

    def refuted(self) -> str | None:
        """See Family; stored norms serve the nominal column alone, and must be norms for it."""
        for name in self.free:
            weight, stored = self.wide(f"{name}.weight"), float(self.tensors[f"{name}.norm"])
            if reason := no_norm(self.config, self.layers[name], weight, stored):
                return f"tensor {name}.norm is {reason}"
        return None

    @property
    def nominal_bound(self) -> float:
        """The stored estimates of the free norms."""
        return math.prod(float(self.tensors[f"{name}.norm"]) for name in self.parts())

    def orthonormal(self, name: str) -> Orthonormal:
        """Q of a layer; made once."""
        if name not in self._orthonormal:
            rows = self.rows(self.config, self.layers[name], self.wide(f"{name}.weight"))
            rho = self.matrices[f"{name}.weight"].condition
            self._orthonormal[name] = Orthonormal(rows, math.inf if rho is None else rho)
        return self._orthonormal[name]

    # Rounding

    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """See Family; both networks compute in float32 or wider."""
        shift = math.sqrt(math.prod(self.config["input_shape"])) / 2
        state = ErrorState.of_images(norms, shift, program.in_wide())
        for name, layer in self.layers.items():
            self.carry_layer(state, name, layer)
        return state

    def carry_layer(self, state: ErrorState, name: str, layer: Layer) -> None:
        """Rounding of one layer."""
        beta = self.translation(name, layer)
        if layer.kind in ("stem", "linear"):
            k = layer.shape[1] - (layer.kind == "linear")  # less the gain
            bounds = self.matrices[f"{name}.weight"]
            rounding = kappa(k, state.program, copies=2, roundings=12)
            state.multiply(bounds.upper, bounds.absolute, rounding, beta)
            return
        self.orthonormal(name).carry_rows(state)
        if layer.bias:
            state.translate(beta)

    def translation(self, name: str, layer: Layer) -> float:
        """Norm of the bias and of the mean, over all positions."""
        names = (f"{name}.bias", f"{name}.centre.mean")
        total = sum(norm_of(self.tensors[each]) for each in names if each in self.tensors)
        return math.sqrt(math.prod(layer.grid)) * total

    def underflow(self, program: Program) -> float:
        """See Family."""
        values = sum(self.tensors[name].size for name in self.tensors)
        pixels = math.prod(self.config["input_shape"])
        rhos = [bounds.condition for bounds in self.matrices.values() if bounds.condition]
        growth = math.prod(max(1.0, part) for part in self.parts().values())
        growth *= max(1.0, float(self.head.factors.max())) * max([1.0, *rhos])
        # A gain that is flushed takes its row of V with it.
        widest = max(largest_entry(t) for t in self.tensors.values() if t.ndim > 1)
        growth *= max(1.0, widest) if widest <= program.limit else math.inf
        return 1024 * float(values + pixels) ** 2 * program.tiny * 2.0**12 * growth

    # The forward pass

    @property
    def floats_per_image(self) -> int:
        """See Family."""
        grid = math.prod(self.last_grid(self.config)) * 4
        return max(math.prod(self.config["input_shape"]), self.config["width"] * grid)

    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """See Family."""
        x = images / 255.0 - 0.5
        for name, layer in self.layers.items():
            x = self.apply(name, layer, x)
            if not name.startswith("neck.0"):
                x = MaxMin(None).apply(x)
        return x

    def apply(self, name: str, layer: Layer, x: Floats) -> Floats:
        """One layer without its activation."""
        if layer.kind in ("stem", "linear"):
            weight, bias = self.wide(f"{name}.weight"), self.wide(f"{name}.bias")
            kernel, _, stride, padding = free_kernel(self.config, layer, weight)
            y = convolve(x, kernel, stride=stride, padding=padding) + bias[:, None, None]
            if layer.kind == "linear":
                y = y - self.wide(f"{name}.centre.mean")[:, None, None]
            return y
        y = self.product(name, layer, self.points(name, x))
        if layer.bias:
            y = y + self.wide(f"{name}.bias")
        return y.reshape(len(y), -1)

    def points(self, name: str, x: Floats) -> Floats:
        """What a dense layer sees: patches in the neck's first, everything later."""
        if not name.startswith("neck.0"):
            return x.reshape(len(x), -1)
        x = space_to_depth(x, self.config["neck_patch"])
        return x.transpose(0, 2, 3, 1)

    def product(self, name: str, layer: Layer, x: Floats) -> Floats:
        """Q x on the last axis."""
        return np.asarray(x @ self.orthonormal(name).Q[0].T)
