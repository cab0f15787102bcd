"""Convolutions whose norm is free: K and I + R, zero padded, with a stride.

See docs/explanation/families.md.

Folding s x s pixels into channels turns K into a kernel of stride 1. The padded image lies on a
torus just large enough that nothing wraps around, so ||K|| is at most the largest norm of K^(f),
the matrix of channels that the circular convolution has at frequency f.
"""

import math

import numpy as np

from model.verifier.mathematics.convolution import adjoint, convolve
from model.verifier.mathematics.eigen_bounds import largest_eigenvalues, multiply
from model.verifier.mathematics.matrix_bounds import schur
from model.verifier.mathematics.rounding import ROUND_UP, Floats, U, gamma

WHOLE = 2048
"""Operators with at most so many inputs or outputs are bounded as one matrix, too."""
STEPS = 30
"""Of the observed norm."""
_ENTRIES_AT_ONCE = 1 << 24


def folded(kernel: Floats, stride: int) -> Floats:
    """Filter (o, c s^2, k', k') of stride 1, k' = ceil(k / s), on pixels folded into channels."""
    o, c, k, _ = kernel.shape
    taps = -(-k // stride)
    more = taps * stride - k
    wide = np.pad(kernel, ((0, 0), (0, 0), (0, more), (0, more)))
    wide = wide.reshape(o, c, taps, stride, taps, stride).transpose(0, 1, 3, 5, 2, 4)
    return wide.reshape(o, c * stride**2, taps, taps)


def norm_bound(
    kernel: Floats, sizes: Floats, shape: tuple[int, int], stride: int, padding: int
) -> float:
    """A number >= ||K|| for images of that height and width.

    Args:
        kernel: K, shape (o, c, k, k).
        sizes: sum of the sizes of the terms of every entry of K, of the same shape.
        shape: of the image.
        stride: of the convolution.
        padding: zeros on every side.
    """
    small = folded(kernel, stride)
    side = kernel.shape[-1]
    grid = [(n + 2 * padding - side) // stride + 1 for n in shape]
    terms = folded(sizes, stride).sum(axis=(2, 3))
    taps = small.shape[-1]
    torus = [n + taps - 1 if taps > 1 else 1 for n in grid]
    # exp(i theta) within 64 u, an entry of K within 8 u of its terms, and the sum over taps.
    wrong = (72 * U + gamma(4 * taps**2 + 4, U)) * float(np.sqrt(np.square(terms).sum()))
    bound = math.sqrt(_largest_on_torus(small, torus)) + wrong * ROUND_UP
    inputs, outputs = kernel.shape[1] * math.prod(shape), len(kernel) * math.prod(grid)
    if min(inputs, outputs) <= WHOLE:
        matrix = np.empty((1, inputs, outputs))
        at_once = max(1, _ENTRIES_AT_ONCE // (kernel[0].size * math.prod(grid)))
        for start in range(0, inputs, at_once):
            units = np.eye(min(at_once, inputs - start), inputs, start)
            images = units.reshape(-1, kernel.shape[1], *shape)
            part = convolve(images, kernel, stride=stride, padding=padding)
            matrix[0, start : start + len(part)] = part.reshape(len(part), -1)
        whole = math.sqrt(float(largest_eigenvalues(matrix)[0]))
        whole += 8 * U * math.sqrt(math.prod(grid)) * float(np.sqrt(np.square(sizes).sum()))
        bound = min(bound, whole)
    return bound * ROUND_UP**2


def observed_norm(kernel: Floats, shape: tuple[int, int], stride: int, padding: int) -> float:
    """A number <= ||K||, close to it: the largest Ritz value of 30 Golub-Kahan steps.

    K v_j = alpha_j u_j + beta_j u_(j-1) and K^T u_j = alpha_j v_j + beta_(j+1) v_(j+1), u and v
    orthonormal: K is a bidiagonal matrix on what they span.
    """
    v = np.cos(np.arange(1, kernel.shape[1] * math.prod(shape) + 1, dtype=np.float64))
    v = v.reshape(1, kernel.shape[1], *shape)
    alphas, betas, u, rest = [], [_size(v)], np.zeros(1), v
    for _ in range(STEPS):
        v = rest / betas[-1]
        u = convolve(v, kernel, stride=stride, padding=padding) - betas[-1] * u
        alphas.append(_size(u))
        if not 0 < alphas[-1] < math.inf:
            break
        u = u / alphas[-1]
        rest = adjoint(u, kernel, shape, stride=stride, padding=padding) - alphas[-1] * v
        betas.append(_size(rest))
        if not 0 < betas[-1] < math.inf:
            break
    B = np.diag(alphas) + np.diag(betas[1 : len(alphas)], 1)
    return float(np.linalg.norm(B, 2)) * (1 - 2.0**-30) if np.isfinite(B).all() else 0.0


def _size(x: Floats) -> float:
    return float(np.sqrt(np.square(x).sum()))


def absolute_bound(sizes: Floats, stride: int) -> float:
    """Schur's bound of the sizes of the terms, summed over the taps of the folded kernel."""
    return schur(folded(sizes, stride).sum(axis=(2, 3)))


def _largest_on_torus(kernel: Floats, torus: list[int]) -> float:
    """Largest ||K^(f)||^2; opposite frequencies of a real kernel are conjugate."""
    height, width = torus
    taps = np.arange(kernel.shape[-1])
    rows = np.exp(-2j * np.pi * (np.outer(np.arange(height), taps) % height) / height)
    columns = np.exp(-2j * np.pi * (np.outer(np.arange(width // 2 + 1), taps) % width) / width)
    flat, largest = kernel.reshape(-1, len(taps) ** 2), 0.0
    at_once = max(1, _ENTRIES_AT_ONCE // (kernel.shape[0] * kernel.shape[1] * len(columns)))
    for start in range(0, height, at_once):
        part = rows[start : start + at_once]
        phases = part[:, None, :, None] * columns[None, :, None, :]
        matrices = multiply(phases.reshape(-1, flat.shape[1]), flat.T)
        matrices = matrices.reshape(-1, *kernel.shape[:2])
        largest = max(largest, float(largest_eigenvalues(matrices).max()))
    return largest
