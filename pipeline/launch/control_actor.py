"""What driver and controller of a run on Ray want of its ranks: an actor that holds it."""

import time
from typing import Any

STOP = "stop"
"""Save a checkpoint and end."""
PAUSE = "pause"
"""Save a checkpoint and wait to be ended: as many ranks as there is room for go on from it."""


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
