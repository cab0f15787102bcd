"""Refuses Ray clusters and MLflow servers that anybody on the network may use.

Who reaches an open Ray dashboard runs code as its user (CVE-2023-48022), who reaches an open MLflow
server changes runs and the alias of a registered model. So either they listen on the loopback
device alone, or they ask for credentials. Nothing secret is sent: the question is what a stranger
gets.

The jobs ask, too.
"""

import contextlib
import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable
from urllib.parse import urlsplit

from pipeline.errors import ExposureError

TRUST = "CERTIFIED_PRETRAIN_TRUST_NETWORK"
"""Environment variable: 1 says that whoever reaches these servers may use them."""

_TIMEOUT_S = 3.0
_DASHBOARD_PORT = 8265
_JOBS = "/api/jobs/"
_EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"


def require_closed(*, ray: str = "", mlflow: str = "") -> None:
    """Refuse servers that stand open, unless TRUST is set.

    Args:
        ray: address of a cluster, as `ray.init` or the job client takes it; empty: none.
        mlflow: tracking URI; empty, or no http: none.

    Raises:
        ExposureError: a server answers without credentials beyond the loopback device.
    """
    if os.environ.get(TRUST) == "1":
        return
    problems = [ray_exposure(ray) if ray else "", mlflow_exposure(mlflow) if mlflow else ""]
    found = "; ".join(filter(None, problems))
    if found:
        raise ExposureError(f"{found}; or set {TRUST}=1 if everybody who reaches it may use it")


def ray_exposure(address: str) -> str:
    """What is open about a Ray cluster; empty: nothing that could be seen from here.

    A dashboard is asked. The port for drivers speaks no HTTP: there the mode that this process
    would join in counts.
    """
    if "://" in address and not address.startswith("ray://"):
        where = _open_at(address, _JOBS)
    else:
        host = _host(address.removeprefix("ray://"))
        # Ray writes an address of the machine where 127.0.0.1 was asked for.
        if not (is_loopback(host) or host in own_addresses()):
            if os.environ.get("RAY_AUTH_MODE") == "token":
                return ""
            return (
                f"the Ray cluster {address} is reached over the network without authentication: "
                "start it and this process with RAY_AUTH_MODE=token"
            )
        where = _open_at(f"http://localhost:{_DASHBOARD_PORT}", _JOBS)
    if not where:
        return ""
    return (
        f"the Ray dashboard {where} runs the code of whoever reaches it: start the cluster with "
        "RAY_AUTH_MODE=token, or with --dashboard-host 127.0.0.1"
    )


def mlflow_exposure(uri: str) -> str:
    """What is open about an MLflow server; empty: nothing, or it is a file."""
    where = _open_at(uri, _EXPERIMENTS) if uri.startswith(("http://", "https://")) else ""
    if not where:
        return ""
    return (
        f"the MLflow server {where} lets anybody change runs and registered models: start it with "
        "--app-name basic-auth, or with --host 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """True if a name or address means this machine's loopback device and nothing else."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in found)


def own_addresses() -> list[str]:
    """Addresses of this machine beyond the loopback device, as far as they can be found out."""
    found = set()
    with contextlib.suppress(OSError):  # the name of this machine means nothing
        found |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    with (
        contextlib.suppress(OSError),  # no network
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect(("192.0.2.1", 9))  # no packet is sent: it only chooses the device
        found.add(str(probe.getsockname()[0]))
    addresses = (address for address in found if "%" not in address)
    return sorted(a for a in addresses if not ipaddress.ip_address(a).is_loopback)


def _open_at(url: str, path: str) -> str:
    """The first address beyond loopback at which a server answers a stranger, or empty.

    A server on loopback may listen on all devices: it is asked at this machine's own addresses.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    hosts: Iterable[str] = own_addresses() if is_loopback(host) else [host]
    for candidate in hosts:
        name = f"[{candidate}]" if ":" in candidate else candidate
        base = f"{parts.scheme}://{name}{port}{parts.path.rstrip('/')}"
        if _answers(base + path):
            return base
    return ""


def _answers(url: str) -> bool:
    """True if a request without credentials is served."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):  # refused, asks for credentials, or nobody there
        return False


def _host(address: str) -> str:
    """Host of `host:port`; `auto` and `local` are this machine."""
    host = address.rpartition(":")[0].strip("[]") or address
    return "localhost" if host in ("auto", "local") else host
