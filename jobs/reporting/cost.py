"""What a training run took, from its usage metrics (pipeline/driver/goodput.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import harmonic_mean, median

from pipeline.tracking.reader import Point, Reader, TrackedRun

_HOURS, _TOTAL, _MFU = "cost/device_hours", "cost/total", "perf/mfu"
_RATE, _EPOCH = "train/images_per_s", "train/epoch"


@dataclass(frozen=True)
class Cost:
    """Time of a training run on its devices, restarts included, certification left out.

    Attributes:
        devices: ranks that trained side by side, as text; empty if it is not recorded.
        hours: device hours since the start at every record, in the order of recording.
        epochs: passes over the training split; None before the end of the first.
        images_per_s: throughput of all devices together; None if there is no record.
        mfu: share of the devices' peak that the model's FLOPs make up; None if it is not known.
        total: price of the run; None if the price of an hour was not given.
    """

    devices: str
    hours: tuple[Point, ...]
    epochs: float | None
    images_per_s: float | None
    mfu: float | None
    total: float | None

    @property
    def device_s(self) -> float | None:
        """Device seconds of the whole run; None if nothing was recorded."""
        return 3600 * self.hours[-1].value if self.hours else None

    @property
    def device_s_per_epoch(self) -> float | None:
        """Device seconds of one epoch; None if one of both is not known."""
        return self.device_s / self.epochs if self.device_s and self.epochs else None

    def up_to(self, step: int) -> float | None:
        """Device seconds until a step was done for the last time; None if it was not."""
        done = [point for point in self.hours if point.step <= step]
        return 3600 * done[-1].value if done else None


def training_cost(reader: Reader, run: TrackedRun) -> Cost:
    """Read what a training run took."""
    rates = [p.value for p in reader.series(run.run_id, _RATE) if p.value > 0]
    mfu = [point.value for point in reader.series(run.run_id, _MFU)]
    return Cost(
        devices=run.tags.get("devices", ""),
        hours=tuple(reader.series(run.run_id, _HOURS)),
        epochs=passed_epochs(reader.series(run.run_id, _EPOCH)),
        # Records stand for equally many images, so times add up and not rates.
        images_per_s=harmonic_mean(rates) if rates else None,
        mfu=median(mfu) if mfu else None,
        total=run.metrics.get(_TOTAL),
    )


def passed_epochs(epoch: Sequence[Point]) -> float | None:
    """Return the epochs that the last step stands for; None before the end of the first.

    Args:
        epoch: number of the epoch of the next sample, by step. The first record of epoch e lies
            less than one record behind its begin: there, step / e is the steps of an epoch.
    """
    last = max(epoch, default=None)
    if last is None or last.value < 1:
        return None
    first = min(point.step for point in epoch if point.value == last.value)
    return last.step * last.value / first
