"""Proved bounds of strided, zero-padded convolutions (docs/explanation/families.md).

Pixels s x s become channels: a kernel (o, c, k, k) of stride s is one of stride 1, of shape
(o, c s^2, k', k') with k' = ceil(k / s). The padded image lies on a torus of its own size, where
the convolution is circular and its norm is the largest of one small matrix per frequency; image and
output are parts of the torus, which can only lower the norm.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.certification.dot_products import convolve, folded, output_side
from model.certification.eigen_bounds import proved_norm
from model.certification.matrix_bounds import MatrixBound, tensor_digest
from model.certification.rounding import SLACK, U64, gamma
from model.errors import ModelError

_WHOLE = 2048
"""Up to this order the matrix of the whole operator is bounded as well, which is tighter."""
PHASE_ERROR = 64
"""Error of a computed exp(2 pi i t), t = fraction + fraction, in units of roundoff, generously."""


def kernel_bound(
    kernel: Tensor,
    magnitude: Tensor,
    *,
    stored: Tensor,
    name: str,
    stride: int,
    padding: int,
    shape: tuple[int, int],
) -> MatrixBound:
    """Bounds of the operator of a convolution.

    Args:
        kernel: float64 (o, c, k, k), each entry computed with at most 8 roundings.
        magnitude: sizes of what the entries are a sum of, not below |kernel|.
        stored: the parameter, a matrix.
        name: its name.
        stride: step between patches.
        padding: zeros on every side.
        shape: height and width of the images.

    Raises:
        ModelError: an entry is not finite.
    """
    if not bool(kernel.isfinite().all()):
        raise ModelError(f"{name} holds values that are not finite")
    small = folded(kernel, stride)
    sizes = folded(magnitude, stride).sum((2, 3))
    sides = [output_side(n, kernel.shape[-1], stride, padding) for n in shape]
    upper = _torus_bound(small, sizes, (sides[0], sides[1]))
    image = kernel.shape[1] * math.prod(shape)
    if min(image, kernel.shape[0] * math.prod(sides)) <= _WHOLE:
        basis = torch.eye(image, dtype=kernel.dtype, device=kernel.device)
        columns = convolve(
            basis.view(image, -1, *shape), kernel, stride=stride, padding=padding
        ).flatten(1)
        slip = 8 * U64 * float(magnitude.norm()) * math.sqrt(math.prod(sides))
        upper = min(upper, (proved_norm(columns) + slip) * SLACK)
    return MatrixBound(
        name=name,
        shape=(stored.shape[0], stored.shape[1]),
        sha256=tensor_digest(stored),
        upper=upper,
        lower=_observed(kernel, stride, padding, shape),
        absolute=math.sqrt(float(sizes.sum(0).max()) * float(sizes.sum(1).max())) * SLACK,
        frobenius=float(magnitude.norm()) * SLACK,
    )


def _torus_bound(kernel: Tensor, sizes: Tensor, sides: tuple[int, int]) -> float:
    """Largest proved norm over the frequencies of the torus; kernel (o, c, k, k) of stride 1."""
    taps = kernel.shape[-1]
    # Without neighbours all frequencies are the same.
    rows, columns = (side + taps - 1 if taps > 1 else 1 for side in sides)
    ticks = torch.arange(taps, device=kernel.device, dtype=torch.float64)
    largest = 0.0
    # A real kernel has the same norm at opposite frequencies.
    for f in range(rows // 2 + 1):
        across = torch.arange(columns, device=kernel.device)[:, None, None] * ticks  # integers
        turn = (f * ticks % rows / rows)[:, None] + across % columns / columns
        phase = torch.polar(torch.ones_like(turn), 2 * math.pi * turn)
        parts = [torch.einsum("ocab,gab->goc", kernel, part) for part in (phase.real, phase.imag)]
        symbols = torch.complex(*parts)
        largest = max(largest, proved_norm(symbols))
    slip = (PHASE_ERROR + 8) * U64 + gamma(4 * taps**2 + 4, U64)
    return (largest + slip * float(sizes.norm())) * SLACK


def _observed(kernel: Tensor, stride: int, padding: int, shape: tuple[int, int]) -> float:
    """Norm of the operator from below, float64."""
    ratio = leading_singular_pair(kernel, stride=stride, padding=padding, shape=shape, steps=30)[2]
    return float(ratio) * (1 - 2.0**-30)


@torch.no_grad()
def leading_singular_pair(
    kernel: Tensor,
    *,
    stride: int,
    padding: int,
    shape: tuple[int, int],
    steps: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors u, v with <u, K v> close to the norm of a convolution, and ||K v||.

    Golub-Kahan bidiagonalisation from a random v, a function of the seed: at the same number of
    products much closer than power iteration, so that nothing has to be kept between steps.

    Args:
        kernel: shape (o, c, k, k), float32 or wider.
        stride: step between patches.
        padding: zeros on every side.
        shape: height and width of the images.
        steps: products with the operator, and with its transpose.
        seed: of the start.

    Returns:
        u (1, o, H', W'), v (1, c, H, W) and the norm, a scalar.
    """
    side = kernel.shape[-1]
    outputs = [output_side(n, side, stride, padding) for n in shape]
    missing = [
        n - ((out - 1) * stride - 2 * padding + side) for n, out in zip(shape, outputs, strict=True)
    ]
    generator = torch.Generator("cpu" if kernel.is_meta else kernel.device).manual_seed(seed)
    start = (1, kernel.shape[1], *shape)
    v = torch.randn(start, generator=generator, device=kernel.device, dtype=kernel.dtype)
    tiny = torch.finfo(kernel.dtype).tiny
    right: list[Tensor] = [v / v.norm()]
    left: list[Tensor] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(steps):
        u = F.conv2d(right[-1], kernel, stride=stride, padding=padding)
        if left:
            u = u - betas[-1] * left[-1]
        alphas.append(u.norm().clamp(min=tiny))
        left.append(u / alphas[-1])
        v = F.conv_transpose2d(
            left[-1], kernel, stride=stride, padding=padding, output_padding=missing
        )
        v = v - alphas[-1] * right[-1]
        betas.append(v.norm().clamp(min=tiny))
        right.append(v / betas[-1])
    bidiagonal = torch.stack(alphas).diag() + torch.stack(betas)[:-1].diag(1)
    best = torch.linalg.svd(bidiagonal).Vh[0]
    v = torch.cat(right[:-1]).mul_(best[:, None, None, None]).sum(0, keepdim=True)
    v = v / v.norm().clamp(min=tiny)
    u = F.conv2d(v, kernel, stride=stride, padding=padding)
    norm = u.norm()
    return u / norm.clamp(min=tiny), v, norm
