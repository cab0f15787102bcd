"""Refuses Ray clusters and MLflow servers that strangers may use.

Who reaches an open Ray runs code as its user (CVE-2023-48022), who reaches an open MLflow server
changes runs and the alias of a registered model. A cluster is judged by what its servers answer to
an unauthenticated request, wherever they listen: other accounts of a machine reach its loopback
device, too. An MLflow server may serve without credentials on the loopback device alone. Nothing
secret is sent to a server that has not asked for it.

Evaluation jobs run the same check.
"""

import contextlib
import dataclasses
import ipaddress
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.limits import PREFIX, limits
from pipeline.errors import ExposureError, TokenError

TRUST = "CERTIFIED_PRETRAIN_TRUST_NETWORK"
"""Environment variable: 1 says that whoever reaches these servers may use them."""

_CONNECT_S = 3.0
_ANSWER_S = 10.0
_AGENT_PORT = 52365
_CLIENT_PORT = 10001
_JOBS = "/api/jobs/"
_AGENT_JOBS = "/api/job_agent/jobs/none/logs"
_NODES = "/api/v0/nodes?limit=10000"
_EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"
_GCS = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
_CLIENT = "/ray.rpc.RayletDriver/ClusterInfo"
_HOST = re.compile(r"[\w.:%-]{1,253}")
_REFUSED = (401, 403)
_NO_TOKEN = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_TURNED_AWAY = (
    *_NO_TOKEN,
    "UNAVAILABLE",  # nobody, or one who speaks something else, e.g. TLS
    "UNIMPLEMENTED",  # another service
)
_REMEDY = (
    "stop it, run `export RAY_AUTH_MODE=token` and `(umask 077; ray get-auth-token --generate "
    "> /dev/null)` here and before it is started again (on one machine: `make cluster`)"
)


class _CallError(Exception):
    """A call of Ray's that was not served; `status` is gRPC's name of the reason."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


@dataclasses.dataclass(frozen=True)
class _Node:
    """A machine of a Ray cluster and the port of its job agent."""

    host: str
    agent_port: int
    head: bool


def require_closed(*, ray: str = "", mlflow: str = "") -> None:
    """Refuse servers that stand open, unless TRUST is set.

    Args:
        ray: address of a cluster, as `ray.init` or the job client takes it; empty: none.
        mlflow: tracking URI; empty, or no http: none.

    Raises:
        ExposureError: a server serves strangers.
        TokenError: the cluster does not accept the token of this process.
    """
    if os.environ.get(TRUST) == "1":
        return
    problems = [ray_exposure(ray) if ray else "", mlflow_exposure(mlflow) if mlflow else ""]
    found = "; ".join(filter(None, problems))
    if found:
        raise ExposureError(f"{found}; or set {TRUST}=1 if everybody who reaches it may use it")


def ray_exposure(address: str) -> str:
    """What of a Ray cluster serves a stranger; empty: nothing that answers.

    The named server is asked first. Once it has turned the stranger away it is asked with this
    process's token for the nodes, and a stranger asks the job agent of each and the Ray client
    server of the head.

    Args:
        address: `host:port`, `ray://host:port`, or the http address of a dashboard.

    Raises:
        TokenError: the cluster does not accept the token of this process.
    """
    if address.startswith(("http://", "https://")):
        where = address.rstrip("/") if _serves(address.rstrip("/") + _JOBS) else ""
    else:
        host, port = split_address(address)
        where = _open_rpc(host, port, _CLIENT if address.startswith("ray://") else _GCS)
    if not where:
        with ThreadPoolExecutor(16) as pool:
            where = next(filter(None, pool.map(_open_on, _nodes(address))), "")
    if not where:
        return ""
    return f"the Ray cluster {address} runs the code of whoever reaches {where}: {_REMEDY}"


def _nodes(address: str) -> list[_Node]:
    """Nodes of a cluster that has turned a stranger away; empty where it cannot be asked."""
    if address.startswith("ray://"):
        return []
    token = ray_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    if address.startswith(("http://", "https://")):
        return _nodes_of_dashboard(address.rstrip("/"), headers)
    return _nodes_of_gcs(address, headers)


def _nodes_of_dashboard(url: str, headers: Mapping[str, str]) -> list[_Node]:
    """The dashboard does not tell the ports of the agents: Ray's own is taken."""
    try:
        status, body = _get(url + _NODES, headers)
    except OSError:
        return []
    if status in _REFUSED:
        raise TokenError(_no_token(url))
    if len(body) > limits().json_bytes:
        raise _too_many(url)
    try:
        found = parse_object(body, url)["data"]["result"]["result"]
        return [_node(n["node_ip"], _AGENT_PORT, bool(n["is_head_node"])) for n in found]
    except (ValueError, LookupError, TypeError):  # no dashboard of Ray
        return []


def _nodes_of_gcs(address: str, headers: Mapping[str, str]) -> list[_Node]:
    try:
        answer = _call(address, _GCS, headers)
    except _CallError as error:
        if error.status in _NO_TOKEN:
            raise TokenError(_no_token(address)) from None
        if error.status == "RESOURCE_EXHAUSTED":
            raise _too_many(address) from None
        return []
    except ConnectionError:
        return []
    from google.protobuf.message import DecodeError
    from ray.core.generated import gcs_pb2, gcs_service_pb2

    alive = gcs_pb2.GcsNodeInfo.ALIVE
    try:
        return [
            _node(n.node_manager_address, n.dashboard_agent_listen_port, n.is_head_node)
            for n in gcs_service_pb2.GetAllNodeInfoReply.FromString(answer).node_info_list
            if n.state == alive
        ]
    except (DecodeError, ValueError):  # no GCS of Ray
        return []


def _node(host: str, agent_port: int, head: bool) -> _Node:
    """A node that a server names: a host and nothing else, for it will be asked.

    Raises:
        ValueError, TypeError: something else, such as a path on another server.
    """
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} is no host")
    return _Node(host, agent_port, head)


def _too_many(address: str) -> ExposureError:
    allowed = limits().json_bytes
    return ExposureError(
        f"{address} names its nodes in more than {allowed:,} bytes, so they cannot be asked "
        f"({PREFIX}JSON_BYTES raises the limit)"
    )


def _open_on(node: _Node) -> str:
    """Where a node serves a stranger, or empty."""
    agent = f"http://{_bracketed(node.host)}:{node.agent_port}"
    if _serves(agent + _AGENT_JOBS):
        return agent
    return _open_rpc(node.host, _CLIENT_PORT, _CLIENT) if node.head else ""


def _open_rpc(host: str, port: int, method: str) -> str:
    """The address if a call without credentials is let through (or hangs), or empty."""
    address = f"{_bracketed(host)}:{port}"
    try:
        _call(address, method, {})
    except ConnectionError:
        return ""
    except _CallError as error:  # any other error is that of a server that has begun to serve
        return "" if error.status in _TURNED_AWAY else address
    return address


def _call(address: str, method: str, metadata: Mapping[str, str]) -> bytes:
    """Call a method of Ray with an empty message; the answer as it came.

    Raises:
        ConnectionError: nobody is there, or nobody who speaks gRPC.
        _CallError: the server refuses, or does not answer.
    """
    import grpc  # Ray brings it along: without Ray there is no cluster to ask

    try:
        socket.create_connection(split_address(address), _CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(f"{address}: {error}") from None
    most = limits().json_bytes  # a stranger may send for ever
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", most)]
    with grpc.insecure_channel(address, options) as channel:
        try:
            grpc.channel_ready_future(channel).result(_ANSWER_S)
        except grpc.FutureTimeoutError:
            raise ConnectionError(f"{address} does not speak gRPC") from None
        call = channel.unary_unary(method)
        try:
            answer: bytes = call(b"", timeout=_ANSWER_S, metadata=list(metadata.items()))
        except grpc.RpcError as error:
            raise _CallError(error.code().name) from None
        return answer


def ray_token() -> str:
    """The token of this process for Ray clusters, from where Ray looks for it; empty: none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return ""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token"
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _no_token(address: str) -> str:
    return (
        f"the Ray cluster {address} does not accept the token of this process: export "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH unless the token is in ~/.ray/auth_token"
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
    """Addresses of this machine beyond the loopback device."""
    families = (socket.AF_INET, socket.AF_INET6)
    every = (a.address for of in psutil.net_if_addrs().values() for a in of if a.family in families)
    addresses = (address for address in every if "%" not in address)
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
        base = f"{parts.scheme}://{_bracketed(candidate)}{port}{parts.path.rstrip('/')}"
        if _answers(base + path):
            return base
    return ""


def _answers(url: str) -> bool:
    """True if a request without credentials is served."""
    try:
        return _get(url)[0] == 200
    except (OSError, ValueError):  # nobody there
        return False


def _serves(url: str) -> bool:
    """True unless a request without credentials is turned away, or nobody is there."""
    try:
        return _get(url)[0] not in _REFUSED
    except TimeoutError:  # connected, and busy with it
        return True
    except (OSError, ValueError):
        return False


def _get(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body. Asks directly, and whatever the certificate: so would a stranger."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting)
    )
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers or {}), timeout=_ANSWER_S)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read(limits().json_bytes + 1)  # a stranger may send on


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `ray://host:port`.

    Raises:
        ExposureError: it is neither.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ExposureError(f"address of a Ray cluster {address!r}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
