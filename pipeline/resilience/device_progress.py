"""What a device does while its training thread stands still.

NCCL's collectives return before they have begun. A rank that waits for others stands in whatever
needs a result (`.item()`, a copy to the host, a full queue of kernels), as does a rank that others
wait for. What tells them apart is the device: it still works at what was queued where the rank
waits, and has nothing to do where the rank itself keeps the others waiting.
"""

import contextlib
import pickle
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in a device's queue, `torch.cuda.Event`."""

    def record(self, stream: torch.Stream) -> None:
        """Put it at the end of the queue; may wait where the queue is full."""

    def query(self) -> bool:
        """Whether the device has come to it."""


class DeviceProgress:
    """Looks from a thread of its own whether a device gets through its queue.

    Args:
        device: of the calling thread, whose current stream is looked at.
        interval_s: pause between two looks.
        mark: makes a point of the queue.
        stream: the queue; default: the current stream of the calling thread.
    """

    def __init__(
        self,
        device: torch.device,
        interval_s: float,
        *,
        mark: Callable[[], Mark] = torch.cuda.Event,
        stream: torch.Stream | None = None,
    ) -> None:
        self._device, self._interval_s, self._mark = device, interval_s, mark
        self._stream = torch.cuda.current_stream(device) if stream is None else stream
        self._closed = threading.Event()
        self._through = time.monotonic()
        threading.Thread(target=self._look, name="device-progress", daemon=True).start()

    def blocked(self) -> bool:
        """Whether the device has worked at the same queue for longer than three looks."""
        return time.monotonic() - self._through > 3 * self._interval_s

    def close(self) -> None:
        """Look no longer."""
        self._closed.set()

    def _look(self) -> None:
        # What fails here has failed in the training thread as well, which says so.
        with contextlib.suppress(RuntimeError):
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while not self._closed.is_set():
                mark = self._mark()
                mark.record(self._stream)
                while not mark.query():
                    if self._closed.wait(self._interval_s / 4):
                        return
                self._through = time.monotonic()
                self._closed.wait(self._interval_s)


def collectives_begun(trace: Callable[[], bytes] | None = None) -> int:
    """Collectives that this process has queued in NCCL's groups, by torch's flight recorder.

    Args:
        trace: its record; default: that of this process.

    Returns:
        Their number; -1 where this torch has no recorder or it has seen none.
    """
    if trace is None:
        trace = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if trace is None:
            return -1
    try:
        groups = pickle.loads(trace()).get("pg_status", {}).values()
        counts = [int(status["last_enqueued_collective"]) for status in groups]
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError):
        return -1
    return sum(max(count, 0) for count in counts) if counts else -1
