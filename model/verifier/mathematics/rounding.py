"""Rounding of floating point programs: sections 2 and 5 of docs/explanation/certificate.md.

Everything is float64. All quantities of an error bound are non-negative, so the rounding of the
bound itself is a relative error that one factor at its end covers.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

U = 2.0**-53
ROUND_UP = 1 + 2.0**-30
"""Covers the rounding of a sum, a norm or a square root of non-negative numbers."""
GUARD = 2.0**-50
"""Covers a handful of float64 operations."""


class Program(NamedTuple):
    """The arithmetic of a forward pass (table of section 5)."""

    name: str
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

    def in_wide(self) -> "Program":
        """The same program where it computes in float32 or wider throughout."""
        return self._replace(stored=self.wide)


_SINGLE, _DOUBLE = 2.0**-24, 2.0**-53
PROGRAMS = {
    program.name: program
    for program in (
        Program("float64", _DOUBLE, _DOUBLE, 0.0, _DOUBLE, 2.0**-1022, 2.0**500),
        Program("float32", _SINGLE, _SINGLE, 0.0, _SINGLE, 2.0**-126, 2.0**60),
        Program("bfloat16", 2.0**-8, _SINGLE, 2.0**-8, _SINGLE, 2.0**-126, 2.0**60),
    )
}

VERIFIER = PROGRAMS["float64"]._replace(name="verifier")
"""The arithmetic of this verifier's own forward pass."""


def gamma(k: float, u: float) -> float:
    """Relative error of a sum of k products (section 2)."""
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def combined(*errors: float) -> float:
    """(1 + a)(1 + b)... - 1 without the cancellation: a leading 1 would swallow 2^-53."""
    total = 0.0
    for error in errors:
        total += error + total * error
    return total


def kappa(k: float, program: Program, copies: int = 1, roundings: int = 1) -> float:
    """(1 + u_w)^a (1 + gamma(k, u_a)) (1 + u_p)^r - 1 (section 5)."""
    weights, stored = [program.weights] * copies, [program.stored] * roundings
    return combined(gamma(k, program.accumulated), *weights, *stored)


@dataclasses.dataclass
class ErrorState:
    """Bounds of an activation and of its error, carried through a network, shape (B,) each.

    The norm is that of the network: l2 of all positions together, or the largest entry.
    """

    program: Program
    n: Floats
    """Norm of the exact activation."""
    e: Floats
    """Norm of its error."""
    peak: Floats
    """Largest size of anything met so far, P."""

    @classmethod
    def of_images(cls, norms: Floats, shift: float, program: Program) -> "ErrorState":
        """Pixels less 1/2 (a translation of norm `shift`), stored.

        An entry of x + delta is rounded when it is given, and k / 255 may be a product with the
        rounded reciprocal: three roundings.
        """
        state = cls(program, norms, gamma(3, program.wide) * norms, norms * 0)
        state.n = state.n + shift
        state.e = state.e + program.wide * (state.n + state.e)
        state.round(program.stored)
        return state

    @property
    def size(self) -> Floats:
        """Norm of the computed activation."""
        return self.n + self.e

    def see(self, size: Floats) -> None:
        """Remember a size for the overflow check."""
        self.peak = np.fmax(self.peak, np.where(np.isnan(size), np.inf, size))

    def round(self, relative: float) -> None:
        """The activation is stored with a relative error."""
        self.e = self.e + relative * self.size
        self.see(self.size)

    def translate(self, beta: float) -> None:
        """A stored vector of norm beta is added: position embedding, bias, mean."""
        self.n = self.n + beta
        self.e = self.e + self.program.weights * beta
        self.round(self.program.stored)

    def multiply(self, sigma: float, alpha: float, rounding: float, beta: float = 0.0) -> None:
        """A product with A, ||A|| <= sigma and || |A| || <= alpha, plus a bias of norm beta."""
        product = alpha * self.size + beta
        self.see(product)
        self.n, self.e = sigma * self.n + beta, sigma * self.e + rounding * product
        self.see(self.size)

    def close(self, error: Floats, underflow: float) -> Floats:
        """E of section 5, steps 6 and 7: underflow and overflow.

        Args:
            error: E so far.
            underflow: Omega for activations of size 1 and less.
        """
        with np.errstate(all="ignore"):
            omega = underflow * np.maximum(1.0, self.peak)
            total = (error + omega) * (1 + 2.0**-20)
            lost = np.isnan(total) | ~(omega <= 1) | ~(self.peak <= self.program.limit)
        return np.where(lost, np.inf, total)


def norm_of(tensor: npt.NDArray[np.float32] | Floats) -> float:
    """l2 norm of all entries, rounded up."""
    return math.sqrt(float(np.square(tensor.astype(np.float64)).sum())) * ROUND_UP


def largest_entry(tensor: npt.NDArray[np.float32] | Floats) -> float:
    """l-infinity norm, exactly."""
    return float(np.abs(tensor).max())
