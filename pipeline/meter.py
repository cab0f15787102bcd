"""What a run uses: device hours, their cost, and how well the devices are used."""

import time
from collections.abc import Callable

from pipeline.config import RunConfig
from pipeline.events import Metrics, Started
from pipeline.flops import peak_flops, training_flops

DEVICE_HOURS = "cost/device_hours"


class Meter:
    """Turns the events of a run into metrics of use.

    A device is what one rank occupies: a GPU, or `cluster.cpus_per_worker` CPUs. Its time counts
    from the start of the ranks to the last record, restarts after failures included.

    Args:
        config: the run.
        used: device hours of earlier executions of this run.
        clock: seconds.
    """

    def __init__(
        self, config: RunConfig, used: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._hours = used
        self._clock = clock
        self._devices = 0
        self._peak: float | None = None
        self._flops = training_flops(config.model)
        self._since = clock()

    def started(self, event: Started) -> dict[str, str]:
        """Take note of the devices; returns tags of the run."""
        self._advance()
        self._devices = event.devices
        given = self._config.cluster.peak_tflops * 1e12
        self._peak = given or peak_flops(event.device, self._config.train.precision)
        return {"device": event.device, "devices": str(event.devices)}

    def values(self, event: Metrics) -> dict[str, float]:
        """Metrics of use beside those of a record.

        `cost/device_hours`, `cost/total` where the price of an hour is given, and, where the FLOPs
        of the network are known, `perf/tflops_per_device` and, where those of the device are,
        `perf/mfu`.
        """
        self._advance()
        found = {DEVICE_HOURS: self._hours}
        if self._config.cluster.price_per_device_hour:
            found["cost/total"] = self._hours * self._config.cluster.price_per_device_hour
        if self._flops and self._devices:
            rate = event.values["train/images_per_s"] * self._flops / self._devices
            found["perf/tflops_per_device"] = rate / 1e12
            if self._peak:
                found["perf/mfu"] = rate / self._peak
        return found

    def _advance(self) -> None:
        now = self._clock()
        self._hours += (now - self._since) * self._devices / 3600
        self._since = now
