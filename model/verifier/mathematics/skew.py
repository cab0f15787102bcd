"""Skew-symmetric filters J = (W - W^T) / 2: docs/explanation/families.md, SOC."""

import numpy as np

from model.verifier.mathematics.convolution import transposed
from model.verifier.mathematics.matrix_bounds import (
    MatrixBounds,
    frobenius,
    lower_bound,
    upper_bound,
)
from model.verifier.mathematics.rounding import ROUND_UP, Floats, U


def skew(W: Floats) -> Floats:
    """J, the filter of (W - W^T) / 2."""
    return (W - transposed(W)) / 2


def bounds_of_filter(W: Floats) -> MatrixBounds:
    """Each pixel lies in k^2 patches, so ||J|| <= k ||R|| for its reshapes R, on any image."""
    J, C, side = skew(W), len(W), W.shape[-1]
    wide = J.reshape(C, -1)
    tall = J.transpose(0, 2, 1, 3).reshape(C * side, -1)
    # An entry of J is rounded once.
    upper = side * (min(upper_bound(wide), upper_bound(tall)) + 2 * U * frobenius(wide))
    upper *= ROUND_UP
    magnitude = (np.abs(W) + transposed(np.abs(W))) / 2
    absolute = float(magnitude.sum(axis=(1, 2, 3)).max()) * ROUND_UP
    return MatrixBounds(upper, lower_bound(wide), absolute, frobenius(wide) * ROUND_UP)


def power_over_factorial(nu: float, n: int) -> float:
    """nu^n / n!, rounded up; infinite where it overflows."""
    product = 1.0
    for k in range(1, n + 1):
        product *= nu / k
    return product * ROUND_UP
