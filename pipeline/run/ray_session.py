"""Starts Ray or joins a cluster: for training, evaluation, prediction, tests and benchmarks alike.

A Ray that is started here serves this process alone. Every socket of it listens on the loopback
device, it asks for a token that is drawn anew at every start, and token, logs and unix sockets lie
in a folder that only this account can enter and that goes with it.

A cluster that is joined has been judged before (`pipeline.run.server_exposure`).
"""

import contextlib
import importlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_shards.untrusted.import_guard import hidden_by
from pipeline.run.server_exposure import own_addresses, require_closed, split_address

_LOOPBACK = "127.0.0.1"
_CONNECT_S = 3.0
_LINE = 300
_LOOPBACK_ONLY = {
    # Without it Ray replaces 127.0.0.1 by the machine's outward address, and its servers listen
    # there or on all devices. Its processes inherit it, also those that are started again.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def cluster_address(named: str = "") -> str:
    """Address of the cluster to join: the named one, else RAY_ADDRESS; empty: start a Ray.

    Raises:
        ConnectionError: `auto`, and no cluster was started on this machine; or a dashboard.
    """
    address = named or os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise ConnectionError(
            f"Ray cluster {address!r}: a dashboard takes jobs (`ray job submit`); a driver joins "
            "at HOST:PORT of the GCS, by default port 6379"
        )
    if address == "auto":
        from ray._private.services import find_bootstrap_address

        address = find_bootstrap_address(None) or ""
        if not address:
            raise ConnectionError("no Ray cluster was started on this machine")
    return "" if address == "local" else address


@contextlib.contextmanager
def ray_session(address: str = "", *, num_cpus: int | None = None) -> Iterator[Any]:
    """Yield the ray module, connected; what was started or joined here ends with the session.

    Inside of a session, or where Ray is already in use, that Ray is used.

    Args:
        address: cluster to join; empty: that of RAY_ADDRESS, else a Ray of this process.
        num_cpus: logical CPUs of a Ray that is started; default: those of the machine.

    Raises:
        ExposureError: the cluster serves strangers.
        ConnectionError: no cluster answers at the address, or a file of the current folder, which
            Ray's processes search first, hides a package of this project.
        ImportError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning
    import ray

    if ray.is_initialized():
        yield ray
        return
    if hidden := hidden_by(Path.cwd()):
        raise ConnectionError(hidden)
    address = cluster_address(address)
    require_closed(ray=address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        if address:
            options["address"] = address
            stack.enter_context(_environment(_LOOPBACK_ONLY if _on_loopback(address) else {}))
        else:
            folder = Path(stack.enter_context(_private_folder()))
            stack.enter_context(_environment({**_LOOPBACK_ONLY, **_token(folder / "token")}))
            options |= {
                "address": "local",
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "_node_ip_address": _LOOPBACK,
                "_temp_dir": str(folder / "ray"),  # which Ray opens to all accounts
            }
        stack.callback(ray.shutdown)  # also after a start that failed half-way
        ray.init(**options)
        _first_lines_only()
        yield ray


def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of mode 700 with a short path: it will hold unix sockets."""
    return tempfile.TemporaryDirectory(
        prefix="ray-", dir=os.environ.get("RAY_TMPDIR"), ignore_cleanup_errors=True
    )


def _token(path: Path) -> dict[str, str | None]:
    """Draw a token into a file of mode 600; the settings by which Ray finds it.

    It is in a file because arguments and environments can be read by others.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(path),
        "RAY_AUTH_TOKEN": None,  # it would win, and it is that of another cluster
    }


@contextlib.contextmanager
def _environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables (None: remove) for Ray's processes and for Ray in this one; undo it later."""
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # What Ray has read when it was imported, or in a session before.
    from ray._private import ray_constants

    raylet: Any = importlib.import_module("ray._raylet")  # its stubs lack both names
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, not ray_constants.IS_WINDOWS_OR_OSX
    )
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _first_lines_only() -> None:
    """Of what Ray says about its own processes: the rest is a dump of their state."""
    from ray._private import worker

    genuine = worker.print_to_stdstream

    def shorten(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line[:_LINE] for text in data["lines"] for line in text.splitlines()[:1]]
        genuine({**data, "lines": lines}, ignore_prefix)

    if genuine.__module__ == worker.__name__:  # else it is this one already
        worker.print_to_stdstream = shorten


def _on_loopback(address: str) -> bool:
    """Whether a cluster of this machine listens on the loopback device alone (`make cluster`).

    Ray must not replace its address then.
    """
    host, port = split_address(address)
    if host not in ("localhost", _LOOPBACK):
        return False
    for own in own_addresses():
        with contextlib.suppress(OSError), socket.create_connection((own, port), _CONNECT_S):
            return False
    return True
