"""Heads W2 softplus(W1 h + b1) + b2, certified by their curvature: docs/explanation/families.md.

For g = y_i - y_j and a = W2[i] - W2[j], Hess g = W1^T diag(a softplus'') W1, 0 < softplus'' <= 1/4:

    g(h + d) >= g(h) - s ||d|| - c_ij ||d||^2 / 2,   s >= ||grad g(h)||,
    c_ij = ||W1^T diag(max(-a, 0)) W1|| / 4.
"""

from typing import NamedTuple

import numpy as np

from model.verifier.mathematics.linear_head import Classes, Head, quotient
from model.verifier.mathematics.matrix_bounds import MatrixBounds, frobenius, upper_bound
from model.verifier.mathematics.rounding import (
    ROUND_UP,
    ErrorState,
    Floats,
    U,
    gamma,
    kappa,
    norm_of,
)

PAIRS_WORK = 4e12  # operations that the norms of all pairs may cost


class Hidden(NamedTuple):
    """What the head knows of every image."""

    gradients: Floats
    """Gradients of the logits in the features, shape (B, K, F)."""
    error: Floats
    """How far the norm of a difference of two may be from the exact one, shape (B,)."""


class MLPHead(Head):
    """One hidden layer of softplus; radii solve s r + c r^2 / 2 = margin."""

    rule = "mlp"

    def __init__(
        self,
        bounds: MatrixBounds,
        inner: Floats,
        inner_bias: Floats,
        outer: Floats,
        outer_bias: Floats,
    ) -> None:
        self.bounds, self.inner, self.inner_bias = bounds, inner, inner_bias
        self.outer, self.outer_bias = outer, outer_bias
        plain = np.stack([np.sqrt(np.square(outer - row).sum(axis=1)) for row in outer])
        self.apart = float(plain.max()) * ROUND_UP
        self.nominal_factors = bounds.upper * plain
        self.factors = self.nominal_factors * ROUND_UP
        self.rows = float(np.sqrt(np.square(outer).sum(axis=1)).max()) * ROUND_UP
        self.curvature = self._curvature()

    def _curvature(self) -> Floats:
        """c_ij, shape (K, K): the smallest of three bounds."""
        classes, (hidden, features) = len(self.outer), self.inner.shape
        least = np.stack([(self.outer - row).max(axis=1) for row in self.outer])
        c = self.bounds.upper**2 * np.maximum(least, 0)
        down = np.array([self._weighted(np.maximum(-row, 0)) for row in self.outer])
        up = np.array([self._weighted(np.maximum(row, 0)) for row in self.outer])
        c = np.minimum(c, down[:, None] + up)
        if 2.0 * classes**2 * hidden * features * min(hidden, features) <= PAIRS_WORK:
            for i, row in enumerate(self.outer):
                own = [self._weighted(np.maximum(other - row, 0)) for other in self.outer]
                c[i] = np.minimum(c[i], own)
        np.fill_diagonal(c, 0)
        return c / 4 * ROUND_UP

    def _weighted(self, weights: Floats) -> float:
        """A bound of ||W1^T diag(weights) W1||; an entry of diag(sqrt w) W1 is rounded."""
        rows = weights > 0  # the others, about half of them, add nothing
        matrix = np.sqrt(weights[rows])[:, None] * self.inner[rows]
        return float((upper_bound(matrix) + 4 * U * frobenius(matrix)) ** 2)

    def logits(self, features: Floats) -> tuple[Floats, Hidden]:
        """See Head."""
        z = features @ self.inner.T + self.inner_bias
        with np.errstate(all="ignore"):
            slope = np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), 1 - 1 / (1 + np.exp(-np.abs(z))))
        gradients = (self.outer * slope[:, None]) @ self.inner
        values = np.logaddexp(z, 0) @ self.outer.T + self.outer_bias
        return values, Hidden(gradients, np.zeros(len(z)))

    def settle(self, local: Hidden, state: ErrorState) -> Hidden:
        """What the gradients turn by over the error of the features, and their own rounding."""
        features = self.inner.shape[1]
        largest = float(np.abs(self.outer).max())
        turned = self.bounds.upper**2 / 4 * 2 * largest * state.e
        inputs = self.bounds.absolute * state.size + norm_of(self.inner_bias)
        w = largest / 4 * gamma(features + 1, U) * inputs + gamma(16, U) * self.rows
        dots = gamma(len(self.inner) + 1, U) * self.bounds.absolute * (self.rows + w)
        return Hidden(local.gradients, (turned + 2 * (self.bounds.upper * w + dots)) * ROUND_UP)

    def margin_error(self, state: ErrorState) -> Floats:
        """See Head."""
        program = state.program.in_wide()
        hidden, features = self.inner.shape
        rounding = kappa(features + 1, program, copies=1, roundings=2)
        state.multiply(self.bounds.upper, self.bounds.absolute, rounding, norm_of(self.inner_bias))
        # softplus is 1-Lipschitz, at most |z| + log 2, and computed to gamma(24, u_s).
        state.n = state.n + np.sqrt(hidden) * np.log(2) * ROUND_UP
        state.round(gamma(24, program.wide))
        dot, copy = gamma(hidden + 1, program.wide), program.weights
        wrong, bias = copy + dot * (1 + copy), float(np.abs(self.outer_bias).max())
        state.see(self.rows * (1 + wrong) * state.size + bias)
        return self.apart * state.e + 2 * self.rows * wrong * state.size + 2 * wrong * bias

    # Radii

    def _slopes(self, local: Hidden, prediction: Classes) -> Floats:
        own = local.gradients[np.arange(len(prediction)), prediction]
        apart = np.sqrt(np.square(local.gradients - own[:, None]).sum(axis=2))
        return apart * ROUND_UP + local.error[:, None]

    def used(self, reach: Floats, local: Hidden, prediction: Classes) -> Floats:
        """See Head."""
        r = reach[:, None]
        return (self._slopes(local, prediction) + self.curvature[prediction] * r / 2) * r

    def radii(self, margins: Floats, local: Hidden, prediction: Classes) -> Floats:
        """See Head."""
        s, c = self._slopes(local, prediction), self.curvature[prediction]
        root = np.sqrt(np.square(s) + 2 * c * np.maximum(margins, 0))
        return quotient(2 * margins, s + root)

    def nominal_radii(self, margins: Floats, local: Hidden, prediction: Classes) -> Floats:
        """See Head; `local` has no error here."""
        return self.radii(margins, local, prediction)
