"""Head with one tanh layer, certified by intervals in l-infinity (SortNet + MLP, arXiv 2210.01787).

y = W2 t + b2, t = tanh(z), z = W1 h + b1. Features that move by at most r in every coordinate move
z_i by at most r n_i, n_i = ||W1_i||_1, and tanh rises. So the margin of class c over class j,
a = W2[c] - W2[j], falls by at most

    F_j(r) = sum_i max(a_i, 0) (tanh z_i - tanh(z_i - r n_i))
           + sum_i max(-a_i, 0) (tanh(z_i + r n_i) - tanh z_i),

which grows with r: the radius is the largest r at which no margin is used up.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.certification.rounding import SLACK, U64, ErrorState, gamma
from model.networks.init import set_initial
from model.networks.linf.common import largest_entry
from model.networks.soc.activations import ELEMENTARY
from model.networks.tensor_ops import at_least_float32

_HALVINGS = 48
_OCTAVES = 24
"""A radius is searched up to 2^24 times the one that the largest slope of tanh gives."""
_LEAST_EPS = 2.0**-20
"""Below, falls in float32 are rounding errors."""
_ELEMENTS = 1 << 26
"""Differences of weights that exist at once in training."""


class TanhHead(nn.Module):
    """W2 tanh(W1 h + b1) + b2 with W1 = c1 inner, W2 = c2 outer, c the inverse root of the inputs.

    Args:
        features: length of h.
        hidden: rows of W1.
        num_classes: rows of W2.
    """

    rule = "intervals"

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.inner = set_initial(nn.Parameter(torch.empty(hidden, features)), "standard_normal")
        self.inner_bias = set_initial(nn.Parameter(torch.empty(hidden)), "zeros")
        self.outer = set_initial(nn.Parameter(torch.empty(num_classes, hidden)), "standard_normal")
        self.outer_bias = set_initial(nn.Parameter(torch.empty(num_classes)), "zeros")
        # Numbers of float32: every program has the same ones, and products with weights are exact.
        self.scales = _inverse_root(features), _inverse_root(hidden)

    def forward(
        self, h: Tensor, labels: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and what a unit of distance in the features costs their differences.

        Args:
            h: features, shape (B, features).
            labels: with them the second result are the rates of the labels' margins within eps,
                F_j(eps) / eps, (B, K). Without them it is sum_i abs(a_i) n_i, (K, K), which holds
                on all of R^n.
            eps: radius, in units of the features.

        Returns:
            Both in float32 or wider, differentiable.
        """
        logits, z = self._logits(h)
        outer, spread = self._outer(), self._spread()
        if labels is None:
            weighted = outer * spread
            return logits, torch.cdist(weighted, weighted, p=1)
        reach = max(eps, _LEAST_EPS)
        t = z.tanh()
        down = t - (z - reach * spread).tanh()
        up = (z + reach * spread).tanh() - t
        return logits, _falls(outer, down, up, labels) / reach

    def intervals(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K), and for every z_i its value, its error (0) and n_i, (B, 3, hidden)."""
        logits, z = self._logits(h)
        return logits, torch.stack([z, torch.zeros_like(z), self._spread().expand_as(z)], 1)

    def _logits(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and what tanh is taken of."""
        inner = at_least_float32(self.inner)
        z = F.linear(h.to(inner.dtype), inner) * self.scales[0] + at_least_float32(self.inner_bias)
        y = F.linear(z.tanh(), at_least_float32(self.outer)) * self.scales[1]
        return y + at_least_float32(self.outer_bias), z

    def _outer(self) -> Tensor:
        return at_least_float32(self.outer) * self.scales[1]

    def _spread(self) -> Tensor:
        return at_least_float32(self.inner).abs().sum(1) * self.scales[0]

    @torch.no_grad()
    def factor_bounds(self) -> Tensor:
        """Upper bounds of the global factors, float64 (K, K), diagonal 0."""
        weighted = self.outer.double() * self.scales[1] * self._spread_bounds()
        return torch.cdist(weighted, weighted, p=1) * SLACK

    @torch.no_grad()
    def interval_bounds(self, intervals: Tensor, errors: Tensor) -> Tensor:
        """Intervals of the exact network, from those of the float64 program.

        Args:
            intervals: of `intervals` in float64.
            errors: bound of the error of every z_i, float64 (B,).
        """
        z = intervals[:, 0]
        return torch.stack([z, errors[:, None].expand_as(z), self._spread_bounds().expand_as(z)], 1)

    @torch.no_grad()
    def radii(self, margins: Tensor, intervals: Tensor, prediction: Tensor) -> Tensor:
        """Distance of the features up to which no margin is used up, for every image.

        Found by halving and then checked: F_j(r), rounded up, is at most every margin.

        Args:
            margins: of the prediction over every class, less what rounding may have done, (B, K).
            intervals: of `intervals` or `interval_bounds`.
            prediction: classes, int64 (B,).

        Returns:
            float64 (B, K): the distance, 0 if there is none, at the class that ends it; infinite at
            all others.
        """
        margins, intervals = margins.double(), intervals.double()
        outer = self.outer.double() * self.scales[1]
        found = torch.full_like(margins, math.inf)
        for own in prediction.unique().tolist():
            rows = (prediction == own).nonzero().squeeze(1)
            a = outer[own] - outer
            limits = _Limits(
                margins=margins[rows].index_fill(1, prediction.new_tensor([own]), math.inf),
                intervals=intervals[rows],
                sides=torch.cat([a.clamp(min=0), (-a).clamp(min=0)], 1),
            )
            radius, rival = limits.largest()
            found[rows, rival] = radius
        return found

    @torch.no_grad()
    def carry_hidden(self, state: ErrorState) -> None:
        """Carry bounds of the largest feature to those of the largest z_i."""
        largest = float(self._spread_bounds().max())
        state.multiply(
            self.inner.shape[1] + 1,
            upper=largest,
            absolute=largest,
            bias=largest_entry(self.inner_bias),
            roundings=3,
        )

    @torch.no_grad()
    def margin_error(self, features: ErrorState) -> Tensor:
        """Bound of the error of every logit difference, float64 (B,).

        Args:
            features: bounds of the features; notes the peak of the head.
        """
        program = features.program
        wide = dataclasses.replace(program, activation=program.wide, accumulation=program.wide)
        state = dataclasses.replace(features, program=wide)
        self.carry_hidden(state)
        features.note(state.peak)
        # tanh is 1-Lipschitz and at most 1; so is its computed value, up to its rounding.
        tanh = gamma(ELEMENTARY, wide.wide)
        error = state.error + tanh
        bias = largest_entry(self.outer_bias)
        dot = wide.product(self.outer.shape[1] + 1, roundings=3)
        rounding = 2 * dot * (self._row_bound() * (1 + tanh) + bias)
        features.note(torch.full_like(features.peak, self._row_bound() * 2 + bias))
        outer = self.outer.double() * self.scales[1]
        distance = float(torch.cdist(outer, outer, p=1).max()) * SLACK
        return distance * error + rounding

    @property
    def operations(self) -> int:
        """Roundings between a feature and a logit along any path."""
        return sum(self.inner.shape) + self.outer.shape[1] + 2 * ELEMENTARY

    @property
    def growth(self) -> float:
        """Bound of what any part of the head multiplies an error by."""
        inner = max(1.0, float(self._spread_bounds().max()))
        return inner * max(1.0, self._row_bound())

    @torch.no_grad()
    def _spread_bounds(self) -> Tensor:
        """Upper bounds of n_i, float64 (hidden,)."""
        return self.inner.double().abs().sum(1) * (self.scales[0] * SLACK)

    def _row_bound(self) -> float:
        return float(self.outer.double().abs().sum(1).max()) * self.scales[1] * SLACK


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Images of one predicted class: how far their features can move."""

    margins: Tensor
    """(b, K), infinite at the prediction."""
    intervals: Tensor
    """See TanhHead.intervals, (b, 3, H)."""
    sides: Tensor
    """Rows (max(a, 0), max(-a, 0)), (K, 2 H)."""

    def left(self, r: Tensor) -> Tensor:
        """What the margins are at least, features within r (b,); (b, K), rounded down."""
        z, error, spread = self.intervals.unbind(1)
        reach = error + r[:, None] * spread
        # Two values of tanh, their arguments and their difference are rounded; the centre itself
        # is off by `error`.
        slip = error + 4 * ELEMENTARY * U64 * (1 + z.abs() + reach)
        down = z.tanh() - (z - reach).tanh() + slip
        up = (z + reach).tanh() - z.tanh() + slip
        falls = torch.cat([down, up], 1) @ self.sides.T
        left = self.margins - falls * (1 + gamma(2 * z.shape[1] + 8, U64))
        # An error may be infinite, and 0 times it nothing at all.
        left = left.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        return torch.where(self.margins == math.inf, math.inf, left)

    def largest(self) -> tuple[Tensor, Tensor]:
        """Largest r found at which nothing is used up (0: none), and the class that ends it."""
        _, _, spread = self.intervals.unbind(1)
        still = self.left(spread.new_zeros(len(spread)))
        slopes = torch.cat([spread, spread], 1) @ self.sides.T
        # tanh has slopes of at most 1, so this much is sure, up to rounding.
        sure = (still / slopes.clamp(min=1e-30)).amin(1).clamp(min=0)
        low, high = torch.full_like(sure, -1.0), torch.full_like(sure, _OCTAVES)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            holds = (self.left(sure * middle.exp2()) >= 0).all(1)
            low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
        radius = sure * low.exp2()
        holds = (self.left(radius) >= 0).all(1)
        return torch.where(holds, radius, 0.0), self.left(sure * high.exp2()).argmin(1)


def _falls(outer: Tensor, down: Tensor, up: Tensor, labels: Tensor) -> Tensor:
    """F_j of the margins of the labels, (B, K), a part of the batch at a time.

    Args:
        outer: W2, (K, H).
        down: how far each hidden value can fall, (B, H).
        up: how far each can rise, (B, H).
        labels: int64 (B,).
    """
    size = max(1, _ELEMENTS // outer.numel())
    if len(labels) <= size:
        return _part_of_falls(outer, down, up, labels)
    parts = zip(down.split(size), up.split(size), labels.split(size), strict=True)
    return torch.cat(
        [
            checkpoint(_part_of_falls, outer, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    )


def _part_of_falls(outer: Tensor, down: Tensor, up: Tensor, labels: Tensor) -> Tensor:
    # max(a, 0) down + max(-a, 0) up = a (down - up) / 2 + |a| (down + up) / 2
    own = outer[labels]
    skew, mean = (down - up) / 2, (down + up) / 2
    even = (own * skew).sum(1, keepdim=True) - skew @ outer.T
    odd = ((own[:, None] - outer).abs() @ mean[:, :, None]).squeeze(2)
    falls: Tensor = (even + odd).scatter(1, labels[:, None], 0.0)
    return falls


def _inverse_root(inputs: int) -> float:
    return float(torch.tensor(inputs**-0.5, dtype=torch.float32, device="cpu"))
