"""Linear head and the margin factors of all class pairs."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.certification.rounding import SLACK, U64, ErrorState, gamma
from model.errors import ModelError
from model.networks.init import set_initial
from model.networks.tensor_ops import at_least_float32

_SMALLEST_ROW = 1e-6


class _PairwiseDistances(torch.autograd.Function):
    """||w_i - w_j|| of all rows.

    torch.cdist alone would do, but its gradient on a GPU makes a K x K x C tensor.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        # By explicit differences: sqrt(2 - 2 w_i.w_j) cancels for similar classes and may give 0.
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(rows, distances)
        return distances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rows, distances = ctx.saved_tensors
        # d f / d w_i = sum_j a_ij (w_i - w_j) with a = (g + g^T) / distance, 0 for equal rows
        a = (gradient + gradient.mT) / distances
        a = a.masked_fill(distances == 0, 0)
        return a.sum(1, keepdim=True) * rows - a @ rows


def pairwise_distances(rows: Tensor) -> Tensor:
    """Euclidean distances (K, K) of all pairs of rows (K, C), differentiable once.

    The gradient at coinciding rows, the diagonal among them, is 0. Memory is K x (K + C).
    """
    return _PairwiseDistances.apply(rows)


class Head(nn.Module):
    """Logits <v_k, h> + b_k, with the factors ||v_i - v_j||.

    v_k = w_k / ||w_k|| for `unit` rows, w_k itself for `linear` ones.
    """

    def __init__(
        self, features: int, num_classes: int, kind: Literal["unit", "linear"] = "unit"
    ) -> None:
        super().__init__()
        self.kind = kind
        self.weight = set_initial(nn.Parameter(torch.empty(num_classes, features)), "normal")
        self.bias = set_initial(nn.Parameter(torch.empty(num_classes)), "zeros")

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and margin factors (K, K) in float32 or wider.

        The factors are made here because under ZeRO-3 the weight exists only here.

        Args:
            features: shape (B, C).
        """
        rows = self._rows(at_least_float32(self.weight))
        bias = at_least_float32(self.bias)
        return F.linear(features.to(rows.dtype), rows, bias), pairwise_distances(rows)

    def _rows(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=1) if self.kind == "unit" else weight

    def _row_error(self, unit_roundoff: float, weight_rounding: float = 0.0) -> float:
        """Bound of the relative error of a computed row v_k."""
        if self.kind == "linear":
            return weight_rounding
        return gamma(self.weight.shape[1] + 4, unit_roundoff) + 2 * weight_rounding

    @torch.no_grad()
    def factor_bounds(self) -> Tensor:
        """Upper bounds of the exact factors of the stored rows, float64 (K, K).

        Raises:
            ModelError: a row that is to be normalised is nearly zero, or a value is not finite.
        """
        weight = self.weight.double()
        if not bool(weight.isfinite().all() and self.bias.isfinite().all()):
            raise ModelError("the head holds values that are not finite")
        norms = weight.norm(dim=1)
        if self.kind == "unit" and not bool((norms >= _SMALLEST_ROW).all()):
            raise ModelError(
                f"row {int(norms.argmin())} of the head has norm {float(norms.min()):.1e}, below "
                f"{_SMALLEST_ROW}: it cannot be normalised"
            )
        distances = pairwise_distances(self._rows(weight))
        bounds = (distances + 2 * self._row_error(U64)) * SLACK
        return bounds.fill_diagonal_(0)

    @torch.no_grad()
    def margin_error(self, features: ErrorState, largest_factor: float) -> Tensor:
        """Bound of the error of every logit difference, float64 (B,).

        Args:
            features: bounds of the pooled features; notes the peak of the head.
            largest_factor: largest of the factor bounds.
        """
        program = features.program
        stored = float(self.weight.double().norm(dim=1).max()) * SLACK
        largest = stored if self.kind == "linear" else 1.0
        row = self._row_error(program.wide, program.weight)
        dot = gamma(self.weight.shape[1] + 1, program.wide)
        bias = dot * (1 + program.weight) + program.weight
        largest_bias = float(self.bias.abs().max())
        bias *= largest_bias
        # A row whose norm overflows is divided by infinity: its logit becomes the bias.
        size = largest * (1 + row) * (1 + dot) * features.computed + largest_bias
        features.note(size.clamp(min=stored))
        rounding = 2 * largest * (row + dot * (1 + row)) * features.computed + 2 * bias
        return largest_factor * features.error + rounding
