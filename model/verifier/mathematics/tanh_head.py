"""Heads W2 tanh(W1 h + b1) + b2: docs/explanation/families.md, SortNet + MLP.

Features within r move z_i = (W1 h + b1)_i by at most r n_i, n_i = ||W1_i||_1. tanh is monotone, so
of the margin of class c over class j, a = W2[c] - W2[j], is lost at most

    F_j(r) = sum_i max(a_i, 0) (tanh z_i - tanh(z_i - r n_i))
           + sum_i max(-a_i, 0) (tanh(z_i + r n_i) - tanh z_i)
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.verifier.mathematics.linear_head import Classes, Head
from model.verifier.mathematics.rounding import (
    ROUND_UP,
    ErrorState,
    Floats,
    U,
    gamma,
    kappa,
    largest_entry,
)

_HALVINGS, _OCTAVES = 48, 24


class Hidden(NamedTuple):
    """What the head knows of every image."""

    z: Floats
    """Arguments of tanh, shape (B, H)."""
    error: Floats
    """How far they may be from the exact ones, shape (B,)."""


class TanhHead(Head):
    """One hidden layer; the stored matrices are scaled by the numbers of float32 nearest n^-1/2."""

    rule = "intervals"

    def __init__(
        self, inner: Floats, inner_bias: Floats, outer: Floats, outer_bias: Floats
    ) -> None:
        # Products of two numbers of float32 are exact in float64.
        self.inner = inner * float(np.float32(inner.shape[1] ** -0.5))
        self.outer = outer * float(np.float32(outer.shape[1] ** -0.5))
        self.inner_bias, self.outer_bias = inner_bias, outer_bias
        self.features, self.hidden = inner.shape[1], len(inner)
        self.spread = np.abs(self.inner).sum(axis=1)
        weighted = self.outer * self.spread
        self.nominal_factors = np.stack([np.abs(weighted - v).sum(axis=1) for v in weighted])
        self.factors = self.nominal_factors * ROUND_UP**2
        self.row = float(np.abs(self.outer).sum(axis=1).max()) * ROUND_UP
        apart = max(float(np.abs(self.outer - v).sum(axis=1).max()) for v in self.outer)
        self.apart = apart * ROUND_UP
        self.widest = float(self.spread.max()) * ROUND_UP
        self.operations = 6 + self.features + 2 * self.hidden + 16
        self.growth = max(1.0, self.widest) * max(1.0, self.row)

    def logits(self, features: Floats) -> tuple[Floats, Hidden]:
        """See Head."""
        z = features @ self.inner.T + self.inner_bias
        return np.tanh(z) @ self.outer.T + self.outer_bias, Hidden(z, np.zeros(len(z)))

    def settle(self, local: Hidden, state: ErrorState) -> Hidden:
        """See Head."""
        self._carry(state)
        flushed = self.operations * state.program.tiny * self.growth * np.maximum(1.0, state.peak)
        return Hidden(local.z, (state.e + flushed) * ROUND_UP)

    def margin_error(self, state: ErrorState) -> Floats:
        """See Head; tanh is 1-Lipschitz, at most 1, and computed to gamma(8, u_s)."""
        self._carry(state)
        program = state.program.in_wide()
        tanh = gamma(8, program.wide)
        outer = self.row * (1 + tanh) + largest_entry(self.outer_bias)
        state.see(state.n * 0 + outer)
        own = 2 * kappa(self.hidden + 1, program, roundings=3) * outer
        return self.apart * (state.e + tanh) + own

    def _carry(self, state: ErrorState) -> None:
        rounding = kappa(self.features + 1, state.program.in_wide(), roundings=3)
        beta = largest_entry(self.inner_bias)
        state.multiply(self.widest, self.widest, rounding, beta)

    # Radii

    def used(self, reach: Floats, local: Hidden, prediction: Classes) -> Floats:
        """F_j(reach), rounded up, shape (B, K)."""
        z, e = local.z, local.error[:, None]
        moved = reach[:, None] * (self.spread * ROUND_UP) + e
        tanh = np.tanh(z)
        # Two values of tanh within 4 units in the last place, their arguments, the difference.
        wrong = e + 32 * U * (1 + np.abs(z) + moved)
        down = tanh - np.tanh(z - moved) + wrong
        up = np.tanh(z + moved) - tanh + wrong
        # sum_i max(a_i, 0) down_i + max(-a_i, 0) up_i with a = W2[c] - W2[j].
        lost = np.empty((len(z), len(self.outer)))
        for c in np.unique(prediction):
            at, a = prediction == c, self.outer[c] - self.outer
            lost[at] = down[at] @ np.maximum(a, 0).T + up[at] @ np.maximum(-a, 0).T
        return lost * (1 + gamma(2 * self.hidden + 8, U))

    def radii(self, margins: Floats, local: Hidden, prediction: Classes) -> Floats:
        """One radius for all rivals; a rival with margin left is given as much more as is sure."""
        rates = np.maximum(self.factors[prediction], 1e-30)
        at = np.arange(len(prediction))
        left = margins - self.used(np.zeros(len(margins)), local, prediction)
        left[at, prediction] = np.inf
        with np.errstate(all="ignore"):
            sure = np.nan_to_num((left / rates).min(axis=1), nan=0.0)
        sure = np.maximum(sure, 0.0)
        low, high = np.full(len(sure), -1.0), np.full(len(sure), float(_OCTAVES))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            holds = self._holds(margins, sure * np.exp2(middle), local, prediction)
            low, high = np.where(holds, middle, low), np.where(holds, high, middle)
        radius = sure * np.exp2(low)
        radius = np.where(self._holds(margins, radius, local, prediction), radius, 0.0)
        left = np.maximum(margins - self.used(radius, local, prediction), 0.0)
        with np.errstate(all="ignore"):
            return radius[:, None] + np.nan_to_num(left / rates, nan=0.0)

    def nominal_radii(self, margins: Floats, local: Hidden, prediction: Classes) -> Floats:
        """See Head."""
        return self.radii(margins, local, prediction)

    def _holds(
        self, margins: Floats, reach: Floats, local: Hidden, prediction: Classes
    ) -> npt.NDArray[np.bool_]:
        left = margins - self.used(reach, local, prediction)
        left[np.arange(len(left)), prediction] = np.inf
        return np.asarray((left >= 0).all(axis=1))
