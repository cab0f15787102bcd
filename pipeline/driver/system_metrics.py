"""Load of the driver's machine, under the names that MLflow's page of system metrics shows."""

import threading
from collections.abc import Callable, Mapping

import psutil

_MEGA = 1e6


class SystemMetrics:
    """Samples the machine in a thread of its own until it is closed.

    Args:
        log: receives the values of one sample, from that thread.
        interval_s: seconds between two samples; the first comes after one interval.
    """

    def __init__(
        self, log: Callable[[Mapping[str, float]], object], interval_s: float = 10.0
    ) -> None:
        self._log = log
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call only begins the measurement
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling; nothing is logged after this returns."""
        self._closing.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._log(self._values())

    def _values(self) -> dict[str, float]:
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGA,
            "system_memory_usage_percentage": memory.percent,
        }
        if network is not None and self._network is not None:  # a container may have none
            received = network.bytes_recv - self._network.bytes_recv
            sent = network.bytes_sent - self._network.bytes_sent
            found["network_receive_megabytes"] = received / _MEGA
            found["network_transmit_megabytes"] = sent / _MEGA
        return {f"system/{name}": value for name, value in found.items()}
