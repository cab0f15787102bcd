"""One writer at a time: leases in a folder on any store, for training runs and for evaluations.

What is to be held has a key; each holder of it gets the next number, by creating one object, which
the store lets one process do. It renews its lease by rewriting a second object and ends it with a
third:

    KEY.0001.claim    who holds number 1, created exclusively
    KEY.0001.beat     rewritten while the holder is alive
    KEY.0001.end      how it ended

A holder that has shown no sign of life for `lease_s` has lost its lease: whoever creates the next
number first goes on. One whose process is dead, by the process table of the same machine, has lost
it at once. Ages are differences of two times of the store's own clock, so the clocks of the
machines do not matter.

A process that stood still for longer than its lease does not know that it lost it. So the number is
a fencing number: what a run's holder commits lies under its number (`pipeline.run.layout`), and a
reader takes nothing that an earlier holder has added since the next one began (`Fence`). Files
that are rewritten have it in their names, and the claim holds what they were (`read_record`).
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import Self

from data_shards.errors import ShardError
from data_shards.storage.store import Store
from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.limits import UntrustedError
from pipeline.errors import PipelineError
from pipeline.run.layout import LEASES, RECORDS, record

logger = logging.getLogger(__name__)

RUN_LEASE_S = 60.0
"""Lease of a training run: it is renewed four times as often."""
_RUN_KEY = "run"
_RENEWALS = 4
"""Of a lease, within its length: three may fail."""
_POLL_S = 2.0
_NAME = re.compile(r"(?P<key>[\w.-]+)\.(?P<number>\d{4,})\.(?P<part>claim|beat|end)")


class LeaseError(PipelineError):
    """A lease cannot be had: another process holds it, or the store cannot exclude anybody."""


class LeaseHeldError(LeaseError):
    """Another process holds the lease."""


@dataclasses.dataclass(frozen=True)
class Lease:
    """The right of one process to write, by its number."""

    key: str
    number: int

    @property
    def name(self) -> str:
        """Prefix of the objects of this lease."""
        return f"{self.key}.{self.number:04d}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Inverse of `name`.

        Raises:
            LeaseError: it is no name of a lease.
        """
        match = _NAME.fullmatch(f"{name}.claim")
        if match is None:
            raise LeaseError(f"{name!r} is no lease such as 0123abcd.0001")
        return cls(match["key"], int(match["number"]))

    @property
    def next(self) -> Self:
        """The lease after this one."""
        return dataclasses.replace(self, number=self.number + 1)


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, so that another one on the same machine can tell whether it is alive.

    Attributes:
        host: name of the machine.
        boot: id of its boot; another one means nothing, several machines may share a name.
        namespace: in which the number is valid: containers of one machine have their own.
        pid: number of the process.
        started: its start in ticks since the boot, as numbers are given out again.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Self:
        """The calling process."""
        boot, namespace = "", ""
        with contextlib.suppress(OSError):  # there is a /proc on Linux only
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        _, started = _state_and_start(os.getpid())
        return cls(socket.gethostname(), boot, namespace, os.getpid(), started)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Inverse of `dump`; None for anything else."""
        try:
            return cls(**parse_object(data, "a sign of life"))
        except (ValueError, TypeError):
            return None

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()

    def is_dead(self) -> bool:
        """True if it is certain that the process has ended; False for one of another machine."""
        here = Process.this()
        place = (self.host, self.boot, self.namespace)
        if not self.boot or not self.started or place != (here.host, here.boot, here.namespace):
            return False
        state, started = _state_and_start(self.pid)
        # A zombie has ended; its parent has not asked how.
        return started != self.started or state in ("Z", "X")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _state_and_start(pid: int) -> tuple[str, str]:
    """State and start of a process by /proc/PID/stat; empty where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], fields[19]


class LeaseFolder:
    """The folder of leases.

    Args:
        store: a folder on any store that can create objects exclusively (see `require_exclusive`).
        lease_s: seconds without a sign of life after which a lease is lost.
    """

    def __init__(self, store: Store, *, lease_s: float) -> None:
        self.store = store
        self.lease_s = lease_s
        self.process = Process.this()
        self._me = f"{self.process.host}-{self.process.pid}-{uuid.uuid4().hex[:8]}"

    def require_exclusive(self) -> None:
        """Try that of two writers of one object the second one is refused.

        Raises:
            LeaseError: the store lets both write, so that no lease would exclude anybody.
        """
        probe = f"probe.{self._me}"
        outcomes = [self.store.create(probe, text) for text in (b"first", b"second")]
        self.store.remove(probe)
        if outcomes != [True, False]:
            raise LeaseError(
                f"{self.store} does not honour conditional writes (If-None-Match), so it cannot "
                "keep two processes from writing the same: give another store"
            )

    def parts(self) -> dict[str, dict[int, set[str]]]:
        """What there is of every lease, by key and number: one listing."""
        found: dict[str, dict[int, set[str]]] = {}
        for name in self.store.sizes():
            if match := _NAME.fullmatch(name):
                numbers = found.setdefault(match["key"], {})
                numbers.setdefault(int(match["number"]), set()).add(match["part"])
        return found

    def now(self) -> float:
        """Return the time of the store's clock, in seconds since the epoch."""
        name = f"clock.{self._me}"
        self.store.write(name, b"")
        now = self.store.modified(name)
        self.store.remove(name)
        return now

    def take(self, lease: Lease, body: Mapping[str, Any]) -> bool:
        """Take a lease that nobody has had; True for one process only."""
        text = json.dumps({**body, "by": self._me, "at": time.time()}, indent=1)
        return self.store.create(f"{lease.name}.claim", text.encode())

    def read(self, lease: Lease) -> dict[str, Any]:
        """Return what the process that took a lease wrote down."""
        return self.store.read_object(f"{lease.name}.claim")

    def beat(self, lease: Lease, holder: Process | None = None) -> None:
        """Show that a holder is alive.

        Args:
            lease: what it holds.
            holder: the process whose death ends the lease; None: only silence ends it.
        """
        self.store.write(f"{lease.name}.beat", holder.dump() if holder else b"")

    def end(self, lease: Lease, code: int) -> None:
        """Say how a holder ended; the first word counts."""
        text = json.dumps({"code": code, "by": self._me, "at": time.time()})
        self.store.create(f"{lease.name}.end", text.encode())

    def is_held(self, lease: Lease) -> bool:
        """Whether a lease is still the newest one and has not ended."""
        exists = self.store.exists
        return not (exists(f"{lease.next.name}.claim") or exists(f"{lease.name}.end"))

    def is_lost(self, lease: Lease, parts: set[str], now: Callable[[], float]) -> bool:
        """Whether the holder of a lease that has not ended is dead or silent.

        Args:
            lease: which.
            parts: what there is of it.
            now: the time of the store's clock.
        """
        sign = f"{lease.name}.{'beat' if 'beat' in parts else 'claim'}"
        if self.age(sign, now) > self.lease_s:
            return True
        holder = self.holder(lease) if "beat" in parts else None
        return holder is not None and holder.is_dead()

    def holder(self, lease: Lease) -> Process | None:
        """The process that has shown the last sign of life, as far as it is known."""
        try:
            return Process.parse(self.store.read(f"{lease.name}.beat", limit="json_bytes"))
        except (FileNotFoundError, UntrustedError):
            return None

    def age(self, name: str, now: Callable[[], float]) -> float:
        """Seconds since an object was written, by the store's clock."""
        try:
            return now() - self.store.modified(name)
        except FileNotFoundError:  # removed by a person in between
            return 0.0


class Holding:
    """A lease that this process renews from a thread until it is ended or lost.

    Args:
        folder: of the lease.
        lease: what somebody has taken for this process.
        lost: called in the thread when the lease is lost; must end the process.
        outlasts_store: a store that does not answer ends nothing: the holder goes on until it
            learns that another one has begun. For one whose results are fenced; others have to
            stop when they could not renew for the length of the lease.
    """

    def __init__(
        self,
        folder: LeaseFolder,
        lease: Lease,
        *,
        lost: Callable[[str], None],
        outlasts_store: bool = False,
    ) -> None:
        self._folder = folder
        self.lease = lease
        self._lost = lost
        self._outlasts_store = outlasts_store
        self._renewed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Renew the lease for the duration of the block."""
        self.renew()
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def renew(self) -> None:
        """Show a sign of life and check that the lease still holds: the last step before a record.

        The order matters: after the sign of life nobody takes the lease over for its length.
        """
        began = time.monotonic()
        self._folder.beat(self.lease, self._folder.process)
        if not self._folder.is_held(self.lease):
            self._lost(f"lease {self.lease.name} was taken over")
        self._renewed = began

    def _keep(self) -> None:
        while not self._stop.wait(self._folder.lease_s / _RENEWALS):
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        try:
            self.renew()
        except (OSError, ShardError) as error:
            logger.warning("lease %s: %s", self.lease.name, error)
            silent = time.monotonic() - self._renewed > self._folder.lease_s
            if silent and not self._outlasts_store:
                self._lost(f"lease {self.lease.name} could not be renewed: {error}")


@dataclasses.dataclass(frozen=True)
class Fence:
    """Which checkpoints of a run count.

    Attributes:
        number: of the newest lease of the run; 0 if there was none.
        after: the newest step that was committed when this lease was taken, -1 if none was.
    """

    number: int = 0
    after: int = -1

    def admits(self, writer: int, step: int) -> bool:
        """Whether the commit of a step counts, by the number of its writer.

        What an earlier writer has committed since the newest lease was taken does not: that
        process stood still, lost its lease and woke up.
        """
        return writer >= self.number or step <= self.after


def fence(run: Store) -> Fence:
    """The fence of a run, by its newest lease.

    Raises:
        PipelineError: that lease cannot be read.
    """
    number, body = _newest_claim(run)
    return Fence(number, body["after"])


def read_record(run: Store, name: str) -> bytes | None:
    """One of `layout.RECORDS` as the newest holder of the run has it; None if there is none.

    It is what that holder has written, else what there was when it took the lease: what an earlier
    one writes afterwards does not count.

    Raises:
        PipelineError: the newest lease cannot be read.
        OSError: the store refused.
    """
    number, body = _newest_claim(run)
    for found in (record(name, number), name):
        if run.exists(found):
            return run.read(found, limit="json_bytes")
        if found != name and (text := body["records"].get(name)) is not None:
            return str(text).encode()
    return None


def read_record_object(run: Store, name: str) -> dict[str, Any] | None:
    """As `read_record`, the JSON object that it holds.

    Raises:
        PipelineError, OSError: see `read_record`.
        UntrustedError: too large, too deep, or no JSON object.
    """
    data = read_record(run, name)
    return None if data is None else parse_object(data, f"{run}/{name}")


def write_record(run: Store, name: str, writer: int, data: bytes) -> None:
    """Write one of `layout.RECORDS` under the number of the lease that this process holds.

    Raises:
        OSError: the store refused.
    """
    run.write(record(name, writer), data)


def _newest_claim(run: Store) -> tuple[int, dict[str, Any]]:
    """Number and body of the newest lease of a run, 0 if there was none."""
    folder = _folder(run)
    numbers = folder.parts().get(_RUN_KEY)
    if not numbers:
        return 0, {"after": -1, "records": {}}
    lease = Lease(_RUN_KEY, max(numbers))
    try:
        body = folder.read(lease)
        return lease.number, {"after": int(body["after"]), "records": dict(body.get("records", {}))}
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{folder.store}/{lease.name}.claim is damaged: {error!r}") from error


def _records(run: Store) -> dict[str, str]:
    found = {name: read_record(run, name) for name in RECORDS}
    return {name: data.decode() for name, data in found.items() if data is not None}


@contextlib.contextmanager
def hold_run(
    run: Store,
    *,
    newest_step: Callable[[], int],
    lost: Callable[[str], None],
    waiting: Callable[[str], None] | None = None,
    lease_s: float = RUN_LEASE_S,
) -> Iterator[Lease]:
    """Be the one writer of a run for the duration of the block.

    Args:
        run: folder of the run.
        newest_step: the newest committed step, -1 if there is none.
        lost: called from a thread when another process has taken over; must end this one, as
            `end_without_lease` does.
        waiting: is told who holds the run, and the wait goes on; None: the run is refused.
        lease_s: see LeaseFolder; the same for everybody.

    Raises:
        LeaseHeldError: another process writes this run.
        LeaseError: the store cannot exclude anybody.
        OSError: the store refused.
    """
    folder = _folder(run, lease_s)
    if run.local_path() is None:
        folder.require_exclusive()
    lease = _take_run(folder, run, newest_step, waiting)
    code = 1
    try:
        with Holding(folder, lease, lost=lost, outlasts_store=True)():
            yield lease
        code = 0
    finally:
        with contextlib.suppress(OSError, ShardError):  # its silence ends the lease as well
            folder.end(lease, code)


def end_without_lease(why: str) -> None:
    """End this process at once: what it writes from now on would be written twice."""
    text = f"{why} by another process, which trains this run now: this one ends\n"
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
    os._exit(1)


def _folder(run: Store, lease_s: float = RUN_LEASE_S) -> LeaseFolder:
    return LeaseFolder(run.child(LEASES), lease_s=lease_s)


def _take_run(
    folder: LeaseFolder,
    run: Store,
    newest_step: Callable[[], int],
    waiting: Callable[[str], None] | None,
) -> Lease:
    while True:
        numbers = folder.parts().get(_RUN_KEY, {})
        lease = Lease(_RUN_KEY, max(numbers, default=0))
        parts = numbers.get(lease.number, {"end"})
        now = functools.cache(folder.now)
        if "end" in parts or folder.is_lost(lease, parts, now):
            if folder.take(lease.next, {"after": newest_step(), "records": _records(run)}):
                return lease.next
            continue  # another process was faster
        held = f"run {run} is written by {_describe(folder, lease, now)}"
        if waiting is None:
            raise LeaseHeldError(
                f"{held}: two processes would overwrite each other. Give another --name, or "
                "--wait-for-lease to go on when it has ended"
            )
        waiting(held)
        time.sleep(_POLL_S)


def _describe(folder: LeaseFolder, lease: Lease, now: Callable[[], float]) -> str:
    since = folder.age(f"{lease.name}.claim", now)
    silent = folder.age(f"{lease.name}.beat", now)
    holder = folder.holder(lease) or "another process"
    return f"{holder} (for {since:.0f} s, last sign of life {silent:.0f} s ago)"
