"""Schedules: step -> learning-rate factor. Pure functions of integers."""

import dataclasses
import math


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
    progress = (step + 0.5) / total
    if progress < 2 / 5:
        return progress * 5 / 2
    if progress < 4 / 5:
        return 1 - (progress - 2 / 5) * 5 / 2 * 19 / 20
    return (1 - progress) * 5 / 20
