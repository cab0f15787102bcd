"""SortNet, l-infinity-distance nets, and SortNet + MLP: docs/explanation/families.md.

|x - w|, sorting and sums with non-negative coefficients of sum at most 1 do not expand the largest
entry, whatever the weights: the constant is the scale of the pixels.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family, Shapes, Tensors
from model.verifier.mathematics.linear_head import Head
from model.verifier.mathematics.matrix_bounds import MatrixBounds
from model.verifier.mathematics.rounding import ErrorState, Floats, Program, kappa, largest_entry
from model.verifier.mathematics.tanh_head import TanhHead
from model.verifier.network_config import SIDE, Config, Flag, Number, Setting, Whole

_TILE = 1 << 22  # distances at a time


class SortNet(Family):
    """Layers of sorted distances to weight vectors, centred in between."""

    norm: ClassVar[Literal["l2", "linf"]] = "linf"
    settings: ClassVar[Mapping[str, Setting]] = {
        "width": Whole(1, SIDE),
        "depth": Whole(2, 10_000),
        "hidden": Whole(0, SIDE, 0),
        "window": Whole(0, SIDE, 0),
        "window_stride": Whole(1, SIDE, 1),
        "keep": Number(2.0**-60, 1.0, 1.0),
        "top": Whole(1, SIDE, 10),
        "input_scale": Number(2.0**-20, 2.0**20, 1.0),
        # Training alone knows these.
        "group": Whole(1, 1 << 30, 32),
        "passing": Flag(False),
        "p_start": Number(2.0, 1e308, 8.0),
        "p_end": Number(2.0, 1e308, 1000.0),
        "p_from": Number(0.0, 1.0, 1 / 15),
        "p_to": Number(0.0, 1.0, 29 / 30),
    }
    head: "ScaledHead | TanhHead"

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        super().__init__(config, tensors, matrices)
        self.depth, self.scale = config["depth"], float(config["input_scale"])
        self.coefficients = _coefficients(config)
        if config["hidden"]:
            names = ("inner", "inner_bias", "outer", "outer_bias")
            self.head = TanhHead(*(self.wide(f"head.{name}") for name in names))
        else:
            self.head = ScaledHead(self.wide("head.weight"), self.wide("head.bias"))

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        window, stride = config["window"], config["window_stride"]
        _, *sides = config["input_shape"]
        if window and not config["hidden"]:
            return "a window needs hidden units"
        if window and any(side < window or (side - window) % stride for side in sides):
            return "window, window_stride and input_shape do not fit"
        return None

    @classmethod
    def shapes(cls, config: Config) -> Shapes:
        """See Family."""
        shapes: Shapes = {}
        sizes, hidden, classes = _sizes(config), config["hidden"], config["num_classes"]
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            shapes[f"blocks.{i}.weight"] = (outputs, inputs)
            if hidden or i < config["depth"] - 1:
                shapes[f"blocks.{i}.centre.mean"] = (outputs,)
        if not hidden:
            return {**shapes, "head.weight": (1,), "head.bias": (classes,)}
        shapes["head.inner"] = (hidden, _windows(config) * config["width"])
        shapes |= {"head.inner_bias": (hidden,), "head.outer": (classes, hidden)}
        return {**shapes, "head.outer_bias": (classes,)}

    def parts(self) -> dict[str, float]:
        """The scale of the pixels."""
        return {"pixels": self.scale}

    @property
    def bound(self) -> float:
        """See Family."""
        return self.scale

    @property
    def nominal_bound(self) -> float:
        """See Family."""
        return self.scale

    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """Steps 1 to 3."""
        state = ErrorState.of_images(norms, 0.5, program)
        state.multiply(self.scale, self.scale, kappa(2, program))
        for i in range(self.depth):
            state.translate(largest_entry(self.tensors[f"blocks.{i}.weight"]))
            terms = len(self.coefficients) if i else 1
            state.multiply(1.0, 1.0, kappa(terms + 2, program))
            if (mean := f"blocks.{i}.centre.mean") in self.tensors:
                state.translate(largest_entry(self.tensors[mean]))
        return state

    def underflow(self, program: Program) -> float:
        """Step 5."""
        layers = self.depth * (3 * len(self.coefficients) + 12)
        operations = self.head.operations + layers
        return 2 * operations * program.tiny * max(1.0, self.scale) * self.head.growth

    @property
    def floats_per_image(self) -> int:
        """See Family."""
        return _windows(self.config) * max(_sizes(self.config))

    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """See Family."""
        x = np.concatenate([*self._points((images / 255.0 - 0.5) * self.scale)], axis=1)
        x = x.reshape(-1, _sizes(self.config)[0])
        for i in range(self.depth):
            coefficients = self.coefficients if i else np.ones(1)
            x = _distances(x, self.wide(f"blocks.{i}.weight"), coefficients)
            if (mean := f"blocks.{i}.centre.mean") in self.tensors:
                x = x - self.wide(mean)
        return x.reshape(len(images), -1)

    def _points(self, x: Floats) -> Iterator[Floats]:
        """What the first layer sees of every image: all pixels, or one square after the other."""
        side, step = self.config["window"], self.config["window_stride"]
        if not side:
            yield x.reshape(len(x), -1)
            return
        for top in range(0, x.shape[2] - side + 1, step):
            for left in range(0, x.shape[3] - side + 1, step):
                yield x[:, :, top : top + side, left : left + side].reshape(len(x), -1)


class ScaledHead(Head):
    """Logits t (b_k - h_k)."""

    rule = "scaled"
    operations = 10

    def __init__(self, weight: Floats, bias: Floats) -> None:
        self.scale, self.bias = float(weight[0]), bias
        self.growth = max(1.0, abs(self.scale))
        self.factors = 2 * abs(self.scale) * (1.0 - np.eye(len(bias)))
        self.nominal_factors = self.factors

    def logits(self, features: Floats) -> tuple[Floats, Any]:
        """See Head."""
        return (self.bias - features) * self.scale, None

    def margin_error(self, state: ErrorState) -> Floats:
        """Step 4."""
        state.translate(largest_entry(self.bias))
        state.multiply(abs(self.scale), abs(self.scale), kappa(1, state.program))
        return 2 * state.e


def _sizes(config: Config) -> list[int]:
    """Inputs of every layer of distances, then the outputs of the last one."""
    channels, height, width = config["input_shape"]
    window = config["window"]
    seen = channels * window**2 if window else channels * height * width
    outputs = config["width"] if config["hidden"] else config["num_classes"]
    return [seen] + [config["width"]] * (config["depth"] - 1) + [outputs]


def _windows(config: Config) -> int:
    if not config["window"]:
        return 1
    _, *sides = config["input_shape"]
    return math.prod((side - config["window"]) // config["window_stride"] + 1 for side in sides)


def _coefficients(config: Config) -> Floats:
    """c_i = q (1 - q)^(i - 1) / (1 - (1 - q)^top), each rounded once from its exact value."""
    q, top = Fraction(config["keep"]), config["top"]
    if q == 1:
        return np.ones(1)
    total = 1 - (1 - q) ** top
    return np.array([float(q * (1 - q) ** i / total) for i in range(top)])


def _distances(x: Floats, weight: Floats, coefficients: Floats) -> Floats:
    """Sums of the largest |x_i - w_oi|, (B, n) and (O, n) to (B, O), a tile at a time."""
    outputs = np.empty((len(x), len(weight)))
    count = min(len(coefficients), x.shape[1])
    rows = max(1, _TILE // weight.size)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        for o, w in enumerate(weight):
            apart = np.abs(part - w)
            if count < x.shape[1]:
                apart = np.partition(apart, -count, axis=1)[:, -count:]
            ordered = np.sort(apart, axis=1)[:, ::-1]
            outputs[start : start + rows, o] = ordered @ coefficients[:count]
    return outputs
