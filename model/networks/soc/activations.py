"""Activations and pooling on pairs of channels (arXiv 2108.04062, 2211.08453).

Channel i of the first half is paired with channel i of the second half. Each map is 1-Lipschitz in
l2 on every pair, for any angle, hence as a whole.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.certification.rounding import SLACK, ErrorState, gamma
from model.networks.init import set_initial
from model.networks.tensor_ops import at_least_float32

ELEMENTARY = 8
"""Roundings that one elementary function (sin, exp, log1p, hypot ...) may cost: 4 ulp."""


class MaxMin(nn.Module):
    """(max, min) of every pair."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W) to the same shape; C is even."""
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)

    def carry(self, state: ErrorState) -> None:
        """Comparisons are exact, and the map is 1-Lipschitz and keeps 0."""


class MaxPool(nn.Module):
    """max of every pair; halves the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W) to (B, C / 2, H, W)."""
        return torch.maximum(*x.chunk(2, 1))

    def carry(self, state: ErrorState) -> None:
        """See MaxMin."""


class _Angled(nn.Module):
    """One learned angle per pair."""

    def __init__(self, channels: int, initial: str) -> None:
        super().__init__()
        self.angle = set_initial(nn.Parameter(torch.empty(channels // 2)), initial)

    def _half(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of half the angle, shape (C / 2, 1, 1), in the type of x."""
        half = self._angle(at_least_float32(self.angle))[:, None, None] / 2
        return half.cos().to(x.dtype), half.sin().to(x.dtype)

    def _angle(self, angle: Tensor) -> Tensor:
        return angle

    def _direction_error(self, state: ErrorState) -> float:
        """Bound of the error of the unit vector that half the angle gives; at most 1 or infinite.

        A copy of the angle is off by u_w |angle|, sine and cosine by some roundings, and once more
        when they are stored.
        """
        program = state.program
        largest = float(self._angle(self.angle.detach().double()).abs().max()) * SLACK
        # The limit pi of an angle is no floating-point number, and the result is stored.
        rounding = gamma(ELEMENTARY + 2, program.activation)
        error = math.sqrt(2) * (program.weight * largest + rounding) * SLACK
        return error if error <= 1 else math.inf

    def _round(self, state: ErrorState, relative: float) -> None:
        state.error = state.error + relative * state.computed
        state.note(4 * state.computed)


class Householder(_Angled):
    """v - 2 relu(<v, n>) n on every pair, with the unit vector n = (sin a/2, -cos a/2).

    A pair on one side of a line is reflected to the other side. a = pi/2 is (min, max).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, "right_angle")

    def forward(self, x: Tensor) -> Tensor:
        """See MaxMin."""
        a, b = x.chunk(2, 1)
        cosine, sine = self._half(x)
        twice = 2 * (a * sine - b * cosine).relu()
        return torch.cat([a - twice * sine, b + twice * cosine], 1)

    def carry(self, state: ErrorState) -> None:
        """The normal is off by `direction`; products and differences round five times."""
        direction = self._direction_error(state)
        rounding = gamma(8, state.program.activation)
        self._round(state, 4 * (direction + rounding) * (1 + direction))


class ProjectionPool(_Angled):
    """Signed distance of every pair to a cone around the first axis; halves the channels.

    The cone has the half-angle a/2, a in [0, pi]: it is convex, and the distance 1-Lipschitz.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, "angle")

    def _angle(self, angle: Tensor) -> Tensor:
        return angle.clamp(0, math.pi)

    def forward(self, x: Tensor) -> Tensor:
        """See MaxPool."""
        a, b = x.chunk(2, 1)
        b = b.abs()
        cosine, sine = self._half(x)
        beyond = a * cosine + b * sine < 0  # the apex is the nearest point of the cone
        # The derivative of hypot at 0 is not finite: where it is not used, it is not evaluated.
        apex = torch.hypot(torch.where(beyond, a, 1.0), torch.where(beyond, b, 0.0))
        return torch.where(beyond, apex, b * cosine - a * sine)

    def carry(self, state: ErrorState) -> None:
        """A wrong side of the switch costs no more than the error of what decides it."""
        direction = self._direction_error(state)
        rounding = gamma(ELEMENTARY, state.program.activation)
        self._round(state, 2 * (direction + rounding * (1 + direction)))


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "maxmin": MaxMin,
    "householder": Householder,
}
POOLS: dict[str, Callable[[int], nn.Module]] = {"max": MaxPool, "projection": ProjectionPool}
