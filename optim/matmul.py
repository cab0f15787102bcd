"""Matrix products at a stated precision, whatever the process has chosen for float32.

Reduced precision means that the factors are rounded, here and on every device, and that their
products are summed in float32. A factor that is rounded beforehand is multiplied exactly, so the
hardware's own rounding changes nothing, and a device without such products computes the same
algebra slowly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["full", "tf32", "bf16"]
"""Significant bits of a float32 product's factors: all 24, TF32's 11 or bfloat16's 8."""

_UNIT_ROUNDOFF: dict[Precision, float] = {"full": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}
_TF32_SPLITTER = 2.0**13 + 1

_BLOCKS = 4
_SMALLEST = 512


@contextmanager
def float32_products(precision: Precision = "full") -> Iterator[None]:
    """Lets torch's float32 products round their factors in the mode "tf32" and nowhere else."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def unit_roundoff(dtype: torch.dtype, precision: Precision) -> float:
    """Largest relative change u of an entry in `rounded`; 0 where nothing is rounded."""
    return _UNIT_ROUNDOFF[precision] if dtype is torch.float32 else 0.0


def rounded(A: Tensor, precision: Precision) -> Tensor:
    """A to nearest with the precision's bits, sign by sign: a skew matrix stays skew.

    Float64 stays as it is. TF32 by Veltkamp's splitting (Dekker, Numer. Math. 18, 1971): what does
    not fit, above 4e34, becomes NaN.

    Returns:
        A's shape; bfloat16 on CUDA in the mode "bf16", else A's dtype.
    """
    if unit_roundoff(A.dtype, precision) == 0.0:
        return A
    if precision == "bf16":
        low = A.to(torch.bfloat16)
        return low if A.is_cuda else low.float()
    shifted = A * _TF32_SPLITTER
    return shifted.sub_(shifted - A)


def product(P: Tensor, Q: Tensor, precision: Precision = "full") -> Tensor:
    """P Q from rounded factors, in P's dtype: |error| <= (2 u + u^2) |P| |Q| before summation."""
    return _mm(rounded(P, precision), rounded(Q, precision))


def split_product(P: Tensor, Q: Tensor, precision: Precision) -> Tensor:
    """P Q from three products, each factor being the sum of two rounded ones.

    The product of the two remainders is left out, and each remainder is rounded: before summation
    |error| <= 4 u^2 |P| |Q|.
    """
    if unit_roundoff(P.dtype, precision) == 0.0:
        return torch.mm(P, Q)
    high_P, high_Q = rounded(P, precision), rounded(Q, precision)
    # The smallest first; nothing is kept longer than needed.
    sum_ = _mm(rounded(P - high_P, precision), high_Q)
    sum_ += _mm(high_P, rounded(Q - high_Q, precision))
    sum_ += _mm(high_P, high_Q)
    return sum_


def symmetric_product(P: Tensor, Q: Tensor, sign: int = 1) -> Tensor:
    """P Q where that is symmetric, such as X^T X or the square of a skew matrix; or skew.

    Rows are computed from their diagonal block on and mirrored: 5/8 of the work of a product.
    Small products are not worth the cut.

    Args:
        P: (n, n), possibly from `rounded`.
        Q: (n, n), same dtype and device.
        sign: -1 where the product is skew.

    Returns:
        A new (n, n) tensor, symmetric or skew up to the rounding of its diagonal blocks; float32
        for bfloat16 factors, else of their dtype.
    """
    n = P.shape[0]
    if n < _SMALLEST:
        return _mm(P, Q)
    dtype = torch.float32 if Q.dtype is torch.bfloat16 else Q.dtype
    result = torch.empty_like(Q, dtype=dtype, memory_format=torch.contiguous_format)
    for start, stop in pairwise(n * i // _BLOCKS for i in range(_BLOCKS + 1)):
        _mm(P[start:stop], Q[:, start:], out=result[start:stop, start:])
        mirrored = result[stop:, start:stop].copy_(result[start:stop, stop:].mT)
        if sign < 0:
            mirrored.neg_()
    return result


def _mm(P: Tensor, Q: Tensor, out: Tensor | None = None) -> Tensor:
    """P Q with sums and result in float32 where the factors are bfloat16."""
    if P.dtype is not torch.bfloat16:
        return torch.mm(P, Q, out=out)
    sums = torch.mm(P, Q, out_dtype=torch.float32)
    return sums if out is None else out.copy_(sums)
