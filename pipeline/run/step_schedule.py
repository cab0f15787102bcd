"""Derived numbers of a run, computed once and logged: integers in, integers out."""

import dataclasses
import math
import sys

from pipeline.config import CheckpointConfig, ClusterConfig, TrainConfig
from pipeline.errors import PipelineError


@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """Counts of one run.

    Attributes:
        total_steps: optimizer steps of the whole schedule.
        last_step: step after which this execution ends (`train.stop_after` or total_steps); with a
            budget of processor time one that is never reached.
        warmup_steps: steps of the linear warm-up.
        rank_batch: samples per rank and step.
        micro_batch: samples per rank and backward pass.
        checkpoint_every: steps between checkpoints; 0 means only at the end.
        keeps: whether there are checkpoints at all.
        record_every: steps between records.
    """

    total_steps: int
    last_step: int
    warmup_steps: int
    rank_batch: int
    micro_batch: int
    checkpoint_every: int
    record_every: int
    keeps: bool = True

    def saves(self, step: int) -> bool:
        """True if a checkpoint is saved after `step` steps."""
        regular = self.checkpoint_every > 0 and step % self.checkpoint_every == 0
        return self.keeps and (regular or step == self.last_step)

    def records(self, step: int) -> bool:
        """True if metrics are recorded after `step` steps."""
        return step % self.record_every == 0 or step == self.last_step


def world_sizes(cluster: ClusterConfig, train: TrainConfig) -> tuple[int, ...]:
    """Numbers of ranks that the run may have, ascending; one unless `cluster.min_workers` is set.

    Raises:
        PipelineError: the smallest or the largest does not divide the batch.
    """
    most = cluster.workers
    least = cluster.min_workers or most
    if least > most:
        raise PipelineError(f"cluster.min_workers={least} exceeds cluster.workers={most}")
    parts = train.global_batch // train.accumulation
    sizes = tuple(size for size in range(least, most + 1) if parts % size == 0)
    for name, size in (("workers", most), ("min_workers", least)):
        if size not in sizes:
            raise PipelineError(
                f"cluster.{name}={size}: train.global_batch={train.global_batch} with "
                f"train.accumulation={train.accumulation} is divisible by "
                f"{', '.join(map(str, sizes)) or 'none'} of {least} to {most} ranks"
            )
    return sizes


def make_step_schedule(
    train: TrainConfig, checkpoint: CheckpointConfig, *, samples: int, world_size: int
) -> StepSchedule:
    """Counts of the run for a training split of `samples` on `world_size` ranks.

    Raises:
        PipelineError: the global batch does not split evenly, or exceeds the split.
    """
    parts = world_size * train.accumulation
    if train.global_batch % parts:
        raise PipelineError(
            f"train.global_batch={train.global_batch} is not divisible by "
            f"{world_size} ranks x train.accumulation={train.accumulation} = {parts}"
        )
    if train.global_batch > samples:
        raise PipelineError(
            f"train.global_batch={train.global_batch} exceeds the {samples} samples of "
            "the training split"
        )
    total = math.ceil(train.epochs * samples / train.global_batch)
    return StepSchedule(
        total_steps=total,
        last_step=_last_step(train, total),
        warmup_steps=min(total, round(train.warmup_epochs * samples / train.global_batch)),
        rank_batch=train.global_batch // world_size,
        micro_batch=train.global_batch // parts,
        checkpoint_every=checkpoint.every_steps,
        record_every=train.log_every,
        keeps=not checkpoint.none,
    )


def _last_step(train: TrainConfig, total: int) -> int:
    # As many steps as the budget has time for, whatever the number of epochs.
    end = sys.maxsize if train.processor_seconds else total
    return min(end, train.stop_after or end)
