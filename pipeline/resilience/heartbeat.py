"""Last step and phase of every rank, in a key-value store that all ranks read; finds late ranks."""

import contextlib
import dataclasses
import datetime
import enum
import json
import os
import threading
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from pipeline.run.distributed import DistributedContext, listening_store

_CONNECT_S = 60
_MISSED_BEATS = 3
"""Beats that a rank may miss before it counts as silent."""


class Phase(enum.IntEnum):
    """Parts of a step, in their order."""

    DATA = 0
    STEP = 1
    CHECKPOINT = 2


@dataclasses.dataclass(frozen=True)
class Beat:
    """Where the training thread of one rank stands.

    Attributes:
        step: steps done before.
        phase: part of the step under way.
        overdue: it has been there for longer than it may.
        waits: it waits for other ranks.
        place: file, line and function that it executes.
        tick: differs from the beat before.
        begun: collectives that it has begun, as NCCL counts them; -1 where nobody does.
    """

    step: int
    phase: Phase
    overdue: bool
    waits: bool
    place: str
    tick: int
    begun: int = -1

    def __str__(self) -> str:
        doing = "waits for other ranks" if self.waits else "computes"
        counted = f", {self.begun} collectives begun" if self.begun >= 0 else ""
        return f"step {self.step + 1}, {self.phase.name.lower()}, {doing} at {self.place}{counted}"


def behind(beats: Sequence[Beat | None]) -> list[int]:
    """Ranks for which the others wait; empty if none stands out.

    Args:
        beats: of every rank; None where there is none any more, because the process has been
            stopped, or its machine or network is gone.
    """
    silent = [rank for rank, beat in enumerate(beats) if beat is None]
    if silent:
        return silent
    known = {rank: beat for rank, beat in enumerate(beats) if beat is not None}
    first = min((beat.step, beat.phase) for beat in known.values())
    late = [rank for rank, beat in known.items() if (beat.step, beat.phase) == first]
    if len(late) == len(known):  # all in the same part of the same step
        fewest = min(beat.begun for beat in known.values())
        late = [rank for rank, beat in known.items() if beat.begun == fewest]
    if len(late) == len(known):
        late = [rank for rank in late if not known[rank].waits]
    return late if len(late) < len(known) else []


class HeartbeatStore:
    """The last beat of every rank, in a key-value store in the memory of rank 0.

    A daemon thread of its own writes and reads, because a request to a stopped process never
    returns. Reading begins with the first call of `beats`: it costs as many messages as there are
    ranks.

    Args:
        world: the ranks; all construct it together.
        own: tells where this rank stands.
        interval_s: pause between two beats.
    """

    def __init__(
        self, world: DistributedContext, own: Callable[[], Beat], interval_s: float
    ) -> None:
        self._world, self._own, self._interval_s = world, own, interval_s
        self._store = _connect(world)
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._asking_since = 0.0
        self._names = [str(rank) for rank in range(world.size)]
        self._publish()
        # All have written once: a missing key would make multi_get wait for it.
        world.barrier()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def beats(self) -> list[Beat | None] | None:
        """Of every rank; None while it has not been watched for long enough to tell.

        A rank whose beat has not changed meanwhile has none.
        """
        now, limit_s = time.monotonic(), _MISSED_BEATS * self._interval_s
        if not self._wanted.is_set():
            self._asking_since = now
            # What was heard before says nothing of this silence.
            self._heard = {}
            self._wanted.set()
        if now - self._asking_since < limit_s:
            return None
        # A copy: the other thread adds to it meanwhile.
        heard = dict(self._heard)
        alive = {r: beat for r, (beat, when) in heard.items() if now - when < limit_s}
        ranks = range(self._world.size)
        if not alive:  # not even this rank: the one that serves the store does not answer
            return [None if rank == 0 else self._own() for rank in ranks]
        return [alive.get(rank) for rank in ranks]

    def rest(self) -> None:
        """Stop reading until the next call of `beats`."""
        self._wanted.clear()

    def close(self) -> None:
        """Stop beating."""
        self._closed.set()

    def _publish(self) -> None:
        text = json.dumps(dataclasses.asdict(self._own()))
        self._store.set(self._names[self._world.rank], text)

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # rank 0 has gone, and so will this one
            while not self._closed.wait(self._interval_s):
                self._publish()
                if self._wanted.is_set():
                    self._read(self._store.multi_get(self._names))

    def _read(self, answers: list[bytes]) -> None:
        now = time.monotonic()
        for rank, answer in enumerate(answers):
            body = json.loads(answer)
            beat = Beat(**{**body, "phase": Phase(body["phase"])})
            before = self._heard.get(rank)
            # The first one may be as old as the silence of its rank.
            if before is None:
                self._heard[rank] = (beat, float("-inf"))
            elif before[0].tick != beat.tick:
                self._heard[rank] = (beat, now)


def _connect(world: DistributedContext) -> dist.TCPStore:
    """The store: rank 0 keeps it, on the machine where it keeps that of the process group."""
    timeout = datetime.timedelta(seconds=_CONNECT_S)
    if world.rank == 0:
        store = listening_store(0, timeout)
        world.share(store.port)
    else:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = dist.TCPStore(host, world.share(None), is_master=False, timeout=timeout)
    return store
