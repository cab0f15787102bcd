"""Linear heads: section 4 of docs/explanation/certificate.md, and step 5 of its section 5."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from model.verifier.errors import UnusableError
from model.verifier.mathematics.rounding import ROUND_UP, ErrorState, Floats, U, gamma

Classes = npt.NDArray[np.int64]
SMALLEST_ROW = 1e-6


class Head(ABC):
    """What turns features into logits, and margins into radii.

    Radii here are distances of features; `local` is what a head knows of every image.
    """

    rule: str
    """Its name in the certificate."""
    factors: Floats
    """Proved constants of the margins in the features, shape (K, K), 0 on the diagonal."""
    nominal_factors: Floats
    """The same as papers state them."""

    @abstractmethod
    def logits(self, features: Floats) -> tuple[Floats, Any]:
        """Logits (B, K) and `local`."""

    @abstractmethod
    def margin_error(self, state: ErrorState) -> Floats:
        """E, before underflow, of a margin from features with that error, shape (B,)."""

    def settle(self, local: Any, state: ErrorState) -> Any:
        """`local` with the error of the features at the image taken into account."""
        return local

    def used(self, reach: Floats, local: Any, prediction: Classes) -> Floats:
        """Largest loss (B, K) of the margins where features move by `reach`, shape (B,)."""
        return reach[:, None] * self.factors[prediction]

    def radii(self, margins: Floats, local: Any, prediction: Classes) -> Floats:
        """How far the features may move until the margins (B, K) are used up, shape (B, K)."""
        return quotient(margins, self.factors[prediction])

    def nominal_radii(self, margins: Floats, local: Any, prediction: Classes) -> Floats:
        """The same without any term for rounding."""
        return quotient(margins, self.nominal_factors[prediction])


class LinearHead(Head):
    """Logits W h + b; `unit` rows are divided by their norms first."""

    def __init__(
        self, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], rule: str
    ) -> None:
        self.rule, self.unit = rule, rule == "unit"
        rows = weight.astype(np.float64)
        norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
        if self.unit:
            if norms.min() < SMALLEST_ROW:
                raise UnusableError(
                    f"row {int(norms.argmin())} of the head is nearly zero and cannot be normalised"
                )
            rows = rows / norms
        self.rows, self.bias = rows, bias.astype(np.float64)
        self.longest = float(norms.max()) * ROUND_UP
        self.omega = 1.0 if self.unit else self.longest
        # One row at a time: the differences of all pairs would be K times as large as the head.
        plain = np.stack([np.sqrt(np.square(rows - row).sum(axis=1)) for row in rows])
        # Two rows, each off by a relative rho.
        rho = gamma(rows.shape[1] + 4, U) if self.unit else 0.0
        self.nominal_factors = plain
        self.factors = (plain + 2 * rho) * ROUND_UP
        np.fill_diagonal(self.factors, 0)

    def logits(self, features: Floats) -> tuple[Floats, Any]:
        """See Head."""
        return features @ self.rows.T + self.bias, None

    def margin_error(self, state: ErrorState) -> Floats:
        """Wrong features, wrong rows and two dot products."""
        program, C = state.program, self.rows.shape[1]
        rho = gamma(C + 4, program.wide) + 2 * program.weights if self.unit else program.weights
        dot = gamma(C + 1, program.wide)
        row = 2 * self.omega * (rho + dot * (1 + rho)) * state.size
        bias = float(np.abs(self.bias).max())
        state.see(self.omega * (1 + rho) * (1 + dot) * state.size + bias)
        state.see(state.n * 0 + self.longest)  # a row whose norm overflows is divided by infinity
        constant = 2 * (dot * (1 + program.weights) + program.weights) * bias
        return float(self.factors.max()) * state.e + row + constant


@np.errstate(all="ignore")
def quotient(numerator: Floats, denominator: Floats) -> Floats:
    """A quotient; 0 / 0 is 0, for nothing is certified then."""
    result = numerator / denominator
    return np.where(np.isnan(result), 0.0, result)
