"""SOC / LipConvnet: docs/explanation/families.md.

J = (W - W^T) / 2 is skew-symmetric under zero padding, so exp(s J) is orthogonal for any stored s.
A layer is the truncated series sum_{i < n} (s J)^i / i!, whose norm is at most 1 + nu^n / n! with
nu = |s| upper(J): the eigenvalues of s J are i theta with |theta| <= nu, and Taylor's remainder at
i theta is at most the next term.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family, Shapes, Tensors
from model.verifier.families.soc_layers import convolutions, is_matrix
from model.verifier.mathematics.activations import ACTIVATIONS, POOLS, Pairs
from model.verifier.mathematics.convolution import convolve, space_to_depth
from model.verifier.mathematics.linear_head import LinearHead
from model.verifier.mathematics.matrix_bounds import MatrixBounds, bounds_of_matrix
from model.verifier.mathematics.mlp_head import MLPHead
from model.verifier.mathematics.rounding import (
    ROUND_UP,
    ErrorState,
    Floats,
    Program,
    kappa,
    norm_of,
)
from model.verifier.mathematics.skew import bounds_of_filter, power_over_factorial, skew
from model.verifier.network_config import SIDE, Choice, Config, Setting, Whole


class Soc(Family):
    """A first convolution, then stages that halve the image, a linear head or one hidden layer."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "depth": Whole(1, 10_000),
        "stages": Whole(1, 16, 5),
        "width": Whole(2, SIDE, 32),
        "activation": Choice(("maxmin", "householder"), "maxmin"),
        "pointwise": Choice(("series", "manifold"), "series"),
        "pooling": Choice(("max", "projection"), "max"),
        "train_terms": Whole(2, 40, 6),
        "terms": Whole(2, 40, 15),
        "head": Choice(("unit", "mlp"), "unit"),
        "hidden": Whole(1, 1 << 20, 4096),
    }
    head: "LinearHead | MLPHead"

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        super().__init__(config, tensors, matrices)
        self.layers = list(convolutions(config))
        if config["head"] == "mlp":
            names = ("inner", "inner_bias", "outer", "outer_bias")
            stored = (self.wide(f"head.{name}") for name in names)
            self.head = MLPHead(matrices["head.inner"], *stored)
        else:
            self.head = LinearHead(tensors["head.weight"], tensors["head.bias"], "unit")

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        channels, height, width = config["input_shape"]
        parts = 2 ** config["stages"]
        if config["depth"] % config["stages"] or height % parts or width % parts:
            return "depth, stages and input_shape do not fit"
        if config["width"] % 2 or config["width"] < channels:
            return "width must be even and hold the channels of the image"
        return None

    @classmethod
    def shapes(cls, config: Config) -> Shapes:
        """See Family."""
        shapes: Shapes = {}
        layers = list(convolutions(config))
        for i, layer in enumerate(layers):
            C, name = layer.channels, f"blocks.{i}.convolution"
            if is_matrix(config, layer):
                shapes |= {f"{name}.weight": (C, C), f"{name}.bias": (C,)}
            else:
                shapes |= {f"{name}.weight": (C, C, layer.side, layer.side)}
                shapes |= {f"{name}.bias": (C,), f"{name}.scale": ()}
            if config["pooling" if layer.pooled else "activation"] in ("projection", "householder"):
                shapes[f"blocks.{i}.after.angle"] = (C // 2,)
        last = layers[-1]
        features = last.channels // (2 if last.pooled else 1) * last.positions
        classes, hidden = config["num_classes"], config["hidden"]
        if config["head"] == "unit":
            return {**shapes, "head.weight": (classes, features), "head.bias": (classes,)}
        shapes |= {"head.inner": (hidden, features), "head.inner_bias": (hidden,)}
        return {**shapes, "head.outer": (classes, hidden), "head.outer_bias": (classes,)}

    @classmethod
    def bounded(cls, config: Config) -> list[str]:
        """See Family."""
        filters = [f"blocks.{i}.convolution.weight" for i, _ in enumerate(convolutions(config))]
        return filters + ["head.inner"] * (config["head"] == "mlp")

    @classmethod
    def bound_matrix(
        cls, config: Config, name: str, tensor: npt.NDArray[np.float32]
    ) -> MatrixBounds:
        """A filter, or an orthogonal matrix."""
        if tensor.ndim == 2:
            return bounds_of_matrix(tensor)
        return bounds_of_filter(tensor.astype(np.float64))

    # The constant

    def parts(self) -> dict[str, float]:
        """Norm of every truncated series, or of every matrix."""
        return {f"blocks.{i}": self._part(i) for i in range(len(self.layers))}

    def _part(self, i: int) -> float:
        if is_matrix(self.config, self.layers[i]):
            return self._matrix(i).upper
        return 1 + power_over_factorial(self._nu(i), self.config["terms"])

    def _matrix(self, i: int) -> MatrixBounds:
        return self.matrices[f"blocks.{i}.convolution.weight"]

    def _scale(self, i: int) -> float:
        return float(self.tensors[f"blocks.{i}.convolution.scale"])

    def _nu(self, i: int) -> float:
        return abs(self._scale(i)) * self._matrix(i).upper * ROUND_UP

    # Rounding

    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """See Family."""
        shift = math.sqrt(math.prod(self.config["input_shape"])) / 2
        state = ErrorState.of_images(norms, shift, program)
        for i, layer in enumerate(self.layers):
            if is_matrix(self.config, layer):
                R = self._matrix(i)
                state.multiply(R.upper, R.absolute, kappa(layer.channels, program))
            else:
                self._series(state, i)
            bias = norm_of(self.tensors[f"blocks.{i}.convolution.bias"])
            state.translate(math.sqrt(layer.positions) * bias)
            self._after(i).carry(state)
        return state

    def _series(self, state: ErrorState, i: int) -> None:
        """Horner's rule on an input of norm 1; what comes in with an error passes the series."""
        program, layer, nu = state.program, self.layers[i], self._nu(i)
        alpha = abs(self._scale(i)) * self._matrix(i).absolute
        rounding = kappa(layer.side**2 * layer.channels, program, copies=2, roundings=4)
        N, E, largest = 1.0, 0.0, 1.0
        for k in range(self.config["terms"] - 1, 0, -1):
            product = alpha * (N + E)
            E = (nu * E + rounding * product) / k
            N = 1 + nu * N / k
            E = E + program.stored * (N + E)
            largest = max(largest, product, N + E)
        part = self._part(i)
        state.see(largest * state.size)
        # Before it is scaled: a program may flush the scale to zero.
        state.see(self._matrix(i).absolute * state.size)
        state.n, state.e = part * state.n, part * state.e + E * state.size
        state.see(state.size)

    def underflow(self, program: Program) -> float:
        """See Family."""
        operations = sum(
            self.config["terms"] * layer.positions * (layer.channels * layer.side) ** 2
            for layer in self.layers
        )
        series = [i for i, layer in enumerate(self.layers) if not is_matrix(self.config, layer)]
        nu = max((self._nu(i) for i in series), default=0.0)
        growth = self.bound * math.exp(min(nu, 700.0)) * 2.0**21
        growth *= max(1.0, float(self.head.factors.max()))
        return operations * program.tiny * growth

    # The forward pass

    def _after(self, i: int) -> Pairs:
        layer = self.layers[i]
        kinds = POOLS if layer.pooled else ACTIVATIONS
        angle = f"blocks.{i}.after.angle"
        stored = self.wide(angle) if angle in self.tensors else None
        return kinds[self.config["pooling" if layer.pooled else "activation"]](stored)

    @property
    def floats_per_image(self) -> int:
        """See Family."""
        return 9 * max(layer.channels * layer.positions for layer in self.layers)

    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """See Family."""
        x = images / 255.0 - 0.5
        for i, layer in enumerate(self.layers):
            name = f"blocks.{i}.convolution"
            W, bias = self.wide(f"{name}.weight"), self.wide(f"{name}.bias")
            x = space_to_depth(x, layer.stride)
            if is_matrix(self.config, layer):
                y = convolve(x, W[:, :, None, None])
            else:
                x = np.pad(x, ((0, 0), (0, layer.channels - x.shape[1]), (0, 0), (0, 0)))
                kernel, y = skew(W) * self._scale(i), x
                for k in range(self.config["terms"] - 1, 0, -1):
                    y = x + convolve(y, kernel, padding=layer.side // 2) / k
            x = self._after(i).apply(y + bias[:, None, None])
        return x.reshape(len(x), -1)
