"""GroupSort and MaxMin networks in l-infinity: docs/explanation/families.md.

Rows v = w / max(1, ||w||_1) have an l1 norm of at most 1, so what a row gives moves by no more than
the largest entry of its input; sorting moves nothing further. The constant is 1 for any weights.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family, Shapes, Tensors
from model.verifier.mathematics.linear_head import Head
from model.verifier.mathematics.matrix_bounds import MatrixBounds
from model.verifier.mathematics.rounding import (
    ROUND_UP,
    ErrorState,
    Floats,
    Program,
    U,
    gamma,
    kappa,
    largest_entry,
)
from model.verifier.network_config import SIDE, Config, Setting, Whole


class GroupSort(Family):
    """Layers with bounded rows, and sorting within groups of channels between them."""

    norm: ClassVar[Literal["l2", "linf"]] = "linf"
    settings: ClassVar[Mapping[str, Setting]] = {
        "width": Whole(1, SIDE),
        "depth": Whole(2, 10_000),
        "sorted_channels": Whole(2, SIDE, 2),
    }

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        super().__init__(config, tensors, matrices)
        self.head = RowHead(self.wide("head.weight"), self.wide("head.bias"))

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        if config["width"] % config["sorted_channels"]:
            return "sorted_channels does not divide width"
        return None

    @classmethod
    def shapes(cls, config: Config) -> Shapes:
        """See Family."""
        shapes: Shapes = {}
        inputs = math.prod(config["input_shape"])
        for i in range(config["depth"] - 1):
            shapes[f"blocks.{i}.weight"] = (config["width"], inputs)
            shapes[f"blocks.{i}.bias"] = (config["width"],)
            inputs = config["width"]
        classes = config["num_classes"]
        return {**shapes, "head.weight": (classes, inputs), "head.bias": (classes,)}

    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """Every layer is 1-Lipschitz: what comes in passes, and its own rounding is added."""
        state = ErrorState.of_images(norms, 0.5, program)
        for i in range(self.config["depth"] - 1):
            inputs = self.tensors[f"blocks.{i}.weight"].shape[1]
            beta = largest_entry(self.tensors[f"blocks.{i}.bias"])
            state.multiply(1.0, 1.0, row_rounding(inputs, program), beta)
            state.see(state.n * 0 + largest_l1(self.wide(f"blocks.{i}.weight")))
        return state

    def underflow(self, program: Program) -> float:
        """See Family."""
        config = self.config
        return 2 * (8 + config["depth"] * (4 * config["width"] + 8)) * program.tiny

    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """See Family."""
        x = images.reshape(len(images), -1) / 255.0 - 0.5
        for i in range(self.config["depth"] - 1):
            rows = bounded_rows(self.wide(f"blocks.{i}.weight"))
            x = x @ rows.T + self.wide(f"blocks.{i}.bias")
            x = np.sort(x.reshape(len(x), -1, self.config["sorted_channels"])).reshape(x.shape)
        return x


class RowHead(Head):
    """Logits V h + b with rows of l1 norm at most 1; margins move by ||v_i - v_j||_1."""

    rule = "l1_rows"

    def __init__(self, weight: Floats, bias: Floats) -> None:
        self.rows, self.bias, self.largest = bounded_rows(weight), bias, largest_l1(weight)
        n = weight.shape[1]
        self.nominal_factors = np.stack([np.abs(self.rows - v).sum(axis=1) for v in self.rows])
        # n roundings of a row's norm, which divides, and two of the quotient, in both rows.
        wrong = 2 * gamma(2 * n + 2, U) + 2 * gamma(n + 1, U)
        self.factors = (self.nominal_factors + wrong) * ROUND_UP
        np.fill_diagonal(self.factors, 0)

    def logits(self, features: Floats) -> tuple[Floats, Any]:
        """See Head."""
        return features @ self.rows.T + self.bias, None

    def margin_error(self, state: ErrorState) -> Floats:
        """See Head."""
        own = row_rounding(self.rows.shape[1], state.program)
        product = state.size + largest_entry(self.bias)
        state.see(product)
        state.see(state.n * 0 + self.largest)
        return float(self.factors.max()) * state.e + 2 * own * product


def row_rounding(inputs: int, program: Program) -> float:
    """Relative error of a row, its product, its bias and the storage of the result."""
    return kappa(3 * inputs + 3, program, copies=3, roundings=3)


def largest_l1(weight: Floats) -> float:
    """Largest ||w||_1: a row for which it overflows is divided by infinity and becomes 0."""
    return float(np.abs(weight).sum(axis=1).max()) * ROUND_UP


def bounded_rows(weight: Floats) -> Floats:
    """Rows w / max(1, ||w||_1)."""
    return weight / np.maximum(1.0, np.abs(weight).sum(axis=1, keepdims=True))
