"""The training loop of one rank; what is not the loop itself joins it as a hook (`hooks.py`)."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from data_shards.streaming.batcher import Batch
from data_shards.streaming.stream import SampleStream
from data_shards.streaming.webdataset_stream import UnindexedStream
from optim.errors import OptimizerError
from pipeline.errors import PipelineError
from pipeline.run.events import Emit, RolledBack, Skipped
from pipeline.run.step_schedule import StepSchedule
from pipeline.run.worker_spec import TrainState
from pipeline.training.hooks import Hook
from pipeline.training.metric_reducer import Metric
from pipeline.training.recorder import Recorder
from pipeline.training.schedules import StepContext


class Engine(Protocol):
    """What the loop needs of the partitioned network.

    Attributes:
        statistics: what the tensor that `step` returns holds, in this order.
    """

    statistics: Sequence[Metric]

    def step(
        self, micro_batches: Iterator[tuple[Tensor, Tensor]], now: StepContext
    ) -> Tensor | None:
        """One optimizer step; returns the sums of `statistics`, None if it was skipped."""
        ...


class RollbackPolicy(Protocol):
    """Decides what follows skipped steps."""

    def too_many(self, skipped_in_a_row: int) -> bool:
        """Whether training cannot go on after so many."""
        ...

    def go_back(self, failed: TrainState, skipped_in_a_row: int) -> tuple[TrainState, RolledBack]:
        """Load the newest checkpoint; PipelineError if that is not allowed (any more)."""
        ...


class Trainer:
    """Runs optimizer steps from `progress` to the end of the plan.

    Args:
        plan: counts of the run.
        context_at: learning-rate factor and training radius of a step.
        engine: takes the steps.
        stream: samples of this rank.
        progress: where training stands.
        recorder: makes records of the steps.
        rollbacks: asked when steps are skipped. No hook, because its answer takes the place of the
            loop's own state: there can only be one.
        hooks: called at the moments that `hooks.py` names.
        emit: receives Skipped and RolledBack.

    Attributes:
        progress: advanced after every step; what a checkpoint stores.
    """

    def __init__(
        self,
        *,
        plan: StepSchedule,
        context_at: Callable[[int], StepContext],
        engine: Engine,
        stream: SampleStream | UnindexedStream,
        progress: TrainState,
        recorder: Recorder,
        rollbacks: RollbackPolicy,
        hooks: Hook,
        emit: Emit,
    ) -> None:
        self._plan, self._context_at, self._engine = plan, context_at, engine
        self._stream, self.progress, self._recorder = stream, progress, recorder
        self._rollbacks, self._hooks, self._emit = rollbacks, hooks, emit
        self._skipped_in_a_row = 0

    def fit(self) -> None:
        """Train to the last step of the plan, or to the one after which a hook wants to stop.

        Raises:
            PipelineError: a step failed, or too many were skipped and no roll-back is left.
        """
        batches = iter(self._stream)
        while self.progress.step < self._plan.last_step:
            step = self.progress.step
            self._hooks.before_batch(step)
            batch = next(batches)
            self._hooks.before_step(step)
            now = self._context_at(step)
            sums = self._take_step(batch, now)
            # Also after a skipped step: its samples are not seen again.
            self.progress = TrainState(step + 1, batch.cursor_after)
            self._recorder.add(sums)
            if sums is None and self._go_back_if_too_many():
                continue
            # A skipped step has its record and checkpoint, too: steps are counted, not updates.
            due = self._plan.records(step + 1) or self._hooks.wants_record()
            record = self._recorder.record(now, self.progress) if due else None
            self._hooks.before_checkpoint(step)
            if self._plan.saves(step + 1) or (record and record.save):
                self._save()
            self._hooks.after_step(step + 1)
            if record and record.stop:
                break
        self._hooks.at_end()

    def _take_step(self, batch: Batch, now: StepContext) -> Tensor | None:
        # An iterator: the engine moves one micro-batch at a time to the device.
        micro_batches = zip(
            batch.images.split(self._plan.micro_batch),
            batch.labels.split(self._plan.micro_batch),
            strict=True,
        )
        try:
            sums = self._engine.step(micro_batches, now)
        except (PipelineError, OptimizerError) as error:
            raise PipelineError(f"step {now.step + 1}: {error}") from error
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if sums is None else 0
        return sums

    def _go_back_if_too_many(self) -> bool:
        """Tell of a skipped step; True if training is back at an earlier one because of it."""
        failed = self.progress
        if not self._rollbacks.too_many(self._skipped_in_a_row):
            self._emit(Skipped(failed.step))
            return False
        # A checkpoint under way is complete before one is loaded.
        self._hooks.before_rollback(failed)
        self.progress, told = self._rollbacks.go_back(failed, self._skipped_in_a_row)
        self._skipped_in_a_row = 0
        self._recorder.rolled_back()
        self._emit(Skipped(failed.step))
        self._emit(told)
        return True

    def _save(self) -> None:
        begin = time.perf_counter()
        records = self._recorder.take_records()
        self._hooks.on_save(dataclasses.replace(self.progress, records=records))
        self._recorder.add_saving(time.perf_counter() - begin)
