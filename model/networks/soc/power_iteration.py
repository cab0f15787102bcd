"""Norms from below, by power iteration: for training, never for a certificate."""

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 8


def estimated_norm(matrix: Tensor) -> Tensor:
    """||A|| from below, differentiable through A alone, scalar.

    It begins with the same vector every time, so that it is a function of the matrix: a resumed
    run, and every rank, finds the same number.

    Args:
        matrix: shape (m, n), float32 or wider.
    """
    with torch.no_grad():
        start = torch.arange(1, matrix.shape[1] + 1, device=matrix.device)
        v = ((37 * start) % 101 - 50).to(matrix.dtype)
        for _ in range(_STEPS):
            v = F.normalize(matrix.mT @ (matrix @ v), dim=0, eps=_tiny(matrix))
        u = F.normalize(matrix @ v, dim=0, eps=_tiny(matrix))
    return torch.dot(u, matrix @ v)


def _tiny(matrix: Tensor) -> float:
    return torch.finfo(matrix.dtype).tiny
