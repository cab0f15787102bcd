"""Convolutions with zero padding in float64, as products of matrices."""

import numpy as np

from model.verifier.mathematics.rounding import Floats


def convolve(x: Floats, kernel: Floats, *, stride: int = 1, padding: int = 0) -> Floats:
    """Cross-correlation of (B, c, H, W) with (o, c, k, k), as networks mean it."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    side = kernel.shape[-1]
    # (B, c, h, w, k, k) to one matrix of (c, k, k) rows and (B, h, w) columns.
    seen = np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))
    seen = seen[:, :, ::stride, ::stride]
    b, c, height, width = seen.shape[:4]
    columns = seen.transpose(1, 4, 5, 0, 2, 3).reshape(c * side**2, -1)
    y = (kernel.reshape(len(kernel), -1) @ columns).reshape(len(kernel), b, height, width)
    return y.swapaxes(0, 1)


def adjoint(
    y: Floats, kernel: Floats, shape: tuple[int, int], *, stride: int = 1, padding: int = 0
) -> Floats:
    """The transposed map of `convolve`: (B, o, h, w) to (B, c, *shape)."""
    height, width = y.shape[2:]
    x = np.zeros((len(y), kernel.shape[1], *(n + 2 * padding for n in shape)))
    for a, b in np.ndindex(*kernel.shape[2:]):
        rows = slice(a, a + stride * (height - 1) + 1, stride)
        columns = slice(b, b + stride * (width - 1) + 1, stride)
        x[:, :, rows, columns] += np.tensordot(y, kernel[:, :, a, b], (1, 0)).transpose(0, 3, 1, 2)
    return x[:, :, padding : padding + shape[0], padding : padding + shape[1]]


def transposed(kernel: Floats) -> Floats:
    """Filter of the transposed map: channels swapped, both spatial axes flipped."""
    return np.ascontiguousarray(kernel.swapaxes(0, 1)[:, :, ::-1, ::-1])


def gram(kernel: Floats) -> Floats:
    """Filter (r, r, 2k - 1, 2k - 1) of V V^T on the infinite grid, V the filter (r, c, k, k)."""
    rows, side = len(kernel), kernel.shape[-1]
    wide = np.pad(kernel, ((0, 0), (0, 0), (side - 1, side - 1), (side - 1, side - 1)))
    flat = kernel.reshape(rows, -1)
    G = np.empty((rows, rows, 2 * side - 1, 2 * side - 1))
    for a in range(2 * side - 1):
        for b in range(2 * side - 1):
            G[:, :, a, b] = flat @ wide[:, :, a : a + side, b : b + side].reshape(rows, -1).T
    return G


def space_to_depth(x: Floats, side: int) -> Floats:
    """Squares of pixels to channels: (B, C, H, W) to (B, C * side^2, H / side, W / side)."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // side, side, w // side, side)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, c * side**2, h // side, w // side)
