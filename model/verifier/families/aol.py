"""AOL: docs/explanation/families.md.

With T_jj = sum_i |(V^T V)_ij| over all offsets, V^T V <= T, so V T^-1/2 x + b is 1-Lipschitz.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family, Shapes, Tensors
from model.verifier.mathematics.convolution import convolve, space_to_depth
from model.verifier.mathematics.linear_head import Head
from model.verifier.mathematics.matrix_bounds import MatrixBounds, schur
from model.verifier.mathematics.rounding import (
    GUARD,
    ErrorState,
    Floats,
    Program,
    combined,
    kappa,
    norm_of,
)
from model.verifier.mathematics.scaling import EXACT, Scaling, row_sums
from model.verifier.network_config import SIDE, Config, Setting, Whole


class Aol(Family):
    """Patches to channels, convolutions, channel reduction, dense layers, MaxMin in between."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "patch": Whole(1, SIDE, 4),
        "channels": Whole(2, SIDE, 192),
        "conv_layers": Whole(0, 10_000, 12),
        "kept_channels": Whole(1, SIDE),
        "dense_layers": Whole(1, 10_000, 14),
    }

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        super().__init__(config, tensors, matrices)
        self.head = Coordinates(config["num_classes"])
        self.convolutions = config["conv_layers"] + 2
        self.layers = self.convolutions + config["dense_layers"]
        self.positions = math.prod(config["input_shape"][1:]) // config["patch"] ** 2
        self._scalings: dict[tuple[int, str], Scaling] = {}
        self._roots = [np.sqrt(self._scaling(i, EXACT).inverse) for i in range(self.layers)]

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        _, height, width = config["input_shape"]
        patch, channels, kept = config["patch"], config["channels"], config["kept_channels"]
        if height % patch or width % patch:
            return "patch does not divide the image"
        features = height * width // patch**2 * kept
        even = not (channels % 2 or features % 2)
        if kept > channels or not even or config["num_classes"] > features:
            return "channels, kept_channels and num_classes do not fit"
        return None

    @classmethod
    def shapes(cls, config: Config) -> Shapes:
        """See Family."""
        C, (colours, height, width) = config["channels"], config["input_shape"]
        sizes = [(C, colours * config["patch"] ** 2, 1, 1)]
        sizes += [(C, C, 3, 3)] * config["conv_layers"] + [(C, C, 1, 1)]
        F = height * width // config["patch"] ** 2 * config["kept_channels"]
        shapes: Shapes = {}
        for i, size in enumerate([*sizes, *[(F, F)] * config["dense_layers"]]):
            shapes |= {f"blocks.{i}.weight": size, f"blocks.{i}.bias": size[:1]}
        return shapes

    def _scaling(self, i: int, program: Program) -> Scaling:
        if (i, program.name) not in self._scalings:
            kernel = self.filter(i).swapaxes(0, 1)
            self._scalings[i, program.name] = row_sums(kernel, program)
        return self._scalings[i, program.name]

    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """See Family; MaxMin compares and rounds nothing."""
        shift = math.sqrt(math.prod(self.config["input_shape"])) / 2
        state = ErrorState.of_images(norms, shift, program)
        for i in range(self.layers):
            self._layer(state, i)
        return state

    def _layer(self, state: ErrorState, i: int) -> None:
        program, kernel = state.program, self.filter(i)
        scaling = self._scaling(i, program)
        a = schur(np.abs(kernel).sum(axis=(2, 3)) * np.sqrt(scaling.inverse))
        positions = self.positions if i < self.convolutions else 1
        beta = norm_of(self.tensors[f"blocks.{i}.bias"]) * math.sqrt(positions)
        # Relative error of an entry of V T^-1/2.
        wide = program.wide
        omega = combined(scaling.delta, wide, wide, wide, program.stored, program.weights)
        rounding = kappa(kernel[0].size + 1, program, copies=1, roundings=2)
        product = a * (1 + omega) * state.size + beta
        state.see(product)
        state.e = state.e + omega * a * state.size + rounding * product
        state.n = state.n + beta
        state.see(state.size)

    def underflow(self, program: Program) -> float:
        """See Family."""
        roots = np.concatenate(self._roots)
        T = 1 / np.square(roots[roots > 0])
        spread = max(1.0, float(T.max(initial=1.0)), float((1 / T).max(initial=1.0)))
        operations = sum(self.tensors[name].size for name in self.tensors) * self.positions
        return operations * program.tiny * spread * float(self.head.factors.max())

    @property
    def floats_per_image(self) -> int:
        """See Family."""
        return self.positions * max(self.config["channels"], self.tensors["blocks.0.weight"].size)

    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """See Family; all values of the last layer."""
        x = space_to_depth(images / 255.0 - 0.5, self.config["patch"])
        for i, root in enumerate(self._roots):
            bias = self.wide(f"blocks.{i}.bias")
            if i < self.convolutions:
                kernel = self.filter(i) * root[:, None, None]
                x = convolve(x, kernel, padding=kernel.shape[-1] // 2) + bias[:, None, None]
            else:
                x = x @ (self.wide(f"blocks.{i}.weight") * root).T + bias
            if i == self.convolutions - 1:
                x = x[:, : self.config["kept_channels"]].reshape(len(x), -1)
            elif i < self.layers - 1:
                pairs = x.reshape(len(x), -1, 2, *x.shape[2:])
                x = np.stack([pairs.max(axis=2), pairs.min(axis=2)], axis=2).reshape(x.shape)
        return x


class Coordinates(Head):
    """The logits are the first values of the last layer: margins move by sqrt(2)."""

    rule = "coordinates"

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.nominal_factors = math.sqrt(2) * (1 - np.eye(classes))
        self.factors = self.nominal_factors * (1 + GUARD)

    def logits(self, features: Floats) -> tuple[Floats, Any]:
        """See Head."""
        return features[:, : self.classes], None

    def margin_error(self, state: ErrorState) -> Floats:
        """See Head."""
        return float(self.factors.max()) * state.e
