"""Being told to stop, or that a node goes away: save a checkpoint in time, then stop or go on.

On SIGTERM the handler here notes the signal; without Ray the `InterruptionHook` of the loop
(pipeline/training/hooks.py) reads it at the next record (`train.log_every`), with Ray the driver
passes it to the ranks (pipeline/launch/ray_launcher.py). The hook has the trainer save a checkpoint
and stop, the driver marks the MLflow run KILLED (pipeline/driver/session.py), and
`pipeline.pretrain` exits with 128 + 15 = 143.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Protocol


class Interruption(Protocol):
    """What a rank can learn of the end of its time."""

    def stop_requested(self) -> bool:
        """True once somebody wants the run to stop; asks no other process."""
        ...

    def preempted(self) -> bool:
        """True once a node of the run is about to be taken away. Ranks: all ask together."""
        ...


class StopSignal:
    """SIGTERM of this process: at once, or, while `deferred`, after a checkpoint.

    A second signal always stops at once.
    """

    def __init__(self) -> None:
        self._number = 0
        self._waits = False

    def install(self) -> None:
        """Take over SIGTERM; only the main thread may."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # In a handler nothing may be locked or sent: the number is noted, the loop looks at it.
        if self._waits and not self._number:
            self._number = number
            return
        # The status that a shell gives a process that the signal has ended.
        raise SystemExit(128 + number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator["StopSignal"]:
        """A signal is only noted inside; at the end the process exits because of it.

        Raises:
            SystemExit: with 128 + the number of the signal, if one came.
        """
        self.install()
        self._waits = True
        try:
            yield self
        finally:
            self._waits = False
        if self._number:
            raise SystemExit(128 + self._number)

    def stop_requested(self) -> bool:
        """See Interruption."""
        return self._number != 0

    def preempted(self) -> bool:
        """See Interruption; nobody tells a process that runs on its own."""
        return False


class Flag:
    """A stop request that arrives on another thread."""

    def __init__(self) -> None:
        self._set = threading.Event()

    def raise_flag(self) -> None:
        """Request the stop."""
        self._set.set()

    def stop_requested(self) -> bool:
        """See Interruption."""
        return self._set.is_set()

    def preempted(self) -> bool:
        """See Interruption."""
        return False
