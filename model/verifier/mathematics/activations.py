"""Activations and pools of pairs (a, b) of channels, the two halves of all.

docs/explanation/families.md has them. All are 1-Lipschitz for any angle.
"""

import math
from abc import ABC, abstractmethod

import numpy as np

from model.verifier.mathematics.rounding import ErrorState, Floats, gamma


class Pairs(ABC):
    """What follows a convolution."""

    largest_angle = math.inf

    def __init__(self, angle: Floats | None) -> None:
        self.angle = np.zeros(1) if angle is None else angle

    @abstractmethod
    def apply(self, x: Floats) -> Floats:
        """(B, C, H, W) to (B, C or C / 2, H, W)."""

    def carry(self, state: ErrorState) -> None:
        """Rounding; a comparison has none."""
        state.see(state.size)

    def half(self, angle: Floats) -> tuple[Floats, Floats]:
        """Cosine and sine of half the angle."""
        half = angle[:, None, None] / 2
        return np.cos(half), np.sin(half)

    def direction_error(self, state: ErrorState) -> float:
        """Error of the computed unit vector (sin t/2, -cos t/2)."""
        program, largest = state.program, float(np.abs(self.angle).max())
        largest = min(largest, self.largest_angle)
        return math.sqrt(2) * (program.weights * largest + gamma(10, program.stored))


class MaxMin(Pairs):
    """Maximum and minimum."""

    def apply(self, x: Floats) -> Floats:
        """See Pairs."""
        a, b = np.split(x, 2, axis=1)
        return np.concatenate([np.maximum(a, b), np.minimum(a, b)], axis=1)


class MaxPool(Pairs):
    """Maximum."""

    def apply(self, x: Floats) -> Floats:
        """See Pairs."""
        a, b = np.split(x, 2, axis=1)
        return np.maximum(a, b)


class Householder(Pairs):
    """v - 2 relu(<v, n>) n with n = (sin t/2, -cos t/2): continuous, no branch is decided."""

    def apply(self, x: Floats) -> Floats:
        """See Pairs."""
        a, b = np.split(x, 2, axis=1)
        cosine, sine = self.half(self.angle)
        twice = 2 * np.maximum(a * sine - b * cosine, 0)
        return np.concatenate([a - twice * sine, b + twice * cosine], axis=1)

    def carry(self, state: ErrorState) -> None:
        """See Pairs."""
        wrong = self.direction_error(state)
        state.round(4 * (wrong + gamma(8, state.program.stored)) * (1 + wrong))


class ProjectionPool(Pairs):
    """Signed distance to a cone: |b| cos - a sin where a cos + |b| sin >= 0, else hypot(a, b)."""

    largest_angle = math.pi  # beyond it the angle and its copy are cut to the same number

    def apply(self, x: Floats) -> Floats:
        """See Pairs."""
        a, b = np.split(x, 2, axis=1)
        b = np.abs(b)
        cosine, sine = self.half(np.clip(self.angle, 0, math.pi))
        beyond = a * cosine + b * sine < 0
        return np.where(beyond, np.hypot(a, b), b * cosine - a * sine)

    def carry(self, state: ErrorState) -> None:
        """At the switch both branches differ by no more than the error of what decides it."""
        wrong = self.direction_error(state)
        state.round(2 * (wrong + gamma(8, state.program.stored) * (1 + wrong)))


ACTIVATIONS: dict[str, type[Pairs]] = {"maxmin": MaxMin, "householder": Householder}
POOLS: dict[str, type[Pairs]] = {"max": MaxPool, "projection": ProjectionPool}
