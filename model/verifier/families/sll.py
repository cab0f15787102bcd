"""SLL and CPL: docs/explanation/families.md.

With V V^T <= T, x - 2 V^T T^-1 relu(V x + b) is 1-Lipschitz: no norm enters the bound.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family, Shapes, Tensors
from model.verifier.mathematics.convolution import convolve, transposed
from model.verifier.mathematics.linear_head import LinearHead
from model.verifier.mathematics.matrix_bounds import MatrixBounds, schur
from model.verifier.mathematics.rounding import (
    ErrorState,
    Floats,
    Program,
    combined,
    kappa,
    norm_of,
)
from model.verifier.mathematics.scaling import EXACT, Powers, Scaling, norm_bound, powers, row_sums
from model.verifier.network_config import SIDE, Choice, Config, Setting, Whole


class Sll(Family):
    """Zero channels, residual convolutions, a pool of squares, dense residual layers, a head."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "scaling": Choice(("sll", "cpl"), "sll"),
        "channels": Whole(1, SIDE),
        "conv_layers": Whole(0, 10_000),
        "conv_inner": Whole(1, SIDE, 5),
        "pool": Whole(1, SIDE, 4),
        "dense_layers": Whole(0, 10_000),
        "dense_inner": Whole(1, SIDE, 2048),
        "head": Choice(("unit", "linear"), "unit"),
    }

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        super().__init__(config, tensors, matrices)
        self.head = LinearHead(tensors["head.weight"], tensors["head.bias"], config["head"])
        self.layers = config["conv_layers"] + config["dense_layers"]
        self.positions = math.prod(config["input_shape"][1:])
        self._powers: dict[int, Powers] = {}
        self._scalings: dict[tuple[int, str], Scaling] = {}
        self._inverses = [self._scaling(i, EXACT).inverse for i in range(self.layers)]

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        channels, height, width = config["input_shape"]
        if height % config["pool"] or width % config["pool"]:
            return "pool does not divide the image"
        if config["channels"] < channels or not config["conv_layers"] + config["dense_layers"]:
            return "channels and layers do not fit"
        return None

    @classmethod
    def shapes(cls, config: Config) -> Shapes:
        """See Family."""
        channels, inner = config["channels"], config["conv_inner"]
        features = channels * math.prod(config["input_shape"][1:]) // config["pool"] ** 2
        shapes: Shapes = {}
        for i in range(config["conv_layers"]):
            shapes |= {f"blocks.{i}.weight": (inner, channels, 3, 3), f"blocks.{i}.bias": (inner,)}
        inner = config["dense_inner"]
        for i in range(config["conv_layers"], config["conv_layers"] + config["dense_layers"]):
            shapes |= {f"blocks.{i}.weight": (inner, features), f"blocks.{i}.bias": (inner,)}
            if config["scaling"] == "sll":
                shapes[f"blocks.{i}.log_q"] = (inner,)
        classes = config["num_classes"]
        return {**shapes, "head.weight": (classes, features), "head.bias": (classes,)}

    def _scaling(self, i: int, program: Program) -> Scaling:
        if (i, program.name) not in self._scalings:
            self._scalings[i, program.name] = self._new_scaling(i, program)
        return self._scalings[i, program.name]

    def _new_scaling(self, i: int, program: Program) -> Scaling:
        if self.config["scaling"] == "cpl":
            if i not in self._powers:
                squarings = 3 if i < self.config["conv_layers"] else 6
                self._powers[i] = powers(self.filter(i), squarings)
            return norm_bound(self._powers[i], len(self.tensors[f"blocks.{i}.weight"]), program)
        name = f"blocks.{i}.log_q"
        log_q = self.wide(name) if name in self.tensors else None
        return row_sums(self.filter(i), program, log_q)

    # Rounding

    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """The exact layer is 1-Lipschitz: e passes, and only what the layer adds counts."""
        shift = math.sqrt(math.prod(self.config["input_shape"])) / 2
        state = ErrorState.of_images(norms, shift, program)
        for i in range(self.layers):
            if i == self.config["conv_layers"]:
                self._pool(state)
            self._layer(state, i)
        if not self.config["dense_layers"]:
            self._pool(state)
        return state

    def _pool(self, state: ErrorState) -> None:
        state.e = state.e + kappa(self.config["pool"] ** 2 + 1, state.program) * state.size
        state.see(state.size)

    def _layer(self, state: ErrorState, i: int) -> None:
        program, kernel, scaling = state.program, self.filter(i), self._scaling(i, state.program)
        root = np.sqrt(scaling.inverse)
        scaled = (np.abs(kernel).sum(axis=(2, 3)).T * root).T
        a = schur(scaled)
        positions = self.positions if i < self.config["conv_layers"] else 1
        beta = norm_of(root * self.wide(f"blocks.{i}.bias")) * math.sqrt(positions)
        row, column = kernel[0].size, kernel[:, 0].size
        size = a * state.size + beta
        state.see(size)
        inner = kappa(row + 1, program, copies=1, roundings=2) * size
        Z = state.size + beta + inner
        s = combined(scaling.delta, program.wide, program.stored, program.stored)
        # What is wrong before the second product passes T^-1/2 V, of norm at most 1.
        state.e = state.e + 2 * (inner + (s + kappa(column, program) * a * (1 + s)) * Z)
        state.n = state.n + 2 * beta
        state.see(a * (1 + s) * Z)
        state.round(program.stored)

    def underflow(self, program: Program) -> float:
        """See Family."""
        inverses = np.concatenate(self._inverses)
        inverses = inverses[inverses > 0]
        spread = max(1.0, float(inverses.max(initial=1.0)), float((1 / inverses).max(initial=1.0)))
        operations = sum(self.tensors[name].size for name in self.tensors) * self.positions
        growth = max(1.0, float(self.head.factors.max()))
        return operations * program.tiny * spread * growth

    # The forward pass

    @property
    def floats_per_image(self) -> int:
        """See Family."""
        inner = max(self.config["channels"], self.config["conv_inner"])
        return max(self.positions * inner, self.config["dense_inner"])

    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """See Family."""
        x = images / 255.0 - 0.5
        more = self.config["channels"] - x.shape[1]
        x = np.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
        for i in range(self.config["conv_layers"]):
            kernel, bias = self.filter(i), self.wide(f"blocks.{i}.bias")[:, None, None]
            z = np.maximum(convolve(x, kernel, padding=1) + bias, 0)
            z = self._inverses[i][:, None, None] * z
            x = x - 2 * convolve(z, transposed(kernel), padding=1)
        b, c, h, w = x.shape
        p = self.config["pool"]
        x = (x.reshape(b, c, h // p, p, w // p, p).sum(axis=(3, 5)) / p).reshape(b, -1)
        for i in range(self.config["conv_layers"], self.layers):
            V = self.wide(f"blocks.{i}.weight")
            z = np.maximum(x @ V.T + self.wide(f"blocks.{i}.bias"), 0)
            x = x - 2 * (self._inverses[i] * z) @ V
        return x
