"""Initial values: functions of (seed, name) alone, so that any owner can make its own."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.errors import ModelError
from optim.manifolds import ORTHOGONAL


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    value = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return value / math.sqrt(shape[-1])


def _identity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.eye(shape[0], shape[1], dtype=torch.float64)


def _zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def _standard_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _xavier_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    fans = (shape[0] + shape[1]) * math.prod(shape[2:])
    return _standard_normal(shape, generator) * math.sqrt(2 / fans)


def _orthonormal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    order = max(shape[:2])
    return _centred(shape, ORTHOGONAL.random((order, order), generator)[: shape[0], : shape[1]])


def _dirac(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _centred(shape, _identity(shape, generator))


def _centred(shape: tuple[int, ...], matrix: Tensor) -> Tensor:
    """A convolution (or a matrix) that applies `matrix` at every point alone."""
    points = math.prod(shape[2:])
    value = torch.zeros(*shape[:2], points, dtype=torch.float64)
    value[..., points // 2] = matrix
    return value.view(shape)


def _passing(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    value = _standard_normal(shape, generator)
    rows = torch.arange(shape[0])
    value[rows, rows % shape[1]] = -10
    return value


def _selecting(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    value = _normal(shape, generator) * (0.1 / math.sqrt(shape[1]))
    rows = torch.arange(shape[0])
    turns = -(-shape[0] // shape[1])
    order = torch.cat([torch.randperm(shape[1], generator=generator) for _ in range(turns)])
    value[rows, order[: shape[0]]] += 1
    return value


def _filter(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _standard_normal(shape, generator) / math.sqrt(shape[0])


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    value = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return (2 * value - 1) / math.sqrt(shape[-1])


def _angle(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * math.pi


def _right_angle(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.full(shape, math.pi / 2, dtype=torch.float64)


def _ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def _residual(shape: tuple[int, ...], generator: torch.Generator, side: int = 1) -> Tensor:
    value = _standard_normal(shape, generator) / (side**2 * shape[0])
    value[:, -1] = 1
    return value


def _residual_3x3(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _residual(shape, generator, side=3)


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "haar": ORTHOGONAL.random,
    "residual": _residual,
    "residual_3x3": _residual_3x3,
    "identity": _identity,
    "zeros": _zeros,
    "ones": _ones,
    "normal": _normal,
    "standard_normal": _standard_normal,
    "passing": _passing,
    "selecting": _selecting,
    "xavier_normal": _xavier_normal,
    "dirac": _dirac,
    "orthonormal": _orthonormal,
    "filter": _filter,
    "uniform": _uniform,
    "angle": _angle,
    "right_angle": _right_angle,
}
"""Makers of initial values, by kind."""


def initial_value(kind: str, shape: Sequence[int], *, seed: int, name: str) -> Tensor:
    """Initial value of one parameter.

    Args:
        kind: `haar` (uniform on SO(n)), `identity`, `zeros`, `normal` with variance 1/shape[-1],
            whose rows have about unit length, `standard_normal`, `xavier_normal` (variance 2 by
            the sum of fan-in and fan-out), and for weights (rows, columns, ...) with a kernel that
            is zero around its centre `dirac` (the identity) and `orthonormal` (a Haar corner),
            `filter` (variance 1/shape[0]), `uniform` (up to 1/sqrt(shape[-1]) on either side),
            `angle` (uniform on [0, pi]) and `right_angle`; `ones`; `residual` and `residual_3x3`
            (deviation 1 / (kernel's size * rows), but gains of 1 in the last column); for layers in
            l-infinity `passing` (standard normal, but -10 at column row mod n: |x_i + 10| is then
            the largest distance of a row to points of moderate size) and `selecting` (each row one
            input).
        shape: shape of the whole parameter.
        seed: seed of the run.
        name: qualified name of the parameter; two parameters are independent.

    Returns:
        float64 on the CPU, the same on every machine and independent of any other draw.

    Raises:
        ModelError: unknown kind.
    """
    if kind not in KINDS:
        raise ModelError(f"initial kind {kind!r} of {name}; known: {', '.join(KINDS)}")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    # The caller may be inside torch.device("meta") or on a GPU: values are always made on the CPU.
    with torch.device("cpu"):
        return KINDS[kind](tuple(shape), generator)


def set_initial(parameter: nn.Parameter, kind: str) -> nn.Parameter:
    """Tag a parameter with the kind of its initial value; see `initial_kind`."""
    parameter.initial = kind  # type: ignore[attr-defined]
    return parameter


def initial_kind(parameter: Tensor) -> str:
    """Kind of the initial value of a parameter that `set_initial` has tagged."""
    return str(parameter.initial)  # type: ignore[attr-defined]
