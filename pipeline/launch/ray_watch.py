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
from pipeline.run.exposure import split_address

_LOOK_S = 0.2
_SILENT_S = 20.0
"""A server that refuses connections for so long is dead; one that is started again is waited for.
Ray's own patience is 60 s, after which it aborts the process."""
_CONNECT_S = 2.0
_PAUSE_S = 2.0
_END_S = 25.0
"""How long a process whose Ray is lost may take to record that and to end; then Ray would abort."""


class RayServers:
    """The two servers of Ray without which this process cannot go on: its raylet and the GCS.

    Args:
        raylet: path of the raylet's socket on this machine.
        gcs: HOST:PORT of the GCS.
    """

    def __init__(self, raylet: str, gcs: str) -> None:
        self._where: dict[str, tuple[socket.AddressFamily, Any]] = {
            "the raylet of this machine": (socket.AF_UNIX, raylet)
        }
        host, port = split_address(gcs)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._where["the GCS of the Ray cluster"] = (family, (host, port))
        self._seen = dict.fromkeys(self._where, time.monotonic())
        self._next = 0.0
        self.lost = threading.Event()

    @classmethod
    def of_this_process(cls) -> "RayServers":
        """Those that this process is connected to."""
        from ray._private import worker

        node: Any = worker._global_node
        return cls(node.raylet_socket_name, node.gcs_address)

    def require(self, silent_s: float = _SILENT_S) -> None:
        """Look at them, at most every few seconds.

        Args:
            silent_s: a server that has not answered for so long counts as dead.

        Raises:
            ProcessDiedError: one of them has died; `lost` is set.
        """
        if time.monotonic() < self._next:
            return
        for name, (family, address) in self._where.items():
            if _answers(family, address):
                self._seen[name] = time.monotonic()
            elif time.monotonic() - self._seen[name] > silent_s:
                self.lost.set()
                raise ProcessDiedError(f"{name} has died")
        self._next = time.monotonic() + _PAUSE_S

    def require_after(self, error: BaseException) -> None:
        """An error of Ray has come: wait until it is certain that the servers are not the cause.

        Raises:
            ProcessDiedError: they are.
        """
        deadline = time.monotonic() + _PAUSE_S
        while time.monotonic() < deadline:
            self._next = 0.0
            try:
                self.require(silent_s=_PAUSE_S)
            except ProcessDiedError as died:
                raise died from error
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
        servers.require()
    done.result()


@contextlib.contextmanager
def ends_in_time(servers: RayServers, end_s: float = _END_S) -> Iterator[None]:
    """Whatever waits for a Ray that is lost ends with this process, after the block and some time.

    The clients of Ray have no limits of their own: its shutdown, tasks of evaluations.
    """
    try:
        yield
    except ProcessDiedError as error:
        if servers.lost.is_set():
            timer = threading.Timer(end_s, _end, [str(error)])
            timer.daemon = True
            timer.start()
        raise


def _end(why: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"failed: {why}\n")
        sys.stderr.flush()
    os._exit(1)
