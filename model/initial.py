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


_KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "haar": ORTHOGONAL.random,
    "identity": _identity,
    "zeros": _zeros,
    "normal": _normal,
}


def initial_value(kind: str, shape: Sequence[int], *, seed: int, name: str) -> Tensor:
    """Initial value of one parameter.

    Args:
        kind: `haar` (uniform on SO(n)), `identity`, `zeros`, or `normal` with variance
            1/shape[-1], whose rows have about unit length.
        shape: shape of the whole parameter.
        seed: seed of the run.
        name: qualified name of the parameter; two parameters are independent.

    Returns:
        float64 on the CPU, the same on every machine and independent of any other draw.

    Raises:
        ModelError: unknown kind.
    """
    if kind not in _KINDS:
        raise ModelError(f"initial kind {kind!r} of {name}; known: {', '.join(_KINDS)}")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    # The caller may be inside torch.device("meta") or on a GPU: values are always made on the CPU.
    with torch.device("cpu"):
        return _KINDS[kind](tuple(shape), generator)


def set_initial(parameter: nn.Parameter, kind: str) -> nn.Parameter:
    """Tag a parameter with the kind of its initial value, as `parameter.initial`."""
    parameter.initial = kind  # type: ignore[attr-defined]
    return parameter
