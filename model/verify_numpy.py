"""Mathematics of the verifier: sections 2 to 6 of docs/certificate.md in NumPy float64.

A second implementation, written from that page alone. It shares no code with the evaluator, so an
error in one of the two shows as a disagreement. The network is LipNeXt, the heads are linear.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

U = 2.0**-53
SLACK = 1 + 2.0**-30  # sections 3 and 4
GUARD = 2.0**-50  # section 6
SMALLEST_ROW = 1e-6  # section 4


class Program(NamedTuple):
    """The arithmetic of a forward pass (table of section 5)."""

    stored: float
    """u_p, unit roundoff of stored activations."""
    accumulated: float
    """u_a, of the accumulation inside a dot product."""
    weights: float
    """u_w, of the program's copy of the weights."""
    wide: float
    """u_s, of pixels, pool and head."""
    tiny: float
    """eta, the smallest normal number."""
    limit: float
    """Activations up to this size overflow nowhere."""


PROGRAMS = {
    "float64": Program(2.0**-53, 2.0**-53, 0.0, 2.0**-53, 2.0**-1022, 2.0**500),
    "float32": Program(2.0**-24, 2.0**-24, 0.0, 2.0**-24, 2.0**-126, 2.0**60),
    "bfloat16": Program(2.0**-8, 2.0**-24, 2.0**-8, 2.0**-24, 2.0**-126, 2.0**60),
}


class MatrixBounds(NamedTuple):
    """What section 3 derives from one matrix."""

    upper: float
    lower: float
    absolute: float
    frobenius: float


class Network(NamedTuple):
    """A LipNeXt: its configuration as in artifact.json and its float32 tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, npt.NDArray[np.float32]]

    def wide(self, name: str) -> Floats:
        """A tensor in float64; the conversion is exact."""
        return self.tensors[name].astype(np.float64)


def gamma(k: int, u: float) -> float:
    """Relative error of a sum of k products (section 2)."""
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def kappa(k: int, program: Program, copies: int = 1, roundings: int = 1) -> float:
    """(1 + u_w)^a (1 + gamma(k, u_a)) (1 + u_p)^r - 1 without the cancellation (section 5)."""
    total = gamma(k, program.accumulated)
    for error in [program.weights] * copies + [program.stored] * roundings:
        total += error + total * error
    return total


# Section 3: bounds of one matrix.


def bounds_of_matrix(matrix: npt.NDArray[np.float32]) -> MatrixBounds:
    """All four numbers of one matrix."""
    A = matrix.astype(np.float64)
    magnitude = np.abs(A)
    absolute = math.sqrt(magnitude.sum(axis=0).max() * magnitude.sum(axis=1).max()) * SLACK
    return MatrixBounds(upper_bound(A), lower_bound(A), absolute, _frobenius(A) * SLACK)


def upper_bound(A: Floats) -> float:
    """A number >= ||A||, by Gram iteration with the rounding of every product accounted for."""
    largest = float(np.abs(A).max())
    if largest == 0:
        return 0.0
    exponent = 0 if 2.0**-100 <= largest <= 2.0**100 else math.frexp(largest)[1]
    A = np.ldexp(A, -exponent)
    length, order = max(A.shape), min(A.shape)
    G = _symmetric(A.T @ A if A.shape[0] >= A.shape[1] else A @ A.T)
    diagonal = G.diagonal()
    rounding = order * gamma(length, U) * float(diagonal.max()) * (1 + 2.0**-20)
    q = math.inf
    if A.shape[0] == A.shape[1] and diagonal.min() >= 0.5 and diagonal.max() <= 2:
        q = 1 + _squarings(G - np.eye(order), 3)  # this subtraction is exact
    if q > 1.1:
        q = min(q, _squarings(G, 6))
    return float(np.ldexp(math.sqrt(q + rounding) * (1 + GUARD), exponent))


def _squarings(T: Floats, count: int) -> float:
    """Q(T, m) >= ||T|| of a symmetric matrix: ||T||^2 = ||T T||, m times."""
    order = len(T)
    steps = []
    for _ in range(count):
        exponent = math.frexp(float(np.abs(T).max()))[1]  # 0 for a zero matrix
        T = np.ldexp(T, -exponent)
        steps.append((_frobenius(T), exponent))
        T = _symmetric(T @ T)
    bound = _frobenius(T)
    for norm, exponent in reversed(steps):
        bound = float(np.ldexp(math.sqrt(bound + gamma(order, U) * norm * norm), exponent))
    return bound * SLACK


def lower_bound(A: Floats) -> float:
    """A number <= ||A||: what A does to the vector of 30 power iterations."""
    v = np.cos(np.arange(1, A.shape[1] + 1, dtype=np.float64))
    v /= np.linalg.norm(v)
    for _ in range(30):
        v = A.T @ (A @ v)
        norm = np.linalg.norm(v)
        if norm == 0:
            return 0.0
        v /= norm
    return float(np.linalg.norm(A @ v) / np.linalg.norm(v)) * (1 - 2.0**-30)


def parts_of_network(depth: int, bounds: dict[str, MatrixBounds]) -> dict[str, float]:
    """Bound of the stem and of every block; their product bounds the features."""
    parts = {"stem": bounds["stem.weight"].upper}
    for i in range(depth):
        parts[f"blocks.{i}"] = bounds[f"blocks.{i}.R"].upper ** 2 * bounds[f"blocks.{i}.M"].upper
    return parts


def _symmetric(T: Floats) -> Floats:
    return np.tril(T) + np.tril(T, -1).T


def _frobenius(T: Floats) -> float:
    return math.sqrt(float(np.square(T).sum(axis=1).sum()))


# Section 4: the head.


def head_rows(network: Network) -> Floats:
    """v_k, shape (K, C): the rows as the logits use them."""
    rows = network.wide("head.weight")
    if network.config["head"] == "unit":
        rows = rows / np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return rows


def margin_factors(network: Network, rows: Floats) -> tuple[Floats, Floats]:
    """||v_i - v_j|| of all pairs, shape (K, K): as computed, and as bounds of the exact ones."""
    # One row at a time: the differences of all pairs would be K times as large as the head.
    plain = np.stack([np.sqrt(np.square(rows - row).sum(axis=1)) for row in rows])
    rho = gamma(rows.shape[1] + 4, U) if network.config["head"] == "unit" else 0.0
    bounds = (plain + 2 * rho) * SLACK
    np.fill_diagonal(bounds, 0)
    return plain, bounds


# Section 5: the error of a program's logit difference.


@np.errstate(all="ignore")  # what overflows or is not a number counts as infinite
def margin_error(
    network: Network,
    bounds: dict[str, MatrixBounds],
    largest_factor: float,
    norms: Floats,
    program: Program,
) -> Floats:
    """E(N) of images of norm at most N, shape (B,)."""
    config = network.config
    channels, height, width = config["input_shape"]
    C, tokens = config["width"], height * width // config["patch"] ** 2
    # 1. pixels, and 2. stem
    n, e = norms, gamma(3, program.wide) * norms
    n = n + math.sqrt(channels * height * width) / 2
    e = e + program.wide * (n + e)
    e = e + program.stored * (n + e)
    sizes = [n + e]
    stem = bounds["stem.weight"]
    e = _product(n, e, stem, kappa(channels * config["patch"] ** 2, program), sizes)
    n = stem.upper * n
    sizes.append(n + e)
    for i in range(config["depth"]):  # 3.
        n, e = _block_error(network, bounds, f"blocks.{i}", n, e, program, sizes)
    # 4. pool
    smoothing = C * config["pool_tau"] ** 2
    q = np.sqrt(np.square(n + e) + smoothing)
    e = e + gamma(tokens + 4, program.wide) * q
    n = np.sqrt(np.square(n) + smoothing)
    sizes.append(n + e)
    E = _head_error(network, largest_factor, n, e, program)  # 5.
    # 6. underflow and overflow
    peak = np.max(sizes, axis=0)
    operations = (8 * config["depth"] + 16) * tokens * (C + 1) ** 2
    growth = math.prod(max(1.0, x) for x in _factors(config["depth"], bounds))
    growth *= max(1.0, largest_factor)
    omega = operations * program.tiny * growth * 2 * np.maximum(1.0, peak) / config["pool_tau"]
    E = (E + omega) * (1 + 2.0**-20)  # 7.
    return np.where(np.isnan(E) | (omega > 1) | (peak > program.limit), np.inf, E)


def network_bound(depth: int, bounds: dict[str, MatrixBounds]) -> float:
    """L of section 3."""
    factors = _factors(depth, bounds)
    large = math.prod(max(1.0, x) for x in factors)
    small = math.prod(min(1.0, x) for x in factors)
    if not (large <= 2.0**500 and small >= 2.0**-500):
        return math.inf
    return math.prod(parts_of_network(depth, bounds).values()) * (1 + 2.0**-40)


def _factors(depth: int, bounds: dict[str, MatrixBounds]) -> list[float]:
    """Norm sigma of every product of the forward pass: stem, then R, R and M of every block."""
    names = [f"blocks.{i}.{matrix}" for i in range(depth) for matrix in "RRM"]
    return [bounds[name].upper for name in ["stem.weight", *names]]


def _product(
    n: Floats,
    e: Floats,
    matrix: MatrixBounds,
    rounding: float,
    sizes: list[Floats],
    beta: float = 0.0,
) -> Floats:
    """Error of a product with a matrix, and of adding a bias of norm beta (all tokens)."""
    sizes.append(matrix.absolute * (n + e) + beta)
    return matrix.upper * e + rounding * sizes[-1]


def _block_error(
    network: Network,
    bounds: dict[str, MatrixBounds],
    name: str,
    n: Floats,
    e: Floats,
    program: Program,
    sizes: list[Floats],
) -> tuple[Floats, Floats]:
    C = network.config["width"]
    _, height, width = network.config["input_shape"]
    R, M = bounds[f"{name}.R"], bounds[f"{name}.M"]
    if network.config["position"]:
        pi = math.sqrt(C) * _norm(network, f"{name}.p")
        n = n + pi
        e = e + program.weights * pi
        e = e + program.stored * (n + e)
        sizes.append(n + e)
    inner, outer = kappa(C, program), kappa(C + 1, program, roundings=2)
    e = _product(n, e, R, inner, sizes)
    n = R.upper * n
    sizes.append(n + e)
    beta = math.sqrt(height * width // network.config["patch"] ** 2) * _norm(network, f"{name}.b")
    first = _product(n, e, R, inner, sizes)
    sizes.append(R.upper * n + first)
    unfolded = _product(R.upper * n, first, M, outer, sizes, beta)
    psi = kappa(C, program, copies=2) * M.absolute * R.frobenius
    absolute = math.sqrt(C) * (M.upper * R.upper + psi)
    sizes.append(absolute * (n + e) + beta)
    folded = M.upper * R.upper * e + psi * (n + e) + outer * sizes[-1]
    n, e = M.upper * R.upper * n + beta, np.maximum(unfolded, folded)
    sizes.append(n + e)
    return n, e


def _head_error(
    network: Network, largest_factor: float, n: Floats, e: Floats, program: Program
) -> Floats:
    unit = network.config["head"] == "unit"
    weight = network.wide("head.weight")
    C = weight.shape[1]
    omega = 1.0 if unit else float(np.sqrt(np.square(weight).sum(axis=1)).max()) * SLACK
    rho = gamma(C + 4, program.wide) + 2 * program.weights if unit else program.weights
    dot = gamma(C + 1, program.wide)
    bias = float(np.abs(network.wide("head.bias")).max())
    row = 2 * omega * (rho + dot * (1 + rho)) * (n + e)
    return largest_factor * e + row + 2 * (dot * (1 + program.weights) + program.weights) * bias


def _norm(network: Network, name: str) -> float:
    return math.sqrt(float(np.square(network.wide(name)).sum())) * SLACK


# The forward pass in float64.


@np.errstate(all="ignore")
def logits(network: Network, rows: Floats, images: npt.NDArray[np.uint8]) -> Floats:
    """Logits (B, K) of images (B, channels, height, width)."""
    config = network.config
    patch = config["patch"]
    b, channels, height, width = images.shape
    x = images / 255.0 - 0.5
    x = x.reshape(b, channels, height // patch, patch, width // patch, patch)
    x = x.transpose(0, 2, 4, 1, 3, 5).reshape(b, height // patch, width // patch, -1)
    x = _apply(x, network.wide("stem.weight")[:, : x.shape[-1]])
    shifted = round(config["alpha"] * config["width"])
    folded = round(config["beta"] * config["width"])
    for i in range(config["depth"]):
        R, M = network.wide(f"blocks.{i}.R"), network.wide(f"blocks.{i}.M")
        if config["position"]:
            x = x + network.wide(f"blocks.{i}.p")
        x = _shift(_apply(x, R), shifted)
        x = _apply(_apply(x, R.T), M) + network.wide(f"blocks.{i}.b")
        x[..., :folded] = np.abs(x[..., :folded])
    features = np.sqrt(np.square(x).sum(axis=(1, 2)) + config["pool_tau"] ** 2)
    return features @ rows.T + network.wide("head.bias")


def _apply(x: Floats, matrix: Floats) -> Floats:
    """A matrix times every token of (B, h, w, C), as one product."""
    return (x.reshape(-1, x.shape[-1]) @ matrix.T).reshape(*x.shape[:-1], len(matrix))


def _shift(x: Floats, count: int) -> Floats:
    """Four groups of channels move up, down, left and right by one token, with wrap-around."""
    x = x.copy()
    for group, (step, axis) in enumerate(((-1, 1), (1, 1), (-1, 2), (1, 2))):
        channels = slice(group * count, (group + 1) * count)
        x[..., channels] = np.roll(x[..., channels], step, axis)
    return x


# Section 6: the radius of a sample.


class Radii(NamedTuple):
    """What section 6 derives from logits and a prediction, for a batch of images."""

    margins: Floats
    """g_j, shape (B, K); infinite at the prediction itself."""
    radii: Floats
    """r_j, shape (B, K), not yet cut at zero; infinite at the prediction itself."""
    error: Floats
    """E_x, shape (B,); 0 for nominal."""
    error_ball: Floats
    """E_ball, shape (B,); 0 for nominal."""


def image_norms(images: npt.NDArray[np.uint8]) -> Floats:
    """N of every image, shape (B,); the sum of squares is exact in integers."""
    flat = images.reshape(len(images), -1).astype(np.int64)
    return np.sqrt(np.square(flat).sum(axis=1).astype(np.float64)) / 255 * (1 + GUARD)


def nominal_radii(values: Floats, predictions: npt.NDArray[np.int64], factors: Floats) -> Radii:
    """g_j / ||v_c - v_j||, no error and no layer accounted for."""
    margins = _margins(values, predictions)
    radii = _without_prediction(_ratio(margins, factors[predictions]), predictions)
    return Radii(margins, radii, np.zeros(len(values)), np.zeros(len(values)))


@np.errstate(invalid="ignore")  # the infinite margin of the prediction itself
def proved_radii(
    values: Floats,
    predictions: npt.NDArray[np.int64],
    scaled_factors: Floats,
    norms: Floats,
    error: Callable[[Floats], Floats],
) -> Radii:
    """r_j of `sound` and `deployed`; `scaled_factors` are L factor(i, j), `error` is E."""
    margins = _margins(values, predictions)
    scaled = scaled_factors[predictions]
    first = _without_prediction(_ratio(margins, scaled), predictions).min(axis=1)
    first = np.where((margins > 0).all(axis=1), first, 0.0)
    at_image, in_ball = error(norms), error((norms + first) * (1 + GUARD))
    left = margins * (1 - GUARD) - at_image[:, None] - in_ball[:, None]
    radii = _ratio(left, scaled) * (1 - GUARD)
    return Radii(margins, _without_prediction(radii, predictions), at_image, in_ball)


def _margins(values: Floats, predictions: npt.NDArray[np.int64]) -> Floats:
    margins = values[np.arange(len(values)), predictions][:, None] - values
    return _without_prediction(margins, predictions)


def _without_prediction(values: Floats, predictions: npt.NDArray[np.int64]) -> Floats:
    values[np.arange(len(values)), predictions] = np.inf
    return values


@np.errstate(all="ignore")
def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """A quotient; 0 / 0 is 0, for nothing is certified then."""
    quotient = numerator / denominator
    return np.where(np.isnan(quotient), 0.0, quotient)
