"""LipNeXt: sections 3 to 5 of docs/explanation/certificate.md."""

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family, Shapes, Tensors
from model.verifier.mathematics.linear_head import LinearHead
from model.verifier.mathematics.matrix_bounds import MatrixBounds
from model.verifier.mathematics.rounding import ErrorState, Floats, Program, gamma, kappa, norm_of
from model.verifier.network_config import SIDE, Choice, Config, Flag, Number, Setting, Whole


class LipNeXt(Family):
    """Patches to channels, blocks beta-Abs(M R^T shift(R (x + p)) + b), a pool, a head."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "patch": Whole(1, 1 << 12),
        "width": Whole(1, SIDE),
        "depth": Whole(1, 10_000),
        "alpha": Number(0.0, 0.25, 1 / 16),
        "beta": Number(0.0, 1.0, 0.5),
        "position": Flag(True),
        "shift": Choice(("unit", "doubling"), "unit"),
        "pool": Choice(("l2", "grid", "flat"), "l2"),
        "pool_windows": Whole(1, SIDE, 1),
        "pool_tau": Number(1e-18, 1.0, 1e-6),
        "head": Choice(("unit", "linear"), "unit"),
        # These two do not change the function.
        "initial": Choice(("haar", "identity_m"), "haar"),
        "fold": Choice(("auto", "always", "never"), "auto"),
    }

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        super().__init__(config, tensors, matrices)
        self.head = LinearHead(tensors["head.weight"], tensors["head.bias"], config["head"])
        # Pixels of one patch, and tokens.
        self.values = config["input_shape"][0] * config["patch"] ** 2
        self.tokens = math.prod(_grid(config))
        named = [f"blocks.{i}.{kind}" for i in range(config["depth"]) for kind in "bp"]
        self._norms = {name: norm_of(tensors[name]) for name in named if name in tensors}

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """See Family."""
        shape, patch, width = config["input_shape"], config["patch"], config["width"]
        divides = not (shape[1] % patch or shape[2] % patch)
        if not divides or shape[0] * patch**2 > width or 4 * _shifted(config) > width:
            return "patch, width, alpha and input_shape do not fit"
        windows = config["pool_windows"]
        if any(side % windows for side in _grid(config)):
            return "pool_windows does not divide the grid"
        if windows > 1 and config["pool"] != "grid":
            return "pool_windows belongs to pool=grid"
        return None

    @classmethod
    def shapes(cls, config: Config) -> Shapes:
        """See Family."""
        C, classes, grid = config["width"], config["num_classes"], (*_grid(config), 1)
        shapes: Shapes = {"stem.weight": (C, C)}
        for i in range(config["depth"]):
            shapes |= {f"blocks.{i}.R": (C, C), f"blocks.{i}.M": (C, C), f"blocks.{i}.b": (C,)}
            if config["position"]:
                shapes[f"blocks.{i}.p"] = grid
        flat = config["pool"] == "flat"
        features = C * (math.prod(_grid(config)) if flat else config["pool_windows"] ** 2)
        return {**shapes, "head.weight": (classes, features), "head.bias": (classes,)}

    @classmethod
    def bounded(cls, config: Config) -> list[str]:
        """See Family."""
        blocks = [f"blocks.{i}.{matrix}" for i in range(config["depth"]) for matrix in "RM"]
        return ["stem.weight", *blocks]

    # Section 3: the constant of the features

    def parts(self) -> dict[str, float]:
        """Bound of the stem and of every block."""
        parts = {"stem": self.matrices["stem.weight"].upper}
        for i in range(self.config["depth"]):
            R, M = self._pair(i)
            parts[f"blocks.{i}"] = R.upper**2 * M.upper
        return parts

    @property
    def bound(self) -> float:
        """The product of the parts, where it does not pass through subnormal numbers."""
        large = math.prod(max(1.0, x) for x in self._factors())
        small = math.prod(min(1.0, x) for x in self._factors())
        if not (large <= 2.0**500 and small >= 2.0**-500):
            return math.inf
        return math.prod(self.parts().values()) * (1 + 2.0**-40)

    def _factors(self) -> list[float]:
        """Norm sigma of every product of the forward pass: stem, then R, R and M of every block."""
        pairs = [self._pair(i) for i in range(self.config["depth"])]
        blocks = [bounds.upper for R, M in pairs for bounds in (R, R, M)]
        return [self.matrices["stem.weight"].upper, *blocks]

    def _pair(self, i: int) -> tuple[MatrixBounds, MatrixBounds]:
        return self.matrices[f"blocks.{i}.R"], self.matrices[f"blocks.{i}.M"]

    # Section 5: rounding

    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """Steps 1 to 4."""
        config = self.config
        shift = math.sqrt(math.prod(config["input_shape"])) / 2
        state = ErrorState.of_images(norms, shift, program)
        stem = self.matrices["stem.weight"]
        state.multiply(stem.upper, stem.absolute, kappa(self.values, program))
        for i in range(config["depth"]):
            self._block(state, i)
        if config["pool"] == "flat":
            return state  # the values as they are
        windows = config["pool_windows"] ** 2
        smoothing = windows * config["width"] * config["pool_tau"] ** 2
        pooled = np.sqrt(np.square(state.size) + smoothing)
        state.e = state.e + gamma(self.tokens // windows + 4, program.wide) * pooled
        state.n = np.sqrt(np.square(state.n) + smoothing)
        state.see(state.size)
        return state

    def _block(self, state: ErrorState, i: int) -> None:
        program, C = state.program, self.config["width"]
        R, M = self._pair(i)
        if self.config["position"]:
            state.translate(math.sqrt(C) * self._norms[f"blocks.{i}.p"])
        inner, outer = kappa(C, program), kappa(C + 1, program, roundings=2)
        state.multiply(R.upper, R.absolute, inner)
        beta = math.sqrt(self.tokens) * self._norms[f"blocks.{i}.b"]
        n, e = state.n, state.e
        # Unfolded: first R^T, then M.
        state.multiply(R.upper, R.absolute, inner)
        state.multiply(M.upper, M.absolute, outer, beta)
        # Folded: the product M R^T is computed first.
        psi = kappa(C, program, copies=2) * M.absolute * R.frobenius
        absolute = math.sqrt(C) * (M.upper * R.upper + psi)
        product = absolute * (n + e) + beta
        state.see(product)
        folded = M.upper * R.upper * e + psi * (n + e) + outer * product
        state.n, state.e = M.upper * R.upper * n + beta, np.fmax(state.e, folded)
        state.see(state.size)

    def underflow(self, program: Program) -> float:
        """Step 6: operations, each of them flushed, times what follows."""
        C, depth = self.config["width"], self.config["depth"]
        operations = (8 * depth + 16) * self.tokens * (C + 1) ** 2
        growth = math.prod(max(1.0, x) for x in self._factors())
        growth *= max(1.0, float(self.head.factors.max()))
        return operations * program.tiny * growth * 2 / self.config["pool_tau"]

    # The forward pass

    @property
    def floats_per_image(self) -> int:
        """See Family."""
        return self.tokens * self.config["width"]

    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """See Family."""
        config = self.config
        patch = config["patch"]
        b, channels, height, width = images.shape
        x = images / 255.0 - 0.5
        x = x.reshape(b, channels, height // patch, patch, width // patch, patch)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(b, height // patch, width // patch, -1)
        x = _apply(x, self.wide("stem.weight")[:, : x.shape[-1]])
        shifted, distances = _shifted(config), _distances(config)
        folded = round(config["beta"] * config["width"])
        for i in range(config["depth"]):
            R, M = self.wide(f"blocks.{i}.R"), self.wide(f"blocks.{i}.M")
            if config["position"]:
                x = x + self.wide(f"blocks.{i}.p")
            x = _shift(_apply(x, R), shifted, distances[i])
            x = _apply(_apply(x, R.T), M) + self.wide(f"blocks.{i}.b")
            x[..., :folded] = np.abs(x[..., :folded])
        if config["pool"] == "flat":
            return x.reshape(b, -1)
        rows, columns = np.split(x, config["pool_windows"], axis=1), config["pool_windows"]
        windows = [window for row in rows for window in np.split(row, columns, axis=2)]
        squares = [np.square(window).sum(axis=(1, 2)) for window in windows]
        return np.sqrt(np.concatenate(squares, axis=1) + config["pool_tau"] ** 2)


def _grid(config: Config) -> tuple[int, int]:
    """Height and width of the grid of tokens."""
    return config["input_shape"][1] // config["patch"], config["input_shape"][2] // config["patch"]


def _distances(config: Config) -> list[int]:
    """By how many tokens each block shifts."""
    powers = [1]
    if config["shift"] == "doubling":
        while 4 * powers[-1] <= min(_grid(config)):
            powers.append(2 * powers[-1])
    return [powers[i % len(powers)] for i in range(config["depth"])]


def _shifted(config: Config) -> int:
    """Channels shifted in each direction."""
    return round(config["alpha"] * config["width"])


def _apply(x: Floats, matrix: Floats) -> Floats:
    """A matrix times every token of (B, h, w, C), as one product."""
    return (x.reshape(-1, x.shape[-1]) @ matrix.T).reshape(*x.shape[:-1], len(matrix))


def _shift(x: Floats, count: int, distance: int) -> Floats:
    """Four groups of channels move up, down, left and right, with wrap-around."""
    x = x.copy()
    for group, (step, axis) in enumerate(((-1, 1), (1, 1), (-1, 2), (1, 2))):
        channels = slice(group * count, (group + 1) * count)
        x[..., channels] = np.roll(x[..., channels], step * distance, axis)
    return x
