"""Waiting for Ray without being lost with it.

A call to Ray whose servers have died may wait for ever, or end the whole process with a dump of its
state. So it is made on a thread, and the servers are looked at from outside.
"""

import concurrent.futures
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import ProcessDiedError
from pipeline.run.server_exposure import split_address

_LOOK_S = 0.2
_GCS = "the GCS of the Ray cluster"
_RAYLET = "the raylet of this machine"
_SILENT_S = {_GCS: 20.0, _RAYLET: 5.0}
"""A server that refuses connections for so long is dead. A GCS may be started again: Ray waits 60 s
for it before it aborts the process. A raylet never is, and Ray gives it up after 12 s."""
_CONNECT_S = 2.0
_PAUSE_S = 2.0
"""Between two looks, and after an error of Ray: as long may a server that is gone seem alive."""
_END_S = 25.0
"""How long a process whose Ray is lost may take to record that and to end; then Ray would abort."""


class RayServers:
    """The two servers of Ray without which this process cannot go on: its raylet and the GCS.

    Args:
        raylet: path of the raylet's socket on this machine.
        gcs: HOST:PORT of the GCS.

    Attributes:
        lost: one of them has died.
        died: which one, in words.
        on_loss: called by `watched` before it ends the process.
    """

    def __init__(self, raylet: str, gcs: str) -> None:
        self._where: dict[str, tuple[socket.AddressFamily, Any]] = {
            _RAYLET: (socket.AF_UNIX, raylet)
        }
        host, port = split_address(gcs)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._where[_GCS] = (family, (host, port))
        self._silent: dict[str, float] = {}
        self.lost = threading.Event()
        self.on_loss: Callable[[], object] = lambda: None
        self.died = ""

    @classmethod
    def of_this_process(cls) -> "RayServers":
        """Those that this process is connected to."""
        from ray._private import worker

        node: Any = worker._global_node
        return cls(node.raylet_socket_name, node.gcs_address)

    def require(self, silent_s: float | None = None) -> None:
        """Look whether they answer.

        Args:
            silent_s: a server that has not answered for so long counts as dead.

        Raises:
            ProcessDiedError: one of them has died; `lost` is set.
        """
        for name, (family, address) in self._where.items():
            limit = _SILENT_S[name] if silent_s is None else silent_s
            if _answers(family, address):
                self._silent.pop(name, None)
            # Since the first failure: this process may have stood still since the look before.
            elif time.monotonic() - self._silent.setdefault(name, time.monotonic()) > limit:
                self.died = f"{name} has died"
                self.lost.set()
        self.require_known()

    def require_known(self) -> None:
        """As `require`, by what the last look has found.

        Raises:
            ProcessDiedError: one of them has died.
        """
        if self.lost.is_set():
            raise ProcessDiedError(self.died)

    def require_after(self, error: BaseException) -> None:
        """An error of Ray has come: wait until it is certain that the servers are not its cause.

        Raises:
            ProcessDiedError: they are.
        """
        deadline = time.monotonic() + _PAUSE_S
        while True:
            try:
                self.require(silent_s=_PAUSE_S)
            except ProcessDiedError as died:
                raise died from error
            if time.monotonic() > deadline:
                return
            time.sleep(_LOOK_S)


def _answers(family: socket.AddressFamily, address: Any) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as connection:
        connection.settimeout(_CONNECT_S)
        connection.connect(address)
        return True
    return False


def wait_for(call: Callable[[], object], servers: RayServers) -> None:
    """Make a call to Ray on a thread and wait for its end.

    Raises:
        BaseException: what it has raised.
        ProcessDiedError: a server of Ray has died; the call is left alone.
    """
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    while not done.done():
        concurrent.futures.wait([done], timeout=_LOOK_S)
        servers.require_known()
    done.result()


@contextlib.contextmanager
def watched(end_s: float = _END_S) -> Iterator[RayServers]:
    """Look at Ray's servers for the duration of the block, from a thread.

    When one has died, calls by `wait_for` are left alone. Whatever else waits for Ray then (its
    shutdown, tasks of evaluations: its clients have no limits of their own) ends with this process.

    Args:
        end_s: how long it may take until then to record the failure and to end by itself.
    """
    servers = RayServers.of_this_process()
    done = threading.Event()

    def look() -> None:
        with contextlib.suppress(ProcessDiedError):
            while not done.wait(_PAUSE_S):
                servers.require()
            return
        time.sleep(end_s)
        with contextlib.suppress(Exception):  # all that is left is to end
            servers.on_loss()
            time.sleep(_PAUSE_S)
        _end(servers.died)

    threading.Thread(target=look, name="ray-watch", daemon=True).start()
    try:
        yield servers
    finally:
        done.set()


def _end(why: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"failed: {why}; --resume goes on after the newest checkpoint\n")
        sys.stderr.flush()
    os._exit(1)
