"""Matrices made orthonormal by a Cholesky factor: the layers of LiResNet++ and BRONet.

With S = X X^* + eta I = L L^* for a matrix X (m, k), m <= k, and eta a small share of the mean of
the diagonal, Q = L^-1 X has Q Q^* = I - eta (L^* L)^-1: no singular value exceeds 1, for any X.

- LiResNet++ (arXiv 2310.02513) applies Q.
- BRONet (arXiv 2505.15174) applies the reflection I - 2 Q^* Q, whose eigenvalues lie in [-1, 1].
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from model.certification.dot_products import COMPLEX, product
from model.certification.eigen_bounds import frobenius, proved_least
from model.certification.matrix_bounds import MatrixBound, tensor_digest
from model.certification.rounding import SLACK, U64, ErrorState, Program, gamma
from model.errors import ModelError

SMALLEST, _LARGEST = 2.0**-10, 2.0**40
"""Between these lie the squared sizes of matrices that are certified."""
_SOLVER = 4
"""gamma_(m + 3) times this is charged for the residuals of a factor and of a solution."""


class _OrthonormalRows(torch.autograd.Function):
    """L^-1 X; X itself is not kept. eta counts as a constant in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, measured: bool) -> Tensor:
        gram = regularised_gram(x, share)
        factor = _factor(gram)
        q = torch.linalg.solve_triangular(factor, x, upper=False)
        if measured:
            _check_residuals(x, gram, factor, q)
        ctx.save_for_backward(factor, q)
        return q

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # dQ = L^-1 dX - Phi(M) Q with M = L^-1 dS L^-*, Phi the lower triangle with half of the
        # diagonal. Transposed: L^-* (G - H Q), H Hermitian with the lower triangle of G Q^*.
        factor, q = ctx.saved_tensors
        lower = (gradient @ q.mH).tril()
        hermitian = lower.tril(-1)
        hermitian = hermitian + hermitian.mH
        hermitian.diagonal(dim1=-2, dim2=-1).copy_(lower.diagonal(dim1=-2, dim2=-1).real)
        result = gradient - hermitian @ q
        return torch.linalg.solve_triangular(factor.mH, result, upper=True), None, None


def _factor(gram: Tensor) -> Tensor:
    try:
        factor: Tensor = torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError as error:
        largest = float(gram.diagonal(dim1=-2, dim2=-1).real.amax())
        raise ModelError(
            f"rows cannot be made orthonormal: X X^* + eta I, shape {tuple(gram.shape)}, has no "
            f"Cholesky factor in {gram.dtype}; the largest square of a row is {largest:.3g}"
        ) from error
    return factor


def orthonormal_rows(x: Tensor, share: float, *, measured: bool = False) -> Tensor:
    """Q = L^-1 X, differentiable once.

    Args:
        x: X, real or complex, shape (..., m, k) with m <= k.
        share: eta as a share of the mean of the diagonal of X X^*, in (0, 1].
        measured: compute the residuals of L and Q as well, for X in float64: `rows_error` charges
            what they may be, so it holds on every device and for every solver.

    Raises:
        ModelError: X is 0, or so small or large that its squares are no numbers of its type; or the
            solver leaves more than is charged for it.
    """
    return _OrthonormalRows.apply(x, share, measured)


def _check_residuals(x: Tensor, gram: Tensor, factor: Tensor, q: Tensor) -> None:
    """L has a positive diagonal, and L L^* - S and L Q - X are as small as `rows_error` charges."""
    m, weight = x.shape[-2], _weight(x.is_complex())
    size, factor = frobenius(x), factor.tril()
    # Both are differences of a product, which is rounded itself.
    rounding = gamma(weight * (m + 1), U64) * frobenius(factor)
    of_gram = frobenius(product(factor, factor.mH) - gram) + rounding * frobenius(factor)
    of_rows = frobenius(product(factor, q) - x) + rounding * frobenius(q)
    charged = _solver_error(m, weight) * size
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    positive = (diagonal.real > 0) & (diagonal.real == diagonal)
    ok = (of_gram * SLACK <= charged * size) & (of_rows * SLACK <= charged * math.sqrt(m))
    if not bool((ok & positive.all(-1)).all()):
        worst = float(torch.maximum(of_gram / size, of_rows / math.sqrt(m)).div(charged).max())
        raise ModelError(
            f"the Cholesky factorisation or the substitution on {x.device} leaves residuals of "
            f"{worst:.3g} times what is charged for them (matrices {tuple(x.shape)}): nothing can "
            "be certified there; evaluate on the CPU"
        )


def _solver_error(m: int, weight: int) -> float:
    """Relative residuals that are charged: of L L^* to ||X||^2, of L Q to ||X|| sqrt(m)."""
    return _SOLVER * gamma(weight * (m + 3), U64)


def regularised_gram(x: Tensor, share: float) -> Tensor:
    """S = X X^* + eta I, shape (..., m, m)."""
    gram = product(x, x.mH)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(share * diagonal.real.mean(-1, keepdim=True))
    return gram


def scaled_rows(weight: Tensor, depth: int) -> Tensor:
    """depth^-1/2 * gain * V, of a parameter (rows, n + 1) that holds V and in its last column gain.

    One parameter, so that one tensor says which operator is meant.
    """
    return weight[:, :-1] * (weight[:, -1:] * depth**-0.5)


ENTRY_ROUNDINGS = 8
"""Roundings of an entry of identity + depth^-1/2 * gain * V, generously."""


def entry_error(program: Program) -> float:
    """Relative error of the parts of such an entry in float64: copies of weights and roundings."""
    copies = 2 * program.weight + program.weight**2
    rounding = gamma(ENTRY_ROUNDINGS, U64)
    return copies + rounding * (1 + copies)


@dataclasses.dataclass(frozen=True)
class ComputedBound(MatrixBound):
    """What is known of a matrix that is computed from a stored one by `orthonormal_rows`.

    `upper` is 1, by construction; `lower` and `absolute` are of Q, `frobenius` of what is stored.
    """

    condition: float
    """Proved: ||S^-1|| times the squared size of the entries that X is made of."""


def computed_bound(
    stored: Tensor, name: str, x: Tensor, *, size: Tensor, defect: float, share: float
) -> ComputedBound:
    """Bounds of a computed matrix.

    Args:
        stored: the parameter, a matrix.
        name: its name.
        x: X in float64, real or complex, shape (..., m, k): one matrix, or one per frequency.
        size: bounds of the squared Frobenius norm of X and of whatever it is a sum of, (...).
        defect: bound of the Frobenius norm of the error of x itself, relative to sqrt(size).
        share: see `orthonormal_rows`.

    Raises:
        ModelError: an entry is not finite, or X is 0.
    """
    if not bool(stored.isfinite().all()):
        raise ModelError(f"{name} holds values that are not finite")
    if not bool(x.abs().amax((-2, -1)).all()):
        raise ModelError(f"{name} makes a matrix of zeros, whose rows cannot be made orthonormal")
    m, k = x.shape[-2:]
    condition, observed = math.inf, 0.0
    if bool(((size >= SMALLEST) & (size <= _LARGEST)).all()):
        gram = regularised_gram(x, share)
        trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        slip = _gram_error(m, k, defect, U64, _weight(x.is_complex()))
        eta = share / (1 + share) * trace / m * (1 - 2.0**-20)
        values = torch.linalg.eigvalsh(gram)
        least = torch.maximum(proved_least(gram, values[..., 0]), eta) - slip * size
        condition = float((size / least.clamp(min=0)).max()) * SLACK
        observed = float((1 - eta / values[..., -1]).clamp(min=0).max().sqrt()) * (1 - 2.0**-18)
    return ComputedBound(
        name=name,
        shape=(stored.shape[0], stored.shape[1]),
        sha256=tensor_digest(stored),
        upper=1.0,
        lower=observed,
        absolute=math.sqrt(m),
        frobenius=float(stored.double().norm()) * SLACK,
        condition=condition,
    )


def _weight(complex_terms: bool) -> int:
    """How many terms of a dot product one of its terms counts as."""
    return COMPLEX if complex_terms else 1


def _gram_error(m: int, k: int, entries: float, unit_roundoff: float, weight: int) -> float:
    """||computed S - S||_F / size, from the error of the entries of X and that of the products."""
    return 4 * (entries + gamma(weight * (k + m + 4), unit_roundoff) * (1 + entries) ** 2)


def rows_error(
    bound: ComputedBound,
    m: int,
    k: int,
    entries: float,
    program: Program,
    *,
    complex_terms: bool = False,
) -> float:
    """||computed Q - Q||, infinite where nothing can be said (docs/explanation/families.md).

    Q is computed in float64, measured, and rounded to what the program computes with.

    Args:
        bound: of the stored matrix.
        m: rows of X.
        k: columns of X.
        entries: error of the computed X in the Frobenius norm, relative to sqrt(size).
        program: the arithmetic.
        complex_terms: X is complex.
    """
    weight, rho = _weight(complex_terms), bound.condition
    solver = _solver_error(m, weight) * (1 + entries) ** 2
    q = rho * (_gram_error(m, k, entries, U64, weight) + solver)
    if not q <= 0.25:
        return math.inf
    moved = math.sqrt(rho) * (entries + solver * math.sqrt(m)) / (1 - q)
    error = q / (1 - q) + moved
    return (error + program.wide * math.sqrt(m) * (1 + error)) * SLACK


def carry_reflection(
    state: ErrorState, *, terms: int, rank: int, error: float, complex_terms: bool = False
) -> None:
    """Carry bounds through x - 2 Q^* (Q x), or some of its rows, with a computed Q.

    Args:
        state: of x; the result replaces it.
        terms: columns of Q.
        rank: rows of Q.
        error: bound of ||computed Q - Q||.
        complex_terms: the products are complex.
    """
    program, size = state.program, state.computed
    factor = _weight(complex_terms)
    spread = math.sqrt(rank) * (1 + error)
    inner = program.product(factor * terms, copies=0, roundings=2) * spread * size
    t = (1 + error) * size + inner
    outer = program.product(factor * rank, copies=0, roundings=3) * spread * t
    last = gamma(4, program.activation) * (size + 2 * spread * t)
    wrong = 2 * error * (2 + error) * size
    state.error = state.error + wrong + 2 * (1 + error) * inner + 2 * outer + last
    state.note(size + 2 * spread * t)
