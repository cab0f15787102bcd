"""Who evaluates what: claims in a folder that all schedulers share, on any store.

An evaluation has a key; each attempt at it is claimed by creating one object, which the store lets
one process do. The holder renews its claim by rewriting a second object and ends it with a third:

    KEY.0001.claim    who claimed attempt 1, created exclusively
    KEY.0001.beat     rewritten while the attempt is alive
    KEY.0001.end      how it ended

An attempt that shows no sign of life for `lease_s` is lost: whoever creates the next claim first
goes on. Ages are differences of two times of the store's own clock, so the clocks of the machines
do not matter. A holder that was away for so long stops itself (`Holding`), before it records
anything.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from data_shards.storage.store import Store
from jobs.evaluation.results import EvaluationError

logger = logging.getLogger(__name__)

LOST_CODE = 75
"""Exit code of a process whose claim was taken over."""
REFUSED_CODE = 2
"""Exit code of bad input, which will be refused again."""
STOPPED_CODES = (130, 143)
"""Exit codes of a process that was asked to stop: such an attempt does not count."""
_NAME = re.compile(r"(?P<key>[\w.-]+)\.(?P<attempt>\d{4})\.(?P<part>claim|beat|end)")


class ClaimPhase(Enum):
    """Where an evaluation stands: `waiting` after a failure for the time of the next attempt."""

    OPEN = "open"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Claim:
    """One attempt at one evaluation."""

    key: str
    attempt: int

    @property
    def name(self) -> str:
        """Prefix of the objects of this attempt."""
        return f"{self.key}.{self.attempt:04d}"

    @classmethod
    def parse(cls, name: str) -> Claim:
        """Inverse of `name`.

        Raises:
            EvaluationError: it is no name of a claim.
        """
        match = _NAME.fullmatch(f"{name}.claim")
        if match is None:
            raise EvaluationError(f"{name!r} is no claim such as 0123abcd.0001")
        return cls(match["key"], int(match["attempt"]))

    @property
    def next(self) -> Claim:
        """The attempt after this one."""
        return Claim(self.key, self.attempt + 1)


@dataclass(frozen=True)
class State:
    """What the folder says about one evaluation.

    Attributes:
        phase: where it stands.
        claim: the newest attempt.
        code: exit code of the newest attempt, if it has ended.
    """

    phase: ClaimPhase
    claim: Claim
    code: int | None = None


class Claims:
    """The folder of claims.

    Args:
        url: a folder on any store that can create objects exclusively (see `require_exclusive`).
        lease_s: seconds without a sign of life after which an attempt is lost.
        attempts: how often an evaluation is attempted.
    """

    def __init__(self, url: str, *, lease_s: float, attempts: int = 5) -> None:
        self._store = Store(url)
        self._lease_s = lease_s
        self._attempts = attempts
        self._me = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._ended: dict[Claim, int] = {}

    @property
    def store(self) -> Store:
        """Where the claims lie."""
        return self._store

    def require_exclusive(self) -> None:
        """Try that of two writers of one object the second one is refused.

        Raises:
            EvaluationError: the store lets both write, so that no claim would exclude anybody.
        """
        probe = f"probe.{self._me}"
        outcomes = [self._store.create(probe, text) for text in (b"first", b"second")]
        self._store.remove(probe)
        if outcomes != [True, False]:
            raise EvaluationError(
                f"{self._store} does not honour conditional writes (If-None-Match), so two "
                "schedulers could evaluate the same checkpoint: give --claims another store"
            )

    def states(self) -> dict[str, State]:
        """Return the state of every evaluation that was ever claimed: one listing."""
        parts: dict[str, dict[int, set[str]]] = {}
        for name in self._store.sizes():
            if match := _NAME.fullmatch(name):
                attempts = parts.setdefault(match["key"], {})
                attempts.setdefault(int(match["attempt"]), set()).add(match["part"])
        now = functools.cache(self.now)  # asked for only where an age matters
        return {key: self._state(key, attempts, now) for key, attempts in parts.items()}

    def now(self) -> float:
        """Return the time of the store's clock, in seconds since the epoch."""
        name = f"clock.{self._me}"
        self._store.write(name, b"")
        now = self._store.modified(name)
        self._store.remove(name)
        return now

    def take(self, claim: Claim, body: Mapping[str, Any]) -> bool:
        """Claim an attempt; True for one process only."""
        text = json.dumps({**body, "by": self._me, "at": time.time()}, indent=1)
        return self._store.create(f"{claim.name}.claim", text.encode())

    def read(self, claim: Claim) -> dict[str, Any]:
        """Return what the process that claimed an attempt wrote down."""
        body: dict[str, Any] = json.loads(self._store.read(f"{claim.name}.claim"))
        return body

    def beat(self, claim: Claim) -> None:
        """Show that an attempt is alive."""
        self._store.write(f"{claim.name}.beat", self._me.encode())

    def end(self, claim: Claim, code: int) -> None:
        """Say how an attempt ended; the first word counts."""
        text = json.dumps({"code": code, "by": self._me, "at": time.time()})
        self._store.create(f"{claim.name}.end", text.encode())

    def is_held(self, claim: Claim) -> bool:
        """Whether an attempt is still the newest one and has not ended."""
        exists = self._store.exists
        return not (exists(f"{claim.next.name}.claim") or exists(f"{claim.name}.end"))

    def _state(self, key: str, attempts: Mapping[int, set[str]], now: Callable[[], float]) -> State:
        claim = Claim(key, max(attempts))
        parts = attempts[claim.attempt]
        if "end" not in parts:
            part = "beat" if "beat" in parts else "claim"
            if self._age(f"{claim.name}.{part}", now) <= self._lease_s:
                return State(ClaimPhase.RUNNING, claim)
            return State(self._again(key, attempts), claim)
        code = self._code(claim)
        if code == 0:
            return State(ClaimPhase.DONE, claim, code)
        if code == REFUSED_CODE:
            return State(ClaimPhase.FAILED, claim, code)
        phase = self._again(key, attempts)
        pause = 0.0 if code >= 128 else self._lease_s * 2.0 ** (claim.attempt - 1)
        if phase is ClaimPhase.OPEN and pause and self._age(f"{claim.name}.end", now) < pause:
            phase = ClaimPhase.WAITING
        return State(phase, claim, code)

    def _again(self, key: str, attempts: Mapping[int, set[str]]) -> ClaimPhase:
        codes = [
            self._code(Claim(key, attempt)) if "end" in parts else None
            for attempt, parts in attempts.items()
        ]
        counted = sum(code not in STOPPED_CODES for code in codes)
        return ClaimPhase.OPEN if counted < self._attempts else ClaimPhase.FAILED

    def _age(self, name: str, now: Callable[[], float]) -> float:
        try:
            return now() - self._store.modified(name)
        except FileNotFoundError:  # removed by a person in between
            return 0.0

    def _code(self, claim: Claim) -> int:
        if claim not in self._ended:  # it never changes
            self._ended[claim] = int(json.loads(self._store.read(f"{claim.name}.end"))["code"])
        return self._ended[claim]


class Holding:
    """A claim that this process keeps alive from a thread until it is ended or lost.

    Args:
        claims: the folder.
        claim: the attempt, which somebody has claimed for this process.
        lease_s: as the schedulers know it.
        lost: called in the thread when the claim is lost; must end the process.
    """

    def __init__(
        self, claims: Claims, claim: Claim, *, lease_s: float, lost: Callable[[str], None]
    ) -> None:
        self._claims = claims
        self._claim = claim
        self._lease_s = lease_s
        self._lost = lost
        self._renewed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Renew the claim for the duration of the block."""
        self.renew()
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def renew(self) -> None:
        """Show a sign of life and check that the claim still holds: the last step before a record.

        The order matters: after the sign of life nobody takes the claim over for `lease_s`.
        """
        began = time.monotonic()
        self._claims.beat(self._claim)
        if not self._claims.is_held(self._claim):
            self._lost(f"attempt {self._claim.name} was taken over")
        self._renewed = began

    def _keep(self) -> None:
        while not self._stop.wait(self._lease_s / 4):
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        try:
            self.renew()
        except OSError as error:
            logger.warning("claim %s: %s", self._claim.name, error)
            if time.monotonic() - self._renewed > self._lease_s:
                self._lost(f"claim {self._claim.name} could not be renewed: {error}")
