"""Metrics of the ranks: declared once by name, reduced together in one tensor, read by name.

What is measured: `STATISTICS` in `metrics.py`, and `metrics` of hooks.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext

SAMPLES = "samples"
"""Name of the statistic that counts the samples of the steps that were taken."""


class Reduction(enum.Enum):
    """What becomes of the values of all ranks."""

    MEAN = enum.auto()
    """Their sum by the number of samples; absent where no step was taken."""
    SUM = enum.auto()
    MAX = enum.auto()
    PER_RANK = enum.auto()
    """A list of all of them, in the order of the ranks; for hooks, in no record."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that every rank has.

    Attributes:
        name: as the tracker shows it, e.g. `train/loss`.
        reduction: over the ranks.
        recorded: whether records show it; else it is for hooks alone.
    """

    name: str
    reduction: Reduction
    recorded: bool = True


@dataclasses.dataclass(frozen=True)
class Reduced:
    """Metrics over all ranks, the same on every rank.

    Attributes:
        values: by name.
        per_rank: values of every rank, by name, of metrics with Reduction.PER_RANK.
        recorded: those of `values` that records show.
    """

    values: dict[str, float]
    per_rank: dict[str, list[float]]
    recorded: dict[str, float]


class MetricReducer:
    """Adds up the statistics of steps and reduces them, with other metrics, over the ranks.

    Args:
        statistics: what the tensors given to `add` hold, in this order; one of them is SAMPLES.
        metrics: numbers that a rank states when it is asked to reduce.
        world: the ranks; all declare the same.

    Raises:
        PipelineError: a name is declared twice, or a statistic is neither a mean nor a sum.
    """

    def __init__(
        self, statistics: Sequence[Metric], metrics: Sequence[Metric], world: DistributedContext
    ) -> None:
        self._statistics, self._metrics, self._world = tuple(statistics), tuple(metrics), world
        names = [metric.name for metric in (*statistics, *metrics)]
        for name in names:
            if names.count(name) > 1:
                raise PipelineError(f"metric {name!r} is declared {names.count(name)} times")
        for metric in statistics:
            if metric.reduction not in (Reduction.MEAN, Reduction.SUM):
                raise PipelineError(
                    f"statistic {metric.name!r} has reduction {metric.reduction.name}: what a step "
                    "returns is added up, so only MEAN and SUM are possible"
                )
        self._sums = torch.zeros(len(statistics), device=world.device)

    def add(self, sums: Tensor) -> None:
        """Add the statistics of a step, shape (number of statistics,); no device is asked."""
        self._sums += sums

    def clear(self) -> None:
        """Forget what was added."""
        self._sums.zero_()

    def reduce(self, local: Mapping[str, float]) -> Reduced:
        """Reduce what was added, and the metrics of this rank, over all ranks; then begin anew.

        Ranks: all call it together.

        Args:
            local: this rank's value of every declared metric.

        Raises:
            PipelineError: a metric was declared and has no value, or the other way round.
        """
        expected = {metric.name for metric in self._metrics}
        if local.keys() != expected:
            names = ", ".join(sorted(local.keys() ^ expected))
            raise PipelineError(f"metrics must be declared and have a value on every rank: {names}")
        stated = [x for metric in self._metrics for x in self._slots(metric, local[metric.name])]
        # One collective for everything, and one wait for the device: statistics stay there until
        # now. Their type is float32, in which the counts of a record are exact up to 2^24.
        here = torch.tensor(stated, dtype=torch.float32, device=self._sums.device)
        row = torch.cat([self._sums, here])
        dist.all_reduce(row)
        self.clear()
        return self._unpack(row.tolist())

    def _slots(self, metric: Metric, value: float) -> list[float]:
        """What a rank adds to the row: of a slot per rank it fills its own."""
        if not _has_slots(metric):
            return [value]
        return [value if rank == self._world.rank else 0.0 for rank in range(self._world.size)]

    def _unpack(self, row: list[float]) -> Reduced:
        declared, numbers = (*self._statistics, *self._metrics), iter(row)
        taken = {
            m.name: [next(numbers) for _ in range(self._world.size if _has_slots(m) else 1)]
            for m in declared
        }
        (samples,) = taken[SAMPLES]
        values = {}
        for metric in declared:
            found = taken[metric.name]
            if metric.reduction is Reduction.MEAN and samples:
                values[metric.name] = found[0] / samples
            elif metric.reduction is Reduction.SUM:
                values[metric.name] = found[0]
            elif metric.reduction is Reduction.MAX:
                values[metric.name] = max(found)
        recorded = {m.name: values[m.name] for m in declared if m.recorded and m.name in values}
        per_rank = {m.name: taken[m.name] for m in declared if m.reduction is Reduction.PER_RANK}
        return Reduced(values, per_rank, recorded)


def _has_slots(metric: Metric) -> bool:
    """A sum cannot find a maximum, so each rank has a slot of its own for these."""
    return metric.reduction in (Reduction.MAX, Reduction.PER_RANK)
