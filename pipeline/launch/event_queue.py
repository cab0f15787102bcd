"""Carries the events of the ranks to the driver.

Its actor is a process of its own beside the driver, so this file imports nothing that takes long.
"""

from typing import Any

from pipeline.run.events import Event


class EventQueue:
    """Actor that holds events until they are fetched.

    It handles one call after the other, so those of a rank stay in order; Ray's queue is
    asynchronous, and on a busy machine records came out of order.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        """Hold an event."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """All that are held, which are then let go."""
        events, self._events = self._events, []
        return events

    def arrived(self) -> None:
        """Answers once all that the caller has put before is held."""


class EventSender:
    """Worker side of the events; sending never waits.

    Args:
        actor: handle of the EventQueue.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __call__(self, event: Event) -> None:
        """Send an event."""
        self._actor.put.remote(event)

    def wait(self) -> None:
        """Wait until everything sent by this process is held."""
        import ray

        ray.get(self._actor.arrived.remote())
