"""Discrete Fourier transforms of images, by a library's FFT or by products with known rounding."""

import math

import torch
from torch import Tensor

from model.certification.dot_products import COMPLEX, product
from model.certification.rounding import Program, gamma

PHASE_ERROR = 64
"""Error of a computed exp(2 pi i t), |t| <= 2, in units of roundoff, generously."""


def spectrum(images: Tensor, *, fast: bool) -> Tensor:
    """Unitary transform of real images (..., H, W): the half (..., H, W // 2 + 1) that says all.

    Args:
        images: real.
        fast: by an FFT, whose rounding is the library's; otherwise by products.
    """
    if fast:
        return torch.fft.rfft2(images, norm="ortho")
    rows, columns = _waves(images.shape[-2], images), _waves(images.shape[-1], images)
    half = images.shape[-1] // 2 + 1
    return product(rows, product(images, columns[:, :half]))


def images_of(half: Tensor, width: int, *, fast: bool) -> Tensor:
    """Inverse of `spectrum`: real images (..., H, width)."""
    if fast:
        return torch.fft.irfft2(half, s=(half.shape[-2], width), norm="ortho")
    rows, columns = _waves(half.shape[-2], half), _waves(width, half)
    # All columns but the first and, for an even width, the last stand for two.
    count = torch.full((half.shape[-1], 1), 2.0, dtype=columns.real.dtype, device=half.device)
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    back = (columns[:, : half.shape[-1]].mH * count).to(half.dtype)
    return product(product(rows.mH, half), back).real


def _waves(n: int, like: Tensor) -> Tensor:
    """exp(-2 pi i j k / n) / sqrt(n), complex (n, n), of the precision of `like`."""
    ticks = torch.arange(n, device=like.device)
    real = torch.empty(0, dtype=like.dtype).real.dtype
    angle = (ticks[:, None] * ticks % n).to(real) * (-2 * math.pi / n)
    return torch.polar(torch.full_like(angle, n**-0.5), angle)


def entrywise_error(sides: tuple[int, int], program: Program) -> float:
    """Error of an entry of a computed transform, by the sum of sizes that it is made of."""
    one, other = (gamma(COMPLEX * (n + 2), program.wide) + _phase(program) for n in sides)
    return one + other * (1 + one)


def transform_error(sides: tuple[int, int], program: Program) -> float:
    """Error of a transform, or of its inverse, in l2 and relative to the norm of its input.

    The matrix of sizes of a unitary transform of length n has the norm sqrt(n).
    """
    one, other = (
        math.sqrt(n) * (gamma(COMPLEX * (n + 2), program.wide) + _phase(program)) for n in sides
    )
    return one + other * (1 + one)


def _phase(program: Program) -> float:
    return PHASE_ERROR * program.wide
