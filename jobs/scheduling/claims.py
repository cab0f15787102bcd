"""Who evaluates what: claims in a folder that all schedulers share, on any store.

An evaluation has a key; each attempt at it is a lease of that key (`pipeline.run.lease`), whose
number counts the attempts. How an attempt ended decides whether there is another one: the end of
its lease holds the exit code. A holder that was away for longer than its lease stops itself
(`Holding`), before it records anything.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from data_shards.storage.store import Store
from pipeline.run.lease import Lease, LeaseFolder

logger = logging.getLogger(__name__)

LOST_CODE = 75
"""Exit code of a process whose claim was taken over."""
REFUSED_CODE = 2
"""Exit code of bad input, which will be refused again."""
STOPPED_CODES = (130, 143)
"""Exit codes of a process that was asked to stop: such an attempt does not count."""


class ClaimPhase(Enum):
    """Where an evaluation stands: `waiting` after a failure for the time of the next attempt."""

    OPEN = "open"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class State:
    """What the folder says about one evaluation.

    Attributes:
        phase: where it stands.
        claim: the newest attempt.
        code: exit code of the newest attempt, if it has ended.
    """

    phase: ClaimPhase
    claim: Lease
    code: int | None = None


class Claims(LeaseFolder):
    """The folder of claims.

    Args:
        url: a folder on any store that can create objects exclusively (see `require_exclusive`).
        lease_s: seconds without a sign of life after which an attempt is lost.
        attempts: how often an evaluation is attempted.
    """

    def __init__(self, url: str, *, lease_s: float, attempts: int = 5) -> None:
        super().__init__(Store(url), lease_s=lease_s)
        self._attempts = attempts
        self._ended: dict[Lease, int] = {}

    def states(self) -> dict[str, State]:
        """Return the state of every evaluation that was ever claimed: one listing."""
        now = functools.cache(self.now)  # asked for only where an age matters
        return {key: self._state(key, attempts, now) for key, attempts in self.parts().items()}

    def _state(self, key: str, attempts: Mapping[int, set[str]], now: Callable[[], float]) -> State:
        claim = Lease(key, max(attempts))
        parts = attempts[claim.number]
        if "end" not in parts:
            if not self.is_lost(claim, parts, now):
                return State(ClaimPhase.RUNNING, claim)
            return State(self._again(key, attempts), claim)
        code = self._code(claim)
        if code == 0:
            return State(ClaimPhase.DONE, claim, code)
        if code == REFUSED_CODE:
            return State(ClaimPhase.FAILED, claim, code)
        phase = self._again(key, attempts)
        pause = 0.0 if code >= 128 else self.lease_s * 2.0 ** (claim.number - 1)
        if phase is ClaimPhase.OPEN and pause and self.age(f"{claim.name}.end", now) < pause:
            phase = ClaimPhase.WAITING
        return State(phase, claim, code)

    def _again(self, key: str, attempts: Mapping[int, set[str]]) -> ClaimPhase:
        codes = [
            self._code(Lease(key, attempt)) if "end" in parts else None
            for attempt, parts in attempts.items()
        ]
        counted = sum(code not in STOPPED_CODES for code in codes)
        return ClaimPhase.OPEN if counted < self._attempts else ClaimPhase.FAILED

    def _code(self, claim: Lease) -> int:
        if claim not in self._ended:  # it never changes
            try:
                code = int(self.store.read_object(f"{claim.name}.end")["code"])
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s/%s.end counts as a failure: %s", self.store, claim.name, error)
                code = 1
            self._ended[claim] = code
        return self._ended[claim]
