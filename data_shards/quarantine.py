"""The record of damaged samples that a run met."""

import dataclasses
import json
import logging
from collections.abc import Iterable

from data_shards.assembly import Damage
from data_shards.store import Store

_logger = logging.getLogger(__name__)


class Quarantine:
    """One JSON line per damaged sample, in an object of any store.

    Object stores cannot append, so the object is replaced as a whole; the damage budget bounds it.

    Args:
        store: Where the record lies.
        name: Name of the object; it is made with the first damaged sample.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._lines: list[str] = []

    def add(self, damaged: Iterable[Damage]) -> None:
        """Record samples; a store that is away is logged and does not stop a run."""
        self._lines += [json.dumps(dataclasses.asdict(damage)) + "\n" for damage in damaged]
        try:
            self._store.write(self._name, "".join(self._lines).encode())
        except OSError as error:
            _logger.warning("%d damaged samples are not recorded: %s", len(self._lines), error)
