"""Linear head with unit rows and the margin factors of all class pairs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.initial import set_initial
from model.layers import at_least_float32


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
    """Logits <w_k / ||w_k||, h> + b_k, with the factors ||w_i / ||w_i|| - w_j / ||w_j|| ||."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = set_initial(nn.Parameter(torch.empty(num_classes, features)), "normal")
        self.bias = set_initial(nn.Parameter(torch.empty(num_classes)), "zeros")

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and margin factors (K, K) in float32 or wider.

        The factors are made here because under ZeRO-3 the weight exists only here.

        Args:
            features: shape (B, C).
        """
        rows = F.normalize(at_least_float32(self.weight), dim=1)
        bias = at_least_float32(self.bias)
        return F.linear(features.to(rows.dtype), rows, bias), pairwise_distances(rows)
