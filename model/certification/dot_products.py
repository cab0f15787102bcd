"""Matrix products and convolutions whose rounding is known: every value is a sum of products.

A library may multiply complex matrices with three real products in place of four, and convolve by a
transform of Winograd's kind or a Fourier transform: neither has the error of a dot product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

COMPLEX = 4
"""A complex dot product of k terms errs by at most gamma(4 k) times the sum of its terms' sizes."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices, of complex ones by real products of their parts.

    Args:
        a: shape (..., m, k), real or complex.
        b: shape (..., k, n), real or complex, of the same precision.
    """
    if a.is_complex() and b.is_complex():
        real = a.real @ b.real - a.imag @ b.imag
        return torch.complex(real, a.real @ b.imag + a.imag @ b.real)
    if a.is_complex():
        return torch.complex(a.real @ b, a.imag @ b)
    if b.is_complex():
        return torch.complex(a @ b.real, a @ b.imag)
    return a @ b


def folded(kernel: Tensor, stride: int) -> Tensor:
    """The kernel (o, c, k, k) as one of stride 1, (o, c stride^2, k', k')."""
    extra = -kernel.shape[-1] % stride
    return F.pixel_unshuffle(F.pad(kernel, (0, extra, 0, extra)), stride)


def output_side(side: int, kernel: int, stride: int, padding: int) -> int:
    """Side of the output of a convolution."""
    return (side + 2 * padding - kernel) // stride + 1


def convolve(x: Tensor, kernel: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution as matrix products, one for each tap of the folded kernel.

    Summed in float32 or wider and rounded to the type of x once.

    Args:
        x: shape (B, c, H, W).
        kernel: shape (o, c, k, k), of the type of x.
        stride: step between patches.
        padding: zeros on every side.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    small = folded(kernel.to(wide), stride)
    taps = small.shape[-1]
    sides = [output_side(n, kernel.shape[-1], stride, padding) for n in x.shape[-2:]]
    after = [
        stride * (out + taps - 1) - n - padding for out, n in zip(sides, x.shape[-2:], strict=True)
    ]
    patches = F.pixel_unshuffle(F.pad(x.to(wide), (padding, after[1], padding, after[0])), stride)
    y = patches.new_zeros(())
    for a in range(taps):
        for b in range(taps):
            part = patches[:, :, a : a + sides[0], b : b + sides[1]]
            y = y + torch.einsum("oc,bchw->bohw", small[:, :, a, b], part)
    return y.to(x.dtype)


def transposed(kernel: Tensor) -> Tensor:
    """Filter of the transposed map: channels swapped, both spatial axes flipped; a copy."""
    # A transposed copy first: arithmetic on a transposed view reads memory in steps of rows.
    if kernel.shape[-1] == 1:
        return kernel[:, :, 0, 0].mT.contiguous()[:, :, None, None]
    swapped = kernel.transpose(0, 1).contiguous()
    return swapped.flatten(2).flip(2).view_as(swapped)
