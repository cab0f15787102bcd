"""Schedules: step -> learning-rate factor, training radius and progress of the run."""

import dataclasses
import math

from pipeline.config import TrainConfig
from pipeline.losses.base import Loss
from pipeline.run.step_schedule import StepSchedule


@dataclasses.dataclass(frozen=True)
class StepContext:
    """Where a run stands when it takes a step; the same on all ranks."""

    step: int
    """0-based optimizer step."""
    progress: float
    """step / steps of the whole run."""
    lr_factor: float
    """Multiple of the peak learning rates."""
    eps: float
    """Training radius, in the network's norm and pixels of [0, 1]."""


def step_context(step: int, *, plan: StepSchedule, train: TrainConfig, loss: Loss) -> StepContext:
    """Where a run stands before it takes a step.

    Args:
        step: 0-based step.
        plan: counts of the run; `stop_after` does not change its schedules.
        train: schedule of the learning rate.
        loss: ramp of the training radius.
    """
    total = plan.total_steps
    if train.schedule == "triangular":
        lr_factor = triangular_factor(step, total=total)
    else:
        lr_factor = learning_rate_factor(
            step, total=total, warmup=plan.warmup_steps, floor=train.lr_floor
        )
    eps = loss.training_radius(step, total=total)
    # All from integers: a resumed run, and every number of ranks, sees the same values.
    return StepContext(step, step / total, lr_factor, eps)


def learning_rate_factor(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then cosine down to `floor`.

    Args:
        step: 0-based step, 0 <= step < total.
        total: steps of the whole run.
        warmup: steps of the linear part; step 0 already has 1 / warmup.
        floor: smallest factor after the peak, >= 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return max(floor, 0.5 * (1 + math.cos(math.pi * progress)))


def triangular_factor(step: int, *, total: int) -> float:
    """Factor of the peak learning rate: 0, 1, 1/20 and 0 at 0, 2/5, 4/5 and all of the run.

    Linear in between, taken in the middle of the step, so that it is never 0.

    Args:
        step: 0-based step, 0 <= step < total.
        total: steps of the whole run.
    """
    # A factor of 0 would make the step a waste of its samples.
    progress = (step + 0.5) / total
    if progress < 2 / 5:
        return progress * 5 / 2
    if progress < 4 / 5:
        return 1 - (progress - 2 / 5) * 5 / 2 * 19 / 20
    return (1 - progress) * 5 / 20
