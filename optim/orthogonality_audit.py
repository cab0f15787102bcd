"""Orthogonality as an invariant of training: what is measured, what is repaired, what is counted.

At an interval the owner of a matrix measures its residual while it holds it anyway. Past the hard
limit the matrix is re-projected in float64 within the same step; what cannot be projected stops
the run.
"""

import math

import torch
from torch import Tensor

from optim.config import DRIFT_SHARE, OptimConfig
from optim.manifolds import Manifold


class Audit:
    """The residuals found by one optimizer.

    Args:
        config: `audit_every` and `residual_limit`.

    Attributes:
        reprojections: Matrices re-projected since the run began; in every checkpoint.
        drifts: Whether the last audit has found more than DRIFT_SHARE of the limit on some rank.
    """

    def __init__(self, config: OptimConfig) -> None:
        self._every, self._limit = config.audit_every, config.residual_limit
        self._found: dict[str, float] = {}
        self._largest: float | None = None
        self.reprojections = 0
        self.drifts = False

    def due(self, step: int) -> bool:
        """Whether the matrices are measured after this step (from 1)."""
        return self._every > 0 and step % self._every == 0

    def measure(self, name: str, X: Tensor, manifold: Manifold) -> None:
        """Note the residual of an owned matrix; costs one float64 product."""
        self._found[name] = manifold.residual(X)

    def summary(self) -> list[float]:
        """Largest residual just measured on this rank (NaN if one is), and how many are off."""
        found = self._found.values()
        largest = math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
        return [largest, float(sum(map(self._off, found)))]

    def conclude(self, summaries: list[list[float]]) -> int:
        """Take the summaries of all ranks into the record; returns the number that are off."""
        bound = DRIFT_SHARE * self._limit
        self.drifts = any(not row[0] <= bound for row in summaries)  # NaN drifts too
        largest = [row[0] for row in summaries] + [self._largest or 0.0]
        self._largest = math.nan if any(map(math.isnan, largest)) else max(largest)
        off = sum(int(row[1]) for row in summaries)
        self.reprojections += off
        return off

    def repaired(self, name: str, X: Tensor, manifold: Manifold) -> Tensor:
        """The matrix, or its projection in float64 where the last measurement is off.

        Raises:
            OptimizerError: It cannot be projected: not finite, or singular.
        """
        off = name in self._found and self._off(self._found[name])
        return manifold.project(X, dtype=torch.float64) if off else X

    def forget(self) -> None:
        """End an audit: the next one begins without measurements."""
        self._found.clear()

    def metrics(self) -> dict[str, float]:
        """Largest residual since the last call and all re-projections; empty without an audit."""
        if self._largest is None:
            return {}
        # Read once: a record shows an audit of its own interval, or none.
        largest, self._largest = self._largest, None
        return {
            "orthogonality/residual_max": largest,
            "orthogonality/reprojections": float(self.reprojections),
        }

    def _off(self, residual: float) -> bool:
        return not residual <= self._limit  # NaN is off too
