"""Manifolds on which matrix parameters live, and the tag that says so.

A layer declares the manifold of its weight with `declare`; the tag sits on the Parameter, survives
DeepSpeed's `zero.Init`, and is read by `manifold_of`. Shapes are never asked: under `zero.Init` a
partitioned parameter has shape (0,).

The optimizer needs X^T G, the gradient of Loss(X (I + A)) with respect to A at zero: the gradient G
in the left trivialization of the group. A layer whose backward pass has it at hand declares so, and
delivers it as the parameter's gradient once it is asked (`ask_trivialized`); else it delivers G.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from optim.errors import OptimizerError
from optim.matmul import Precision, float32_products, product, symmetric_product
from optim.matrix_exp import Expected, Move
from optim.retraction import RetractionRule, corrected, retract, retraction_move

TensorT = TypeVar("TensorT", bound=Tensor)

_MAX_POLAR_ITERATIONS = 100


class Manifold(Protocol):
    """A matrix manifold with a fixed tangent space (a Lie group acting on the right)."""

    @property
    def name(self) -> str:
        """Name used in messages and files."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise OptimizerError unless a parameter of this shape can live on the manifold."""

    def tangent(self, point: Tensor, gradient: Tensor, precision: Precision = "full") -> Tensor:
        """Lie-algebra gradient of a Euclidean gradient at a point."""

    def algebra_part(self, trivialized: Tensor) -> Tensor:
        """Lie-algebra gradient of a trivialized gradient X^T G."""

    def retract(
        self,
        point: Tensor,
        tangent: Tensor,
        rule: RetractionRule = "spectral",
        precision: Precision = "full",
    ) -> Tensor:
        """Move from the point along a Lie-algebra increment."""

    def move(
        self,
        point: Tensor,
        tangent: Tensor,
        rule: RetractionRule,
        precision: Precision,
        expected: Expected,
    ) -> Move:
        """The same, begun and not finished, inside of `float32_products`."""

    def correct(self, point: Tensor) -> Tensor:
        """Nearer to the manifold, to second order in the distance."""

    def project(self, point: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Nearest point of the manifold, computed in `dtype` (default: the point's)."""

    def residual(self, point: Tensor) -> float:
        """Distance from the defining equation, measured in float64."""

    def random(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniformly distributed point in float64, on the generator's device."""


@dataclass(frozen=True)
class Orthogonal:
    """The orthogonal group O(n): square X with X^T X = I, acting as y = X x."""

    name: str = "orthogonal"

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise OptimizerError unless `shape` is that of a square matrix."""
        if len(shape) != 2 or shape[0] != shape[1]:
            raise OptimizerError(
                f"an orthogonal matrix must be square and two-dimensional, got shape {shape}"
            )

    def tangent(self, point: Tensor, gradient: Tensor, precision: Precision = "full") -> Tensor:
        """skew(X^T G), the gradient in so(n) for increments that multiply X on the right.

        Args:
            point: X (n, n).
            gradient: Euclidean gradient G = dLoss/dX (n, n).
            precision: Of the product in float32. It changes the direction and never the manifold.

        Returns:
            (n, n), skew bit by bit: the entries (i, j) and (j, i) are exact negatives.
        """
        with float32_products(precision):
            return self.algebra_part(product(point.mT, gradient, precision))

    def algebra_part(self, trivialized: Tensor) -> Tensor:
        """skew(X^T G) of X^T G (n, n), skew bit by bit."""
        # A transposed copy is five times faster than a difference with a transposed operand.
        transposed = trivialized.mT.contiguous()
        return torch.sub(trivialized, transposed, out=transposed).mul_(0.5)

    def retract(
        self,
        point: Tensor,
        tangent: Tensor,
        rule: RetractionRule = "spectral",
        precision: Precision = "full",
    ) -> Tensor:
        """X exp(D), or what `optim.retraction` takes for it; point and tangent are (n, n)."""
        return retract(point, tangent, rule, precision)

    def move(
        self,
        point: Tensor,
        tangent: Tensor,
        rule: RetractionRule,
        precision: Precision,
        expected: Expected,
    ) -> Move:
        """`retract` as a move, whose norms may wait for those of others (`optim.matrix_exp`)."""
        return retraction_move(point, tangent, rule, precision, expected)

    def correct(self, point: Tensor) -> Tensor:
        """One Newton-Schulz step from a point (n, n) near the group, in the point's dtype."""
        return corrected(point)

    def project(self, point: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Orthogonal polar factor of X by the Newton-Schulz iteration X <- X (3I - X^T X) / 2.

        Iterates until the residual no longer falls, at the size of round-off: no longer halves. A
        point whose residual does not prove ||X^T X - I||_2 < 1 is first scaled to spectral norm at
        most 1 (the polar factor does not change), so the iteration never converges to a wrong
        sign.

        Args:
            point: X (n, n), far from singular.
            dtype: float32 or float64 of the arithmetic and the result; default X's own.

        Returns:
            A new (n, n) tensor of `dtype`.

        Raises:
            OptimizerError: The residual stays above the round-off of `dtype`: X is singular or not
                finite.
        """
        self.check_shape(tuple(point.shape))
        X = point.to(dtype or point.dtype, copy=True)
        if X.dtype not in (torch.float32, torch.float64):
            raise OptimizerError(f"polar factor needs float32 or float64, got {X.dtype}")
        n = X.shape[0]
        limit = 4 * n * torch.finfo(X.dtype).eps
        with float32_products():  # in TF32 the iteration stalls at 1e-2
            X, start, residual = _newton_schulz(X, limit)
        if not residual <= limit:
            raise OptimizerError(
                f"polar projection of a {n}x{n} matrix does not converge: residual "
                f"||X^T X - I||_F {start:.3g} at the start, {residual:.3g} at the end, "
                f"limit {limit:.3g} in {X.dtype}"
            )
        return X

    def residual(self, point: Tensor) -> float:
        """||X^T X - I||_F in float64 (in float32 its own rounding would be measured)."""
        return float(torch.linalg.matrix_norm(_defect(point.detach().to(torch.float64))))

    def random(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Haar-distributed rotation in SO(n): QR of a Gaussian matrix, signs and det fixed.

        Args:
            shape: (n, n).
            generator: Source of randomness; decides the device.

        Returns:
            (n, n) float64, contiguous, determinant +1.
        """
        self.check_shape(shape)
        # Inside zero.Init constructors ignore `dtype`, so the cast comes before the filling.
        gaussian = torch.empty(shape, device=generator.device).double().normal_(generator=generator)
        Q, R = torch.linalg.qr(gaussian)
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
        # slogdet: the product of the pivots would underflow at large n.
        if float(torch.linalg.slogdet(Q).sign) < 0:
            Q[:, -1] = -Q[:, -1]
        return Q.contiguous()


ORTHOGONAL = Orthogonal()


def declare(parameter: TensorT, manifold: Manifold, *, trivializes: bool = False) -> TensorT:
    """Tag a parameter with the manifold it lives on.

    Args:
        parameter: To be tagged.
        manifold: On which it lives.
        trivializes: Whether every use of the parameter reads `is_trivialized` and then delivers
            X^T G as its gradient.

    Returns:
        The parameter.
    """
    parameter.manifold = manifold  # type: ignore[attr-defined]
    if trivializes:
        parameter.trivialized = False  # type: ignore[attr-defined]
    return parameter


def manifold_of(parameter: Tensor) -> Manifold | None:
    """The declared manifold of a parameter; None means Euclidean."""
    return getattr(parameter, "manifold", None)


def can_trivialize(parameter: Tensor) -> bool:
    """Whether the layer of a parameter delivers X^T G in place of its gradient when asked."""
    return hasattr(parameter, "trivialized")


def ask_trivialized(parameter: Tensor, wanted: bool) -> None:
    """Ask for X^T G as the gradient of a parameter, or for G again; no effect where it cannot be.

    The sum of several gradients, of micro-batches or ranks, has the form of each.
    """
    if can_trivialize(parameter):
        parameter.trivialized = wanted  # type: ignore[attr-defined]


def is_trivialized(parameter: Tensor) -> bool:
    """Whether the gradient of a parameter is X^T G; never so unless it was asked for."""
    return getattr(parameter, "trivialized", False)


class _Trivialized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        ctx.save_for_backward(X)
        return X.view_as(X)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        # Through itself: what gradients of gradients deliver to X has the same form.
        return trivialized(X).mT @ gradients[0]


def trivialized(X: Tensor) -> Tensor:
    """X itself; a gradient G of it arrives at X as X^T G, to any order of differentiation."""
    return cast(Tensor, _Trivialized.apply(X))


def _newton_schulz(X: Tensor, limit: float) -> tuple[Tensor, float, float]:
    """The last iterate whose residual fell, and the residuals at the start and there.

    Below `limit` a residual that did not halve is round-off: another iteration costs two products
    and gains nothing.
    """
    E = _defect(X)
    start = residual = float(torch.linalg.matrix_norm(E))
    if residual >= 1.0:
        E.diagonal().add_(1.0)
        norm_2_squared = torch.linalg.matrix_norm(E, ord=1)  # an upper bound of it
        X = X / norm_2_squared.sqrt()
        E = _defect(X)
        residual = float(torch.linalg.matrix_norm(E))
    for _ in range(_MAX_POLAR_ITERATIONS):
        candidate = torch.addmm(X, X, E, alpha=-0.5)
        E = _defect(candidate)
        before, fallen = residual, float(torch.linalg.matrix_norm(E))
        if not fallen < before:
            break
        X, residual = candidate, fallen
        if before / 2 < fallen <= limit:
            break
    return X, start, residual


def _defect(X: Tensor) -> Tensor:
    """X^T X - I."""
    E = symmetric_product(X.mT, X)
    E.diagonal().sub_(1.0)
    return E
