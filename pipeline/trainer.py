"""The training loop of one rank."""

import dataclasses
import math
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
from pipeline.events import Emit, Metrics
from pipeline.objective import STATISTICS
from pipeline.plan import Plan
from pipeline.ranks import World
from pipeline.schedules import Moment, learning_rate_factor, training_radius, triangular_factor


class Engine(Protocol):
    """What the loop needs of the partitioned network."""

    def step(self, micro_batches: Iterator[tuple[Tensor, Tensor]], now: Moment) -> Tensor:
        """One optimizer step; returns the sums of Objective."""
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
    ) -> None:
        self._world = world
        self._config = config
        self._plan = plan
        self._engine = engine
        self._stream = stream
        self.progress = progress
        self._emit = emit
        self._saver = saver
        self._sums = torch.zeros(len(STATISTICS), device=world.device)
        self._since = time.perf_counter()
        self._waited = 0.0

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
                self._sums += self._engine.step(micro_batches, now)
            except (PipelineError, OptimizerError) as error:
                raise PipelineError(f"step {step + 1}: {error}") from error
            self.progress = Progress(step + 1, batch.cursor_after)
            self._record(now)
            if self._plan.keeps(self.progress.step):
                self._saver.keep(self.progress)
            self._saver.poll()

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

    def _record(self, now: Moment) -> None:
        """Every `log_every` steps: sum the statistics over the ranks, check and emit them."""
        step = self.progress.step
        if step % self._config.train.log_every and step != self._plan.last_step:
            return
        stream = self._stream
        seen = [stream.retries, stream.damaged.total(), stream.waited_s - self._waited]
        self._waited = stream.waited_s
        sums = torch.cat([self._sums, torch.tensor(seen, device=self._sums.device)])
        dist.all_reduce(sums)
        loss_sum, clean, certified, samples, retries, damaged, waited = sums.tolist()
        self._sums.zero_()
        if not math.isfinite(loss_sum):
            raise PipelineError(
                f"the loss is not finite at step {step} (global batch "
                f"{self._config.train.global_batch}, lr factor {now.lr_factor:.3g}, "
                f"eps {now.eps:.4f})"
            )
        clock = time.perf_counter()
        values = {
            "train/loss": loss_sum / samples,
            "train/clean": clean / samples,
            "train/certified": certified / samples,
            "train/eps": now.eps,
            "train/lr": self._config.optim.lr * now.lr_factor,
            "train/images_per_s": samples / max(clock - self._since, 1e-9),
            "train/epoch": float(self.progress.cursor.epoch),
            # Of all ranks since they started; the seconds since the last record, per rank.
            "data/retries": retries,
            "data/damaged": damaged,
            "data/wait_s": waited / self._world.size,
            **self._engine.audit_metrics(),
        }
        self._since = clock
        if self._world.rank == 0:
            self._emit(Metrics(step, values, int(time.time() * 1000)))
