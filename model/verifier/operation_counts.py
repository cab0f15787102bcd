"""What a verification costs: operations and memory, counted from a configuration alone.

Products count 2 operations for each term, factorisations and eigenvalues their textbook numbers.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from model.verifier.families.base import Shapes
from model.verifier.families.liresnet import LiResNet
from model.verifier.families.liresnet_layers import Layer, patches
from model.verifier.families.registry import FAMILIES, family_of
from model.verifier.families.soc_layers import convolutions, is_matrix
from model.verifier.mathematics.conv_bounds import STEPS, WHOLE
from model.verifier.mathematics.mlp_head import PAIRS_WORK
from model.verifier.network_config import Config

ITERATIONS = 30
"""Of the observed norm, two products each."""
PROGRAMS = 4  # arithmetics for which the scaling of a layer is derived
ELEMENTWISE = 20
"""A difference that is sorted takes about as long as so many operations of a product."""


class Work(NamedTuple):
    """One step."""

    name: str
    shape: tuple[int, ...]
    operations: float
    values: float
    """In memory at once."""
    side_by_side: bool = True
    """Whether processes share such steps; otherwise one process takes them in turn."""


class Pass(NamedTuple):
    """The forward pass of one image."""

    operations: float
    widest: int
    """Values of the largest tensor."""
    places: float
    """Positions that a weight is used at, on average."""


def bounds_work(stored: Config) -> list[Work]:
    """Every step that no image enters.

    Args:
        stored: configuration of the network, as artifact.json has it.
    """
    family, config = family_of(stored, "network")
    steps: dict[str, Callable[[Config, Shapes], Iterator[Work]]] = {
        "lipnext": _orthogonal, "sll": _scalings, "aol": _scalings, "soc": _filters,
        "liresnet": _residual, "bronet": _residual,
    }  # fmt: skip
    found = steps.get(config["kind"])  # in l-infinity nothing is bounded
    return list(found(config, family.shapes(config))) if found else []


def image_work(stored: Config) -> Pass:
    """The forward pass of one image in float64."""
    family, config = family_of(stored, "network")
    shapes = family.shapes(config)
    count = {
        "lipnext": _lipnext_pass, "soc": _soc_pass, "liresnet": _residual_pass,
        "bronet": _residual_pass, "sortnet": _sortnet_pass,
    }.get(config["kind"], _plain_pass)  # fmt: skip
    sizes = [math.prod(shape) for shape in shapes.values()]
    operations = count(config, shapes)
    return Pass(operations, max(sizes), operations / (2 * sum(sizes)))


def stored_bytes(stored: Config) -> int:
    """Of the weights."""
    family, config = family_of(stored, "network")
    return 4 * sum(math.prod(shape) for shape in family.shapes(config).values())


def gram_iteration(shape: tuple[int, ...], squarings: int) -> tuple[float, float]:
    """Operations and values of the bounds of one matrix (mathematics/matrix_bounds.py)."""
    rows, columns = shape
    order, length = min(rows, columns), max(rows, columns)
    operations = 2.0 * length * order**2 + 2.0 * squarings * order**3
    operations += 4.0 * ITERATIONS * rows * columns
    return operations, 2.5 * rows * columns + 5.5 * order**2


def _orthogonal(config: Config, shapes: Shapes) -> Iterator[Work]:
    for name, shape in shapes.items():
        if name == "stem.weight" or name.endswith((".R", ".M")):
            yield Work(name, shape, *gram_iteration(shape, 3))


def _filters(config: Config, shapes: Shapes) -> Iterator[Work]:
    for i, layer in enumerate(convolutions(config)):
        name = f"blocks.{i}.convolution.weight"
        if is_matrix(config, layer):
            yield Work(name, shapes[name], *gram_iteration(shapes[name], 3))
            continue
        C, k = layer.channels, layer.side
        wide, tall = gram_iteration((C, C * k * k), 6), gram_iteration((C * k, C * k), 6)
        tall_operations = tall[0] - 4.0 * ITERATIONS * (C * k) ** 2  # observed in one shape alone
        yield Work(name, shapes[name], wide[0] + tall_operations, max(wide[1], tall[1]))
    if config["head"] == "mlp":
        shape, classes = shapes["head.inner"], config["num_classes"]
        yield Work("head.inner", shape, *gram_iteration(shape, 6))
        half = (-(-shape[0] // 2), shape[1])  # rows with a positive weight
        one, values = gram_iteration(half, 6)
        one -= 4.0 * ITERATIONS * math.prod(half)
        pairs = 2.0 * classes**2 * math.prod(shape) * min(shape) <= PAIRS_WORK
        count = 2 * classes + classes**2 * pairs
        yield Work("curvature of the head", shape, count * one, values, side_by_side=False)


def _scalings(config: Config, shapes: Shapes) -> Iterator[Work]:
    for name, shape in shapes.items():
        if not name.startswith("blocks.") or not name.endswith(".weight"):
            continue
        rows, columns = shape[:2] if config["kind"] == "sll" else shape[1::-1]
        side = shape[2] if len(shape) > 2 else 1
        powers = config.get("scaling") == "cpl"
        operations = _gram(rows, columns, side) * (1 if powers else PROGRAMS)
        side = 2 * side - 1
        for _ in range((3 if len(shape) > 2 else 6) * powers):
            operations += _gram(rows, rows, side)
            side = 2 * side - 1
        values = 2.0 * math.prod(shape) + 3.0 * (rows * side) ** 2
        yield Work(name, shape, operations, values, side_by_side=False)


def _gram(rows: int, columns: int, side: int) -> float:
    """V V^T on the infinite grid: a product for every offset."""
    return 2.0 * (2 * side - 1) ** 2 * rows**2 * columns * side**2


def _family(config: Config) -> type[LiResNet]:
    return cast(type[LiResNet], FAMILIES[config["kind"]])


def _residual(config: Config, shapes: Shapes) -> Iterator[Work]:
    for name, layer in _family(config).plan(config).items():
        free = layer.kind in ("stem", "linear")
        operations, values = _free(config, layer) if free else _rows(config, layer)
        yield Work(f"{name}.weight", layer.shape, operations, values, side_by_side=free)


def _geometry(config: Config, layer: Layer) -> tuple[int, int, int, int]:
    """Input channels, side, stride and pixels of the input of a free convolution."""
    if layer.kind == "stem":
        channels, height, width = config["input_shape"]
        return channels, config["stem_kernel"], config["stem_stride"], height * width
    return layer.outputs, 3, 1, math.prod(layer.grid)


def _free(config: Config, layer: Layer) -> tuple[float, float]:
    channels, side, stride, pixels = _geometry(config, layer)
    taps, folded = -(-side // stride), channels * stride**2
    height, width = (n + taps - 1 if taps > 1 else 1 for n in layer.grid)
    order, length = min(layer.outputs, folded), max(layer.outputs, folded)
    # Complex products are four of real ones.
    each = 8.0 * (order * length * (taps**2 + order) + order**3) + 20 / 3 * order**3
    operations = height * (width // 2 + 1) * each
    positions = math.prod(layer.grid)
    convolution = 2.0 * positions * layer.outputs * channels * side**2
    operations += 2 * STEPS * convolution
    inputs, outputs = channels * pixels, layer.outputs * positions
    values = 12.0 * min(2**24, height * width * order * length)
    if min(inputs, outputs) <= WHOLE:
        order, length = min(inputs, outputs), max(inputs, outputs)
        operations += inputs * convolution + 2.0 * length * order**2 + 11 / 3 * order**3
        values = max(values, 2.0 * inputs * outputs + 6.0 * order**2)
    return operations, values


def _rows(config: Config, layer: Layer) -> tuple[float, float]:
    """Gram matrices, factors, eigenvalues, residuals and the substitution."""
    count, weight, (m, k) = 1, 1, layer.shape
    if layer.kind == "wave":
        more = 0 if config["grow"] else 2
        height, width = (n + more for n in layer.grid)
        count, weight, m, k = height * (width // 2 + 1), 4, config["rank"], layer.outputs
    elif layer.depth:
        k -= 1
        m, k = (k, m) if layer.kind == "reflection" else (m, k)
    operations = weight * count * (8.0 * m * m * k + 20 / 3 * m**3)
    return operations, (2 if weight > 1 else 1) * count * (4.0 * m * k + 5.0 * m * m)


def _residual_pass(config: Config, shapes: Shapes) -> float:
    total = 2.0 * math.prod(shapes["head.weight"])
    grid = patches(config, _family(config).last_grid(config))
    for name, layer in _family(config).plan(config).items():
        positions = math.prod(layer.grid)
        if layer.kind in ("stem", "linear"):
            channels, side, _, _ = _geometry(config, layer)
            total += 2.0 * positions * layer.outputs * channels * side**2
        elif layer.kind == "wave":
            height, width = (n + (0 if config["grow"] else 2) for n in layer.grid)
            waves = width // 2 + 1
            transform = 8.0 * layer.outputs * height * waves * (height + width)
            reflection = 16.0 * height * waves * layer.outputs * config["rank"]
            total += 2 * transform + reflection
        else:
            places = math.prod(grid) if name.startswith("neck.0") else 1
            passes = 2 if layer.kind == "reflection" else 1
            total += 2.0 * passes * places * math.prod(layer.shape)
    return total


def _lipnext_pass(config: Config, shapes: Shapes) -> float:
    C, patch, depth = config["width"], config["patch"], config["depth"]
    tokens = math.prod(config["input_shape"][1:]) // patch**2
    values = config["input_shape"][0] * patch**2
    return 2.0 * (tokens * C * (values + 3 * depth * C) + math.prod(shapes["head.weight"]))


def _soc_pass(config: Config, shapes: Shapes) -> float:
    total = 0.0
    for layer in convolutions(config):
        times = 1 if is_matrix(config, layer) else config["terms"] - 1
        total += 2.0 * times * layer.positions * (layer.channels * layer.side) ** 2
    heads = sum(math.prod(shapes[n]) for n in shapes if n in ("head.weight", "head.inner"))
    gradients = config["num_classes"] if config["head"] == "mlp" else 0
    return total + 2.0 * heads * (1 + gradients)


def _sortnet_pass(config: Config, shapes: Shapes) -> float:
    window, step = config["window"], config["window_stride"]
    sides = config["input_shape"][1:]
    places = math.prod((n - window) // step + 1 for n in sides) if window else 1
    total = 0.0
    for name, shape in shapes.items():
        of_head = name.startswith("head.")
        total += math.prod(shape) * (2 if of_head else ELEMENTWISE * places * (len(shape) > 1))
    return total


def _plain_pass(config: Config, shapes: Shapes) -> float:
    """Each weight once per position, twice in residual layers of SLL and CPL."""
    times = 2 if config["kind"] == "sll" else 1
    pixels = math.prod(config["input_shape"][1:]) // config.get("patch", 1) ** 2
    total = 0.0
    for name, shape in shapes.items():
        of_block = name.startswith("blocks.") and name.endswith("weight")
        places = pixels if len(shape) == 4 else 1
        total += 2.0 * math.prod(shape) * (times if of_block else 1) * places * (len(shape) > 1)
    return total
