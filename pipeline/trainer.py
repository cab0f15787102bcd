"""The training loop of one rank."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.order import Cursor
from data_shards.stream import SampleStream
from data_shards.unindexed import UnindexedStream
from optim.errors import OptimizerError
from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.events import Emit, Metrics, Skipped
from pipeline.interruption import Interruption
from pipeline.objective import STATISTICS
from pipeline.plan import Plan
from pipeline.ranks import World
from pipeline.schedules import Moment, learning_rate_factor, training_radius, triangular_factor

_ASK_PREEMPTION_S = 5.0
"""Pause between two questions whether a node is about to go; they are a barrier."""


class Engine(Protocol):
    """What the loop needs of the partitioned network."""

    def step(self, micro_batches: Iterator[tuple[Tensor, Tensor]], now: Moment) -> Tensor | None:
        """One optimizer step; returns the sums of Objective, None if it was skipped."""
        ...

    def audit_metrics(self) -> dict[str, float]:
        """Metrics of the audits since the last call; empty if there was none."""
        ...


class Keeper(Protocol):
    """What the loop needs of the checkpoints."""

    def keep(self, progress: "Progress") -> None:
        """Begin to keep the state after a step."""
        ...

    def poll(self) -> None:
        """Report what has been kept since the last call."""
        ...


@dataclasses.dataclass
class Progress:
    """Where training stands: steps done and the cursor of the next sample."""

    step: int
    cursor: Cursor


class Trainer:
    """Runs optimizer steps from `progress` to the end of the plan.

    Attributes:
        progress: advanced after every step; what a checkpoint stores.
    """

    def __init__(
        self,
        *,
        world: World,
        config: RunConfig,
        plan: Plan,
        engine: Engine,
        stream: SampleStream | UnindexedStream,
        progress: Progress,
        emit: Emit,
        saver: Keeper,
        interruption: Interruption,
    ) -> None:
        self._world = world
        self._config = config
        self._plan = plan
        self._engine = engine
        self._stream = stream
        self.progress = progress
        self._emit = emit
        self._saver = saver
        self._interruption = interruption
        self._asked = time.monotonic()
        self._preempted = self._stopping = self._keep_now = False
        self._sums = torch.zeros(len(STATISTICS), device=world.device)
        self._since = time.perf_counter()
        self._waited = 0.0
        self._skipped = self._skipped_in_a_row = 0

    def fit(self) -> None:
        """Train to the last step of the plan, recording metrics and keeping checkpoints."""
        batches = iter(self._stream)
        while self.progress.step < self._plan.last_step:
            batch = next(batches)
            step = self.progress.step
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
            if sums is None:
                self._skip(step + 1)
            else:
                self._sums += sums
                self._skipped_in_a_row = 0
            self.progress = Progress(step + 1, batch.cursor_after)
            self._record(now)
            if self._plan.keeps(self.progress.step) or self._keep_now:
                self._saver.keep(self.progress)
            self._saver.poll()
            if self._stopping:
                return

    def _skip(self, step: int) -> None:
        """Count a step that no rank has taken; its samples are not seen again.

        Raises:
            PipelineError: too many in a row.
        """
        self._skipped += 1
        self._skipped_in_a_row += 1
        limit = self._config.train.max_skipped
        if self._skipped_in_a_row > limit:
            raise PipelineError(
                f"step {step}: a loss or gradient is not finite on at least one rank, the "
                f"{self._skipped_in_a_row}. time in a row (train.max_skipped={limit}); nothing was "
                "updated"
            )
        if self._world.rank == 0:
            self._emit(Skipped(step))

    def _moment(self, step: int) -> Moment:
        train, loss, total = self._config.train, self._config.loss, self._plan.total_steps
        if train.schedule == "triangular":
            lr_factor = triangular_factor(step, total=total)
        else:
            lr_factor = learning_rate_factor(
                step, total=total, warmup=self._plan.warmup_steps, floor=train.lr_floor
            )
        eps = training_radius(
            step,
            total=total,
            eps=loss.eps,
            start=loss.eps_start,
            end=loss.eps_end,
            ramp=loss.eps_ramp,
        )
        return Moment(step, step / total, lr_factor, eps)

    def _interrupt(self, *, stop: bool, ask: bool) -> None:
        """Decide whether this step is kept out of turn; all ranks come to the same answer."""
        preempted = self._preempted
        if ask:
            self._asked = time.monotonic()
            self._preempted = self._interruption.preempted()
        self._stopping = stop
        self._keep_now = stop or (self._preempted and not preempted)

    def _record(self, now: Moment) -> None:
        """Every `log_every` steps: sum the statistics over the ranks, check and emit them."""
        step = self.progress.step
        if step % self._config.train.log_every and step != self._plan.last_step:
            return
        stream = self._stream
        due = time.monotonic() - self._asked > _ASK_PREEMPTION_S
        seen = [
            stream.retries,
            stream.damaged.total(),
            stream.waited_s - self._waited,
            self._interruption.stop_requested(),
            due,
        ]
        self._waited = stream.waited_s
        sums = torch.cat([self._sums, torch.tensor(seen, device=self._sums.device)])
        dist.all_reduce(sums)
        loss_sum, clean, certified, samples, retries, damaged, waited, stop, due = sums.tolist()
        self._interrupt(stop=stop > 0, ask=due > 0)
        self._sums.zero_()
        clock = time.perf_counter()
        means = {"loss": loss_sum, "clean": clean, "certified": certified}
        values = {
            # None of them where all steps were skipped.
            **{f"train/{name}": value / samples for name, value in means.items() if samples},
            "train/eps": now.eps,
            "train/lr": self._config.optim.lr * now.lr_factor,
            "train/images_per_s": samples / max(clock - self._since, 1e-9),
            "train/epoch": float(self.progress.cursor.epoch),
            # Of all ranks since they started; the seconds since the last record, per rank.
            "data/retries": retries,
            "data/damaged": damaged,
            "train/skipped": float(self._skipped),
            "data/wait_s": waited / self._world.size,
            **self._engine.audit_metrics(),
        }
        self._since = clock
        if self._world.rank == 0:
            self._emit(Metrics(step, values, int(time.time() * 1000)))
