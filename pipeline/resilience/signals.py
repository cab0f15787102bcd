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
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

STOP = "stop"
"""Save a checkpoint and end."""
PAUSE = "pause"
"""Save a checkpoint and wait to be ended: as many ranks as there is room for go on from it."""


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


class ControlActor:
    """What driver and controller want of the ranks, which ask; an actor beside the driver.

    It outlives the controller, so it holds what the next one has to know as well: failures so far,
    and the room that ranks have taken.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._room: list[Any] = []
        self._standing: set[str] = set()
        self._paused: set[int] = set()
        self._asked = time.monotonic()

    def give(self, order: str) -> None:
        """Give STOP or PAUSE."""
        self._standing.add(order)
        if order == PAUSE:
            # An answer to the pause before is none to this one: ranks have been replaced since.
            self._paused.clear()

    def withdraw(self, order: str) -> None:
        """Take an order back."""
        self._standing.discard(order)

    def standing(self) -> frozenset[str]:
        """Orders that have been given."""
        self._asked = time.monotonic()
        return frozenset(self._standing)

    def fail(self) -> int:
        """Count a failure; how many there were."""
        self._failures += 1
        return self._failures

    def keep(self, room: Any) -> None:
        """Remember the placement group that ranks have taken; earlier ones are released already."""
        self._room = [room]

    def room(self) -> list[Any]:
        """The placement group of the newest ranks, if there were any."""
        return self._room

    def silence_s(self) -> float:
        """Seconds since a rank has asked."""
        return time.monotonic() - self._asked

    def pause(self, rank: int) -> None:
        """A rank has saved its state and waits for its end."""
        self._paused.add(rank)

    def paused(self) -> int:
        """How many ranks do."""
        return len(self._paused)
