"""The training loop of one rank."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.streaming.stream import SampleStream
from data_shards.streaming.webdataset_stream import UnindexedStream
from optim.errors import OptimizerError
from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.resilience.heartbeat import Phase
from pipeline.resilience.signals import Interruption
from pipeline.resilience.straggler import StragglerDetector
from pipeline.run.distributed import DistributedContext
from pipeline.run.events import Emit, Event, Metrics, RolledBack, Skipped, Straggling
from pipeline.run.state import TrainState
from pipeline.run.step_schedule import StepSchedule
from pipeline.training.objective import STATISTICS
from pipeline.training.schedules import StepContext, learning_rate_factor, triangular_factor

_ASK_PREEMPTION_S = 5.0
"""Pause between two questions whether a node is about to go; they are a barrier."""


class Engine(Protocol):
    """What the loop needs of the partitioned network."""

    def step(
        self, micro_batches: Iterator[tuple[Tensor, Tensor]], now: StepContext
    ) -> Tensor | None:
        """One optimizer step; returns the sums of Objective, None if it was skipped."""
        ...

    def forward_seconds(self) -> float:
        """What this rank has computed since the last call, without waiting for others."""
        ...

    def audit_metrics(self) -> dict[str, float]:
        """Metrics of the audits since the last call; empty if there was none."""
        ...


class CheckpointSaver(Protocol):
    """What the loop needs of the checkpoints."""

    def keep(self, progress: TrainState) -> None:
        """Begin to keep the state after a step."""
        ...

    def poll(self) -> None:
        """Report what has been kept since the last call."""
        ...

    def settle(self) -> None:
        """Wait for what is being kept, and report it."""
        ...


class RollbackPolicy(Protocol):
    """What the loop needs of the roll-backs."""

    def go_back(self, failed: TrainState) -> tuple[TrainState, RolledBack] | None:
        """Load the newest checkpoint; None if that is not allowed (any more)."""
        ...


class Trainer:
    """Runs optimizer steps from `progress` to the end of the plan.

    Attributes:
        progress: advanced after every step; what a checkpoint stores.
    """

    def __init__(
        self,
        *,
        world: DistributedContext,
        config: RunConfig,
        plan: StepSchedule,
        engine: Engine,
        stream: SampleStream | UnindexedStream,
        progress: TrainState,
        emit: Emit,
        saver: CheckpointSaver,
        rollbacks: RollbackPolicy,
        interruption: Interruption,
        beat: Callable[[int, Phase], None],
        stepped: Callable[[], None],
    ) -> None:
        self._world = world
        self._config = config
        self._plan = plan
        self._engine = engine
        self._stream = stream
        self.progress = progress
        self._emit = emit
        self._saver = saver
        self._rollbacks = rollbacks
        self._interruption = interruption
        self._beat = beat
        self._stepped = stepped
        self._pace = StragglerDetector(config.cluster.straggler_ratio)
        self._asked = time.monotonic()
        self._preempted = self._stopping = self._keep_now = False
        self._sums = torch.zeros(len(STATISTICS), device=world.device)
        self._since = time.perf_counter()
        self._waited = self._kept_s = 0.0
        self._records: list[Metrics] = []
        self._older_records: list[Metrics] = []
        self._skipped = self._skipped_before = self._skipped_in_a_row = 0

    def fit(self) -> None:
        """Train to the last step of the plan, recording metrics and keeping checkpoints."""
        batches = iter(self._stream)
        while self.progress.step < self._plan.last_step:
            step = self.progress.step
            self._beat(step, Phase.DATA)
            batch = next(batches)
            self._beat(step, Phase.STEP)
            now = self._moment(step)
            micro_batches = zip(
                batch.images.split(self._plan.micro_batch),
                batch.labels.split(self._plan.micro_batch),
                strict=True,
            )
            try:
                sums = self._engine.step(micro_batches, now)
            except (PipelineError, OptimizerError) as error:
                raise PipelineError(f"step {step + 1}: {error}") from error
            self.progress = TrainState(step + 1, batch.cursor_after)
            if sums is None:
                if self._skip():
                    continue
            else:
                self._sums += sums
                self._skipped_in_a_row = 0
            self._record(now)
            self._beat(step, Phase.CHECKPOINT)
            if self._plan.keeps(self.progress.step) or self._keep_now:
                self._keep()
                self._keep_now = False
            self._saver.poll()
            self._stepped()
            if self._stopping:
                return

    def _skip(self) -> bool:
        """Count a step that no rank has taken; its samples are not seen again.

        Returns:
            True if it was one too many in a row and training is back at an earlier step.

        Raises:
            PipelineError: one too many in a row, and no roll-back is left.
        """
        step, train = self.progress.step, self._config.train
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row <= train.max_skipped:
            self._tell(Skipped(step))
            return False
        self._beat(step, Phase.CHECKPOINT)
        self._saver.settle()
        back = self._rollbacks.go_back(self.progress)
        if back is None:
            raise PipelineError(
                f"step {step}: a loss or gradient is not finite on at least one rank, the "
                f"{self._skipped_in_a_row}. time in a row (train.max_skipped={train.max_skipped}), "
                f"and of train.rollbacks={train.rollbacks} none is left; nothing was updated"
            )
        self.progress, told = back
        self._skipped_in_a_row = 0
        self._sums.zero_()
        self._begin_record()
        self._records = []  # of steps that do not count; the checkpoint has those before them
        self._tell(Skipped(step))
        self._tell(told)
        return True

    def _keep(self) -> None:
        begin = time.perf_counter()
        records = (*self._older_records, *self._records)
        self._saver.keep(dataclasses.replace(self.progress, records=records))
        self._older_records, self._records = self._records, []
        self._kept_s += time.perf_counter() - begin

    def _begin_record(self) -> None:
        self._since, self._kept_s = time.perf_counter(), 0.0
        self._skipped_before = self._skipped
        self._waited = self._stream.waited_s

    def _productive(self, seconds: float, samples: float, waited: float) -> float:
        """See Metrics; `samples` are those of the steps that were taken."""
        taken = samples / self._config.train.global_batch
        steps = taken + self._skipped - self._skipped_before
        return max(0.0, seconds - waited - self._kept_s) * taken / max(steps, 1)

    def _tell(self, event: Event) -> None:
        if self._world.rank == 0:
            self._emit(event)

    def _moment(self, step: int) -> StepContext:
        train, loss, total = self._config.train, self._config.loss, self._plan.total_steps
        if train.schedule == "triangular":
            lr_factor = triangular_factor(step, total=total)
        else:
            lr_factor = learning_rate_factor(
                step, total=total, warmup=self._plan.warmup_steps, floor=train.lr_floor
            )
        eps = loss.training_radius(step, total=total)
        return StepContext(step, step / total, lr_factor, eps)

    def _interrupt(self, *, stop: bool, ask: bool) -> None:
        """Decide whether this step is kept out of turn; all ranks come to the same answer."""
        preempted = self._preempted
        if ask:
            self._asked = time.monotonic()
            self._preempted = self._interruption.preempted()
        self._stopping = stop
        self._keep_now = stop or (self._preempted and not preempted)

    def _own_slot(self, value: float) -> list[float]:
        """A slot per rank, of which this one fills its own."""
        return [value if rank == self._world.rank else 0.0 for rank in range(self._world.size)]

    def _compare(self, seconds: list[float]) -> dict[str, float]:
        """Metrics of the ranks' pace; names one that has been slow for long."""
        values = self._pace.compare(seconds)
        slow = self._pace.straggler()
        if slow is not None and self._world.rank == 0:
            host, ratio = self._world.hosts[slow], values["perf/slowest_ratio"]
            self._emit(Straggling(self.progress.step, slow, host, ratio))
        return values

    def _record(self, now: StepContext) -> None:
        """Every `log_every` steps: sum the statistics over the ranks, check and emit them."""
        step = self.progress.step
        if step % self._config.train.log_every and step != self._plan.last_step:
            return
        stream = self._stream
        due = time.monotonic() - self._asked > _ASK_PREEMPTION_S
        seen = [
            stream.retries,
            stream.damaged.total(),
            self._interruption.stop_requested(),
            due,
            *self._own_slot(self._engine.forward_seconds()),
            *self._own_slot(stream.waited_s - self._waited),
        ]
        sums = torch.cat([self._sums, torch.tensor(seen, device=self._sums.device)])
        dist.all_reduce(sums)
        loss_sum, clean, certified, samples, retries, damaged, stop, due, *slots = sums.tolist()
        seconds, waits = slots[: self._world.size], slots[self._world.size :]
        self._interrupt(stop=stop > 0, ask=due > 0)
        self._sums.zero_()
        passed = time.perf_counter() - self._since
        means = {"loss": loss_sum, "clean": clean, "certified": certified}
        values = {
            # None of them where all steps were skipped.
            **{f"train/{name}": value / samples for name, value in means.items() if samples},
            "train/eps": now.eps,
            "train/lr": self._config.optim.lr * now.lr_factor,
            "train/images_per_s": samples / max(passed, 1e-9),
            "train/epoch": float(self.progress.cursor.epoch),
            # Of all ranks since they started; the seconds since the last record, per rank.
            "data/retries": retries,
            "data/damaged": damaged,
            "train/skipped": float(self._skipped),
            "data/wait_s": sum(waits) / self._world.size,
            **self._compare(seconds),
            **self._engine.audit_metrics(),
        }
        productive = self._productive(passed, samples, max(waits))
        self._begin_record()
        record = Metrics(step, values, int(time.time() * 1000), productive)
        self._records.append(record)
        self._tell(record)
