"""The run's event log: `events.jsonl`, one line for everything that is not a metric."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from data_shards.storage.store import Store
from pipeline.run.append_log import AppendLog
from pipeline.run.events import Event, Metrics, MetricsReplayed
from pipeline.run.layout import EVENTS


class EventLog:
    """Writes what happened to a run: starts, checkpoints, skipped steps, roll-backs, repairs.

    Args:
        folder: where the file lies on this machine; all executions of a run append to it.
        run: folder of the run; what an execution on another machine left there comes first.
    """

    def __init__(self, folder: Path, run: Store) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = run
        path = folder / EVENTS
        if run.local_path() is None and not path.exists() and run.exists(EVENTS):
            path.write_bytes(run.read(EVENTS))
        self._lines = AppendLog(path)

    def add(self, event: Event) -> None:
        """Write an event that is no metric: its type, when, and its fields."""
        if not isinstance(event, Metrics | MetricsReplayed):
            self.note(type(event).__name__, **dataclasses.asdict(event))

    def note(self, what: str, **facts: Any) -> None:
        """Write a line; `facts` are JSON values."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self._lines.append(json.dumps({"event": what, "time": now, **facts}).encode() + b"\n")

    def publish(self) -> None:
        """Copy the log into the run's folder where that is on no disk of this machine.

        Raises:
            OSError: the store refused.
        """
        self._lines.flush()
        if self._run.local_path() is None:
            self._run.write(EVENTS, self._lines.path.read_bytes())
