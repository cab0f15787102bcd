"""The record of damaged samples that a run met."""

import concurrent.futures
import dataclasses
import json
import logging
from collections.abc import Iterable

from data_shards.storage.store import Store
from data_shards.streaming.batcher import Corruption

_logger = logging.getLogger(__name__)


class CorruptionLog:
    """One JSON line per damaged sample, in an object of any store.

    Object stores cannot append, so the object is replaced as a whole; the damage budget bounds it.
    A thread of its own writes: training waits for no store.

    Args:
        store: Where the record lies.
        name: Name of the object; it is made with the first damaged sample.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._lines: list[str] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="corruption-log")

    def add(self, damaged: Iterable[Corruption]) -> None:
        """Record samples, soon; a store that is away is logged and does not stop a run."""
        self._lines += [json.dumps(dataclasses.asdict(damage)) + "\n" for damage in damaged]
        self._pool.submit(self._write, list(self._lines))

    def close(self) -> None:
        """Wait until everything is recorded."""
        self._pool.shutdown(wait=True)

    def _write(self, lines: list[str]) -> None:
        try:
            self._store.write(self._name, "".join(lines).encode())
        except OSError as error:
            _logger.warning("%d damaged samples are not recorded: %s", len(lines), error)
