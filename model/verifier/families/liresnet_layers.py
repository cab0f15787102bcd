"""What LiResNet and BRONet consist of: layers, grids and the kernels of free convolutions."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from model.verifier.mathematics.conv_bounds import absolute_bound, norm_bound, observed_norm
from model.verifier.mathematics.matrix_bounds import MatrixBounds
from model.verifier.mathematics.orthogonal_layers import CHOLESKY, scaled_rows
from model.verifier.mathematics.rounding import Floats, norm_of
from model.verifier.network_config import Config

OBSERVED_SHARE = 0.99
"""Of an observed norm: a stored estimate may be as far below it."""


class Layer(NamedTuple):
    """One layer with a weight."""

    kind: str
    """`stem`, `linear`, `wave`, `rows` or `reflection`."""
    shape: tuple[int, ...]
    """Of the stored weight."""
    outputs: int
    depth: int = 0
    """Of a residual parameter (V | gain); 0: the matrix itself is stored."""
    share: float = CHOLESKY
    bias: bool = True
    grid: tuple[int, int] = (1, 1)
    """Height and width of the output."""


def stem_grid(config: Config) -> tuple[int, int]:
    """Height and width after the stem."""
    side, step, zeros = config["stem_kernel"], config["stem_stride"], config["stem_padding"]
    height, width = ((n + 2 * zeros - side) // step + 1 for n in config["input_shape"][1:])
    return height, width


def patches(config: Config, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the grid of the neck's patches."""
    return grid[0] // config["neck_patch"], grid[1] // config["neck_patch"]


def linear_block(config: Config, depth: int) -> Layer:
    """X + centre(R x) + b with a 3 x 3 kernel R."""
    width = config["width"]
    return Layer("linear", (width, 9 * width + 1), width, depth, grid=stem_grid(config))


def misfit(config: Config, grid: tuple[int, int]) -> str | None:
    """What cannot be built; `grid` is what the neck sees."""
    if config["width"] % 2 or config["dense_width"] % 2:
        return "width and dense_width must be even"
    if min(stem_grid(config)) < 1:
        return "stem_kernel is larger than the image"
    patch = config["neck_patch"]
    if grid[0] % patch or grid[1] % patch:
        return "neck_patch does not divide the grid"
    if config["width"] * math.prod(patches(config, grid)) < config["dense_width"]:
        return "dense_width is larger than what the neck sees"
    return None


def stored_shapes(plan: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of all layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in plan.items():
        shapes[f"{name}.weight"] = layer.shape
        if layer.bias:
            shapes[f"{name}.bias"] = (layer.outputs,)
        if layer.kind in ("stem", "linear"):
            shapes[f"{name}.norm"] = ()
        if layer.kind in ("linear", "wave"):
            shapes[f"{name}.centre.mean"] = (layer.outputs,)
    return shapes


def free_kernel(config: Config, layer: Layer, weight: Floats) -> tuple[Floats, Floats, int, int]:
    """Kernel, sizes of the terms of its entries, stride and padding."""
    if layer.kind == "stem":
        side = config["stem_kernel"]
        kernel = weight.reshape(layer.outputs, -1, side, side)
        return kernel, np.abs(kernel), config["stem_stride"], config["stem_padding"]
    R = scaled_rows(weight, layer.depth).reshape(layer.outputs, layer.outputs, 3, 3)
    one = np.zeros_like(R)
    one[:, :, 1, 1] = np.eye(layer.outputs)
    return one + R, one + np.abs(R), 1, 1


def no_norm(config: Config, layer: Layer, weight: Floats, stored: float) -> str | None:
    """Why a stored number cannot be the estimated norm of a free convolution."""
    kernel, _, stride, padding = free_kernel(config, layer, weight)
    seen = observed_norm(kernel, _free_shape(config, layer), stride, padding)
    if stored >= OBSERVED_SHARE * seen:
        return None
    return f"{stored:.6g}, where a norm of {seen:.6g} is observed"


def _free_shape(config: Config, layer: Layer) -> tuple[int, int]:
    """Height and width of what a free convolution sees."""
    height, width = config["input_shape"][1:] if layer.kind == "stem" else stem_grid(config)
    return height, width


def free_bounds(config: Config, layer: Layer, weight: Floats) -> MatrixBounds:
    """The certificate's numbers of a free convolution."""
    kernel, sizes, stride, padding = free_kernel(config, layer, weight)
    upper = norm_bound(kernel, sizes, _free_shape(config, layer), stride, padding)
    return MatrixBounds(upper, 0.0, absolute_bound(sizes, stride), norm_of(sizes))
