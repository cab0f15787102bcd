"""Head with one hidden layer, certified by its curvature (CRC-Lip, arXiv 2211.08453).

y = W2 softplus(W1 h + b1) + b2. No norm is constrained. Of the margin g = y_i - y_j, with
a = W2[i] - W2[j], the Hessian is W1^T diag(a softplus'') W1 and 0 < softplus'' <= 1/4, so

    g(h + d) >= g(h) - ||grad g(h)|| ||d|| - c ||d||^2 / 2,   c = ||W1^T diag(max(-a, 0)) W1|| / 4.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.certification.matrix_bounds import MatrixBound, norm_upper_bound
from model.certification.rounding import FLOAT64, SLACK, ErrorState, gamma
from model.errors import ModelError
from model.networks.head import pairwise_distances
from model.networks.init import set_initial
from model.networks.soc.activations import ELEMENTARY
from model.networks.soc.power_iteration import estimated_norm
from model.networks.tensor_ops import at_least_float32

_CURVATURE = 0.25
"""Largest second derivative of softplus."""
_PAIRWISE_WORK = 1e12
"""Flops up to which the curvature of every pair is bounded on its own (minutes on a CPU)."""


class MLPHead(nn.Module):
    """W2 softplus(W1 h + b1) + b2.

    Args:
        features: length of h.
        hidden: rows of W1.
        num_classes: rows of W2.
    """

    kind = "mlp"

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.features, self.hidden, self.num_classes = features, hidden, num_classes
        self.inner = set_initial(nn.Parameter(torch.empty(hidden, features)), "uniform")
        self.inner_bias = set_initial(nn.Parameter(torch.empty(hidden)), "zeros")
        self.outer = set_initial(nn.Parameter(torch.empty(num_classes, hidden)), "uniform")
        self.outer_bias = set_initial(nn.Parameter(torch.empty(num_classes)), "zeros")

    def forward(
        self, features: Tensor, labels: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and nominal constants of their differences, in float32 or wider.

        Args:
            features: shape (B, features).
            labels: with them the second result are the rates of the labels' margins within eps,
                (B, K): slope + eps * curvature / 2. Without them it is ||W1|| ||W2[i] - W2[j]||,
                (K, K), which holds on all of R^n. Both take ||W1|| as estimated.
            eps: radius, in units of the features.
        """
        logits, z = self._logits(features)
        inner, outer = at_least_float32(self.inner), at_least_float32(self.outer)
        norm = estimated_norm(inner)
        if labels is None:
            return logits, norm * pairwise_distances(outer)
        gradients = self._gradients(z)
        differences = gradients - gradients[torch.arange(len(labels)), labels][:, None]
        # The label's own difference is 0, where the norm has no derivative.
        slopes = (differences.square().sum(2) + torch.finfo(z.dtype).tiny).sqrt()
        largest = torch.cdist(outer, outer, p=torch.inf)[labels]
        rates = slopes + (eps / 2 * _CURVATURE) * norm.square() * largest
        return logits, rates.scatter(1, labels[:, None], 0)

    def slopes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K), and the norms of the gradients of all margins (B, K, K)."""
        logits, z = self._logits(features)
        gradients = self._gradients(z)
        return logits, torch.cdist(
            gradients, gradients, compute_mode="donot_use_mm_for_euclid_dist"
        )

    def _logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and what the hidden layer takes the softplus of."""
        inner = at_least_float32(self.inner)
        z = F.linear(features.to(inner.dtype), inner, at_least_float32(self.inner_bias))
        # F.softplus would be linear beyond 20, where it is off by 2e-9.
        hidden = torch.logaddexp(z, torch.zeros_like(z))
        return F.linear(hidden, at_least_float32(self.outer), at_least_float32(self.outer_bias)), z

    def _gradients(self, z: Tensor) -> Tensor:
        """Gradients of the logits in the features, (B, K, features)."""
        return (at_least_float32(self.outer) * z.sigmoid()[:, None]) @ at_least_float32(self.inner)

    @torch.no_grad()
    def factor_bounds(self) -> Tensor:
        """Upper bounds of the global factors, float64 (K, K).

        Raises:
            ModelError: a value is not finite.
        """
        for p in self.parameters():
            if not bool(p.isfinite().all()):
                raise ModelError("the head holds values that are not finite")
        distances = pairwise_distances(self.outer.double())
        return distances * (norm_upper_bound(self.inner.double()) * SLACK)

    @torch.no_grad()
    def curvature_bounds(self) -> Tensor:
        """Curvature c of all ordered pairs (i, j), proved, float64 (K, K), diagonal 0.

        The smallest of: ||W1||^2 max (a_-); the bounds of the two parts of
        a_- <= max(-W2[i], 0) + max(W2[j], 0); and, where that is affordable, of the pair itself.
        """
        inner, outer = self.inner.double(), self.outer.double()
        square = norm_upper_bound(self.inner.double()) ** 2
        negative = torch.stack([weighted_norm(inner, (-row).clamp(min=0)) for row in outer])
        positive = torch.stack([weighted_norm(inner, row.clamp(min=0)) for row in outer])
        bounds = negative[:, None] + positive[None]
        # A product, two squarings ... of matrices of this order, for each pair.
        work = 16 * self.num_classes**2 * min(self.features, self.hidden) ** 3
        for i, row in enumerate(outer):
            deficit = (outer - row).clamp(min=0)  # max(-a, 0) against every j
            bounds[i] = torch.minimum(bounds[i], deficit.amax(1) * square)
            if work <= _PAIRWISE_WORK:
                pairs = torch.stack([weighted_norm(inner, weights) for weights in deficit])
                bounds[i] = torch.minimum(bounds[i], pairs)
        return (bounds * (_CURVATURE * SLACK)).fill_diagonal_(0)

    @torch.no_grad()
    def slope_bounds(self, slopes: Tensor, features: ErrorState, inner: MatrixBound) -> Tensor:
        """Upper bounds of the exact slopes at the exact features, float64 (B, K, K).

        Args:
            slopes: as the float64 program computed them, (B, K, K).
            features: bounds of the float64 program's features.
            inner: bounds of W1.
        """
        u, rows, largest = FLOAT64.wide, self._row_norm(), float(self.outer.abs().max())
        # Error of W1 h + b1 at the computed h, of the sigmoids, of the gradients.
        z = gamma(self.features + 1, u) * (
            inner.absolute * features.computed + _norm(self.inner_bias)
        )
        weighted = _CURVATURE * largest * z + gamma(2 * ELEMENTARY, u) * rows
        gradient = inner.upper * weighted + gamma(self.hidden + 1, u) * inner.absolute * (
            rows + weighted
        )
        # The gradient of a margin turns with its curvature, on either side.
        turn = _CURVATURE * inner.upper**2 * 2 * largest * features.error
        return (slopes.double() + (2 * gradient + turn)[:, None, None]) * SLACK

    @torch.no_grad()
    def margin_error(self, features: ErrorState, inner: MatrixBound) -> Tensor:
        """Bound of the error of every logit difference, float64 (B,).

        Args:
            features: bounds of the features.
            inner: bounds of W1.
        """
        program = features.program
        wide = dataclasses.replace(program, activation=program.wide, accumulation=program.wide)
        state = dataclasses.replace(features, program=wide)
        state.multiply(
            self.features + 1,
            upper=inner.upper,
            absolute=inner.absolute,
            bias=_norm(self.inner_bias),
            roundings=2,
        )
        # softplus is 1-Lipschitz and at most |z| + log 2.
        state.norm = state.norm + math.sqrt(self.hidden)
        state.error = state.error + gamma(3 * ELEMENTARY, wide.wide) * state.computed
        state.note(state.computed)
        features.note(state.peak)
        dot = gamma(self.hidden + 1, wide.wide) * (1 + wide.weight) + wide.weight
        rounding = 2 * self._row_norm() * dot * state.computed
        largest_bias = float(self.outer_bias.abs().max())
        rounding = rounding + 2 * dot * largest_bias
        features.note(self._row_norm() * (1 + dot) * state.computed + largest_bias)
        distance = float(pairwise_distances(self.outer.double()).max()) * SLACK
        return distance * state.error + rounding

    def _row_norm(self) -> float:
        return float(self.outer.double().norm(dim=1).max()) * SLACK


def weighted_norm(matrix: Tensor, weights: Tensor) -> Tensor:
    """Upper bound of ||A^T diag(w) A|| for w >= 0, float64 scalar."""
    used = weights > 0
    if not bool(used.any()):
        return matrix.new_zeros(())
    rows = matrix[used] * weights[used].sqrt()[:, None]
    # The square root and the product round once each.
    slip = 4 * FLOAT64.wide * float(rows.norm(dim=1).norm())
    return matrix.new_tensor((norm_upper_bound(rows) + slip) ** 2 * SLACK)


def _norm(parameter: Tensor) -> float:
    return float(parameter.detach().double().norm()) * SLACK
