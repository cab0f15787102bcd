"""What a training run took, derived from the throughput that it recorded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.tracking_query import Point, Reader, TrackedRun

_RATE, _EPOCH = "train/images_per_s", "train/epoch"


@dataclass(frozen=True)
class Cost:
    """Time of the training loop: steps and checkpoints, without start-up and certification.

    Attributes:
        devices: ranks that trained side by side.
        steps: step of every record, in the order of recording; a resumed run repeats some.
        seconds: wall-clock seconds of the loop up to each record.
        images: training images that the loop has seen.
        epoch_images: images of one epoch; None before the end of the first.
        price: of one device for one hour; None: not given.
    """

    devices: int
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    images: int
    epoch_images: float | None
    price: float | None

    @property
    def device_seconds(self) -> float | None:
        """Devices times seconds of the whole run; None if it recorded nothing."""
        return self.devices * self.seconds[-1] if self.seconds else None

    @property
    def images_per_second(self) -> float | None:
        """Average throughput of all devices."""
        return self.images / self.seconds[-1] if self.seconds else None

    @property
    def epochs(self) -> float | None:
        """Passes over the training split, repeated steps included."""
        return self.images / self.epoch_images if self.epoch_images else None

    @property
    def per_epoch(self) -> float | None:
        """Device seconds of one epoch."""
        if self.device_seconds is None or not self.epochs:
            return None
        return self.device_seconds / self.epochs

    def up_to(self, step: int) -> float | None:
        """Device seconds until a step was done for the last time."""
        done = [at for at, seen in enumerate(self.steps) if seen <= step]
        return self.devices * self.seconds[done[-1]] if done else None

    def money(self, device_seconds: float | None) -> float | None:
        """What these device seconds cost; None if the price is not known."""
        if self.price is None or device_seconds is None:
            return None
        return self.price * device_seconds / 3600


def training_cost(reader: Reader, run: TrackedRun, price: float | None) -> Cost:
    """Read what a training run took.

    Args:
        reader: the store.
        run: the training run.
        price: of one device for one hour; None: not given.
    """
    batch = int(run.params.get("train.global_batch", 0))
    every = int(run.params.get("train.log_every", 1))
    local = run.params.get("cluster.launcher") == "local"
    return cost_of(
        reader.series(run.run_id, _RATE),
        reader.series(run.run_id, _EPOCH),
        batch=batch,
        log_every=every,
        devices=1 if local else int(run.params.get("cluster.workers", 1)),
        price=price,
    )


def cost_of(
    rate: Sequence[Point],
    epoch: Sequence[Point],
    *,
    batch: int,
    log_every: int,
    devices: int,
    price: float | None,
) -> Cost:
    """Derive the cost from series; see `Cost`.

    Args:
        rate: images per second of all devices since the record before.
        epoch: the epoch of the next sample.
        batch: images of one step.
        log_every: steps between two records.
        devices: see `Cost`.
        price: see `Cost`.
    """
    steps, seconds, images, elapsed, last = [], [], 0, 0.0, 0
    for point in rate:
        passed = point.step - last
        if not 0 < passed <= log_every:  # the run was resumed here
            passed = log_every
        images += passed * batch
        elapsed += passed * batch / point.value
        steps.append(point.step)
        seconds.append(elapsed)
        last = point.step
    return Cost(devices, tuple(steps), tuple(seconds), images, _epoch_images(epoch, batch), price)


def _epoch_images(epoch: Sequence[Point], batch: int) -> float | None:
    """Images of an epoch, from the first record of the last one that began.

    Record k of epoch e says e * images <= step * batch; the first one exceeds it by less than the
    images between two records.
    """
    ordered = sorted(epoch)
    values = [point.value for point in ordered]
    if not values or values[-1] < 1:
        return None
    first = ordered[bisect_right(values, values[-1] - 0.5)]
    return first.step * batch / first.value
