"""What a run uses: device hours, their cost, and how well its time and its devices are used.

Goodput is the share of a run's time that went into steps which count (arXiv 2402.15627 calls it the
effective training time rate):

    goodput = seconds of the steps whose effect the network still has / seconds of the run

The seconds of the run are those of all its executions, each from the beginning of its record,
before the ranks start, to its newest record or sample of the machine; pauses in which no execution
ran are left out, and so is what follows training. Steps count less what they waited for data (the
rank that waited longest) and for checkpoints. So these are lost: the start of ranks, waits, stalls
and hangs, skipped steps, and steps that had to be done again because ranks started anew, or went
back, from an older checkpoint. The steps between a checkpoint and the record before it count as
lost when ranks start from that checkpoint. MFU is of all seconds between two records, waits
included.
"""

import time
from collections.abc import Callable
from typing import Protocol

from pipeline.config import ClusterConfig
from pipeline.run.events import Metrics, Started
from pipeline.training.device_flops import peak_flops

DEVICE_HOURS = "cost/device_hours"
ELAPSED = "perf/elapsed_s"
PRODUCTIVE = "perf/productive_s"
GOODPUT = "perf/goodput"


class Recall(Protocol):
    """What is known of a metric from before."""

    def __call__(self, name: str, until: int | None = None) -> float | None:
        """Its newest value, of steps up to `until`; None: there is none."""
        ...


class UsageMetrics:
    """Turns the events of a run into metrics of use.

    A device is what one rank occupies: a GPU, or `cluster.cpus_per_worker` CPUs. Its time counts
    from the start of the ranks to the last record, restarts after failures included.

    Args:
        cluster: price and peak of a device, where they are given.
        precision: type of the working weights, `train.precision`.
        flops: of an image's passes, see `training_flops`; None: not known.
        recall: metrics of this run so far, earlier executions included.
        clock: seconds.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        precision: str,
        flops: float | None,
        recall: Recall,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._precision, self._flops = cluster, precision, flops
        self._recall = recall
        self._clock = clock
        self._hours = recall(DEVICE_HOURS) or 0.0
        self._elapsed = recall(ELAPSED) or 0.0
        self._productive = recall(PRODUCTIVE) or 0.0
        self._stopped = False
        self._devices = 0
        self._peak: float | None = None
        self._since = self._begin = clock()

    def started(self, event: Started) -> dict[str, str]:
        """Take note of the devices and of the step; returns tags of the run."""
        self._advance()
        self._devices = event.devices
        sources = {
            "given": self._cluster.peak_tflops * 1e12,
            "data sheet": peak_flops(event.device, self._precision),
            "measured": event.measured_flops,
        }
        source, self._peak = next(((k, v) for k, v in sources.items() if v), ("unknown", None))
        self.back_to(event.step)
        return {"device": event.device, "devices": str(event.devices), "mfu_of": source}

    def back_to(self, step: int) -> None:
        """The network is that after `step`: what came later does not count."""
        self._productive = self._recall(PRODUCTIVE, step) or 0.0

    def values(self, event: Metrics) -> dict[str, float]:
        """Metrics of use beside those of a record.

        `cost/device_hours`, `cost/total` where the price of an hour is given, `perf/productive_s`
        and what `time` has, and, where the FLOPs of the network are known,
        `perf/tflops_per_device` and `perf/mfu`.
        """
        self._advance()
        self._productive += event.productive_s
        found = {DEVICE_HOURS: self._hours, PRODUCTIVE: self._productive, **self.time()}
        if self._cluster.price_per_device_hour:
            found["cost/total"] = self._hours * self._cluster.price_per_device_hour
        if self._flops and self._devices:
            rate = event.values["train/images_per_s"] * self._flops / self._devices
            found["perf/tflops_per_device"] = rate / 1e12
            if self._peak:
                found["perf/mfu"] = rate / self._peak
        return found

    def time(self) -> dict[str, float]:
        """`perf/elapsed_s` and `perf/goodput` as of now; empty after training. Any thread."""
        elapsed = self._elapsed + self._clock() - self._begin
        if self._stopped or not elapsed > 0:
            return {}
        return {ELAPSED: elapsed, GOODPUT: self._productive / elapsed}

    def stop(self) -> None:
        """Training has ended; what follows is no time of the run."""
        self._stopped = True

    def _advance(self) -> None:
        now = self._clock()
        self._hours += (now - self._since) * self._devices / 3600
        self._since = now
