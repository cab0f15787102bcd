"""Proved upper bounds of the spectral norm of a stored matrix."""

import math

import torch
from torch import Tensor

from model.errors import ModelError

_U = 2.0**-53
"""Unit roundoff of float64."""


def up(value: float) -> float:
    """The next float64 above: turns a result rounded to nearest into an upper bound."""
    return math.nextafter(value, math.inf)


def _down(value: float) -> float:
    return math.nextafter(value, -math.inf)


def _gamma(n: int) -> float:
    """Upper bound of gamma_n = n u / (1 - n u)."""
    return up(n * _U / (1 - n * _U))  # n u and 1 - n u are exact


def spectral_norm_bound(matrix: Tensor, name: str) -> float:
    """Upper bound of the spectral norm: sqrt(1 + ||X^T X - I||_F), every rounding covered.

    Tight for nearly orthogonal X only. With G the float64 product X^T X,
    ||G - X^T X||_F <= e_G = n gamma_n max_j ||x_j||^2.

    Args:
        matrix: X, shape (n, n), any floating type; its entries are exact in float64.
        name: name of the matrix, for the error.

    Raises:
        ModelError: an entry is not finite.
    """
    x = matrix.detach().to(torch.float64)
    n = x.shape[0]
    gram = x.mT @ x
    # max_j ||x_j||^2 <= max_j G_jj / (1 - gamma_n)
    largest = up(float(gram.diagonal().max()) / _down(1 - _gamma(n)))
    gram.diagonal().sub_(1)
    # The computed Frobenius norm is a sum of n^2 squares in unknown order: error below gamma_{n^2}.
    # Squares that underflow change it by less than n * 1e-153, far inside the steps of `up`.
    frobenius = up(float(torch.linalg.matrix_norm(gram)))
    frobenius = up(frobenius * up(1 + _gamma(n * n + 4)))
    error = up(up(n * _gamma(n)) * largest)
    bound = up(math.sqrt(up(1 + up(frobenius + error))))
    if not math.isfinite(bound):
        raise ModelError(f"{name} holds values that are not finite")
    return bound
