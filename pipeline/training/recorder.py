"""Records of training: what the steps since the last one came to, on all ranks together."""

import time
from collections.abc import Sequence

from torch import Tensor

from data_shards.streaming.stream import SampleStream
from data_shards.streaming.webdataset_stream import UnindexedStream
from pipeline.run.distributed import DistributedContext
from pipeline.run.events import Emit, Metrics
from pipeline.run.worker_spec import TrainState
from pipeline.training.hooks import Hook, Record
from pipeline.training.metric_reducer import SAMPLES, Metric, MetricReducer, Reduction
from pipeline.training.schedules import StepContext

_WAITED_S = "seconds waited for data"
_METRICS = (
    Metric("data/retries", Reduction.SUM),
    Metric("data/damaged", Reduction.SUM),
    Metric(_WAITED_S, Reduction.PER_RANK),
)


class Recorder:
    """Adds up steps and makes records of them.

    Args:
        world: the ranks; all construct it together.
        statistics: what the tensor of a step holds, see MetricReducer.
        stream: where the samples come from.
        hooks: add metrics of their own.
        global_batch: samples of a step over all ranks.
        peak_lr: learning rate at the factor 1.
        emit: receives Metrics.
    """

    def __init__(
        self,
        *,
        world: DistributedContext,
        statistics: Sequence[Metric],
        stream: SampleStream | UnindexedStream,
        hooks: Hook,
        global_batch: int,
        peak_lr: float,
        emit: Emit,
    ) -> None:
        self._stream, self._hooks, self._emit = stream, hooks, emit
        self._ranks, self._global_batch, self._peak_lr = world.size, global_batch, peak_lr
        self._reducer = MetricReducer(statistics, (*_METRICS, *hooks.metrics), world)
        self._skipped = self._skipped_before = 0
        self._since, self._waited_s, self._saving_s = time.perf_counter(), 0.0, 0.0
        self._records: list[Metrics] = []
        self._older_records: list[Metrics] = []

    def add(self, sums: Tensor | None) -> None:
        """Count a step: its statistics, None if no rank has taken it."""
        if sums is None:
            self._skipped += 1
        else:
            self._reducer.add(sums)

    def add_saving(self, seconds: float) -> None:
        """Training has waited so long for a checkpoint."""
        self._saving_s += seconds

    def record(self, now: StepContext, state: TrainState) -> Record:
        """Reduce what was counted over the ranks, emit it, and begin anew.

        Ranks: all call it together.

        Args:
            now: of the last step.
            state: after it.

        Returns:
            What was emitted, with what the hooks ask of the loop.
        """
        reduced = self._reducer.reduce(
            {
                # Since the ranks started; the wait since the last record.
                "data/retries": self._stream.retries,
                "data/damaged": self._stream.damaged.total(),
                _WAITED_S: self._stream.waited_s - self._waited_s,
                **self._hooks.local_metrics(),
            }
        )
        record = Record(state.step, reduced, dict(reduced.recorded))
        # Before the clock is read: what hooks do is time of the run.
        self._hooks.on_record(record)
        passed, samples = time.perf_counter() - self._since, reduced.values[SAMPLES]
        waits = reduced.per_rank[_WAITED_S]
        record.values |= {
            "train/eps": now.eps,
            "train/lr": self._peak_lr * now.lr_factor,
            "train/images_per_s": samples / max(passed, 1e-9),
            "train/epoch": float(state.cursor.epoch),
            "train/skipped": float(self._skipped),
            "data/wait_s": sum(waits) / self._ranks,
        }
        # The rank that waited longest made the others wait in the next collective.
        productive = self._productive(passed - max(waits) - self._saving_s, samples)
        self._begin()
        told = Metrics(state.step, record.values, int(time.time() * 1000), productive)
        self._records.append(told)
        self._emit(told)
        return record

    def rolled_back(self) -> None:
        """Forget the steps that do not count; the checkpoint has the records of those before."""
        self._reducer.clear()
        self._begin()
        self._records = []

    def take_records(self) -> tuple[Metrics, ...]:
        """For a checkpoint: those since the last one, and those of the interval before."""
        records = (*self._older_records, *self._records)
        self._older_records, self._records = self._records, []
        return records

    def _begin(self) -> None:
        self._since, self._saving_s = time.perf_counter(), 0.0
        self._skipped_before = self._skipped
        self._waited_s = self._stream.waited_s

    def _productive(self, seconds: float, samples: float) -> float:
        """See Metrics; `samples` are those of the steps that were taken."""
        taken = samples / self._global_batch
        # A skipped step took its time as any other, and has no effect: its share is lost.
        steps = taken + self._skipped - self._skipped_before
        return max(0.0, seconds) * taken / max(steps, 1)
