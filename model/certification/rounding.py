"""A-priori rounding errors of the programs that evaluate a network.

Section 5 of docs/explanation/certificate.md.

Every quantity of a bound is non-negative, so evaluating the bound in float64 changes it by a
relative error of (number of operations) * 2^-53, far below the factor 1 + 2^-20 that ends each
bound (`margin_error` of the networks).
"""

import dataclasses
import math

import torch
from torch import Tensor

U64 = 2.0**-53
"""Unit roundoff of float64."""
SLACK = 1 + 2.0**-30
"""Covers the rounding of a norm or a short sum of non-negative float64 numbers."""

PIXEL_ROUNDINGS = 3
"""Roundings between a real pixel and the number that the network subtracts 1/2 from."""


def up(value: float) -> float:
    """The next float64 above: turns a result rounded to nearest into an upper bound."""
    return math.nextafter(value, math.inf)


def gamma(k: int, u: float) -> float:
    """gamma_k = k u / (1 - k u): relative error of k roundings; infinite where that says nothing.

    Args:
        k: number of roundings.
        u: unit roundoff.
    """
    return k * u / (1 - k * u) if k * u < 1 else math.inf


@dataclasses.dataclass(frozen=True)
class Program:
    """The arithmetic in which a network is evaluated."""

    name: str
    """The torch type of weights and activations."""
    activation: float
    """Unit roundoff u_p of stored activations."""
    accumulation: float
    """Unit roundoff u_a of the sums inside a dot product."""
    weight: float
    """Relative error u_w of its copy of the stored float32 weights."""
    wide: float
    """Unit roundoff u_s of pixels, pool and head."""
    tiny: float
    """Smallest normal number: what is smaller may be flushed to zero."""
    limit: float
    """Activations up to this size overflow nowhere, squared neither."""

    def product(self, k: int, *, copies: int = 1, roundings: int = 1) -> float:
        """kappa: relative error of a dot product of k terms.

        (1 + u_w)^copies (1 + gamma_k) (1 + u_p)^roundings - 1, without the cancellation of the 1.

        Args:
            k: number of terms.
            copies: how many of its two factors are rounded copies of weights.
            roundings: how often the result is rounded when stored.
        """
        errors = [self.weight] * copies + [self.activation] * roundings
        total = gamma(k, self.accumulation)
        for error in errors:
            total = error + total * (1 + error)
        return total

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of weights and activations."""
        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


FLOAT64 = Program("float64", U64, U64, 0.0, U64, 2.0**-1022, 2.0**500)
FLOAT32 = Program("float32", 2.0**-24, 2.0**-24, 0.0, 2.0**-24, 2.0**-126, 2.0**60)
BFLOAT16 = Program("bfloat16", 2.0**-8, 2.0**-24, 2.0**-8, 2.0**-24, 2.0**-126, 2.0**60)
PROGRAMS = {program.name: program for program in (FLOAT64, FLOAT32, BFLOAT16)}


@dataclasses.dataclass
class ErrorState:
    """Bounds carried from layer to layer, one entry per sample.

    Attributes:
        norm: bound of the norm of the exact activation, all tokens together, float64 (B,).
        error: bound of the norm of computed minus exact activation, float64 (B,).
        program: arithmetic of the computed one.
        peak: bound of every computed activation and partial sum so far, float64 (B,).
    """

    norm: Tensor
    error: Tensor
    program: Program
    peak: Tensor

    @classmethod
    def images(cls, norms: Tensor, count: int, program: Program) -> "ErrorState":
        """Pixels as real numbers, as the program gets them; less 1/2, stored as activation.

        Three roundings: a point x + delta is given in the program's wide type, and x / 255 may be a
        product with a rounded reciprocal.

        Args:
            norms: bounds of the norms of the images, (B,).
            count: number of pixels.
            program: the arithmetic.
        """
        norm = norms.double()
        carried = cls(norm, gamma(PIXEL_ROUNDINGS, program.wide) * norm, program, norm)
        carried.norm = norm + math.sqrt(count) / 2
        carried.error = carried.error + program.wide * carried.computed
        carried.error = carried.error + program.activation * carried.computed
        carried.note(carried.computed)
        return carried

    @property
    def computed(self) -> Tensor:
        """Bound of the norm of the computed activation."""
        return self.norm + self.error

    def note(self, size: Tensor) -> None:
        """Remember the largest size met."""
        self.peak = torch.maximum(self.peak, size)

    def translate(self, by: float) -> None:
        """Add a stored vector of norm `by`."""
        self.norm = self.norm + by
        self.error = self.error + self.program.weight * by
        self.error = self.error + self.program.activation * self.computed
        self.note(self.computed)

    def multiply(
        self,
        k: int,
        *,
        upper: float,
        absolute: float,
        bias: float = 0.0,
        copies: int = 1,
        roundings: int = 1,
    ) -> None:
        """Apply a matrix A and add a bias, with dot products of k terms (k + 1 with the bias).

        ||fl(A x + b) - (A x + b)|| <= ||A|| e + kappa (|| |A| || (n + e) + ||b||).

        Args:
            k: inner length, the bias counted.
            upper: bound of ||A||.
            absolute: bound of || |A| ||.
            bias: norm of the bias over all tokens.
            copies: how many rounded copies of weights an entry of A is made of.
            roundings: how often the result is rounded: a bias may be added to a stored product.
        """
        size = absolute * self.computed + bias
        rounding = self.program.product(k, copies=copies, roundings=roundings) * size
        self.error = upper * self.error + rounding
        self.norm = upper * self.norm + bias
        self.note(size)
        self.note(self.computed)

    def finish(self, error: Tensor, underflow: Tensor) -> Tensor:
        """The error of a margin with what flushed operations may add, (B,).

        Infinite where the sizes come near overflow, or where underflow may say more than a logit.

        Args:
            error: what rounding does to a margin, (B,).
            underflow: bound of what is lost below the smallest normal number, (B,).
        """
        hopeless = (underflow > 1) | (self.peak > self.program.limit)
        total = ((error + underflow) * (1 + 2.0**-20)).nan_to_num(nan=math.inf, posinf=math.inf)
        return torch.where(hopeless, math.inf, total)
