"""Checks of an environment: each looks at one thing and says what to do about it."""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from model.certification.nvidia_overrides import library_overrides
from model.networks.lipnext.ops import c_compiler
from pipeline.planner.step_time import NETWORK_GBPS
from pipeline.run.server_exposure import TokenError, mlflow_exposure, ray_exposure
from pipeline.tracking.client import SQLITE, connect

PROJECT = "certified-pretrain"
_GB = 1e9
_RANKS = 2
_SKEW_S = (5.0, 60.0)
"""Beyond the first, events of two machines are in the wrong order; beyond the second, signed
requests and leases begin to fail."""
_DISK_GB = (20.0, 1.0)
_SHARED_GB = 1.0
_FILES = 4096

Status = Literal["OK", "WARN", "FAIL"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check saw.

    Attributes:
        status: OK; WARN: it works, and something is to be known; FAIL: a run would fail.
        value: what there is.
        advice: what to do; empty when OK.
    """

    status: Status
    value: str
    advice: str = ""


Check = Callable[[], Finding]


def bounded(check: Check, timeout_s: float) -> Finding:
    """The finding of a check, or FAIL if it raises or takes longer."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.append(check())
        except Exception as error:  # whatever a library raises is the finding
            text = f"{type(error).__name__}: {_first_line(error)}"
            found.append(Finding("FAIL", text, _advice(error)))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    late = Finding("FAIL", f"no answer within {timeout_s:g} s", "see that it can be reached")
    return found[0] if found else late


def _advice(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "give this user the right to write there"
    if isinstance(error, OSError):
        return "see that it runs and can be reached from here"
    return "see the message"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


# -- software ------------------------------------------------------------------------------------


def python() -> Finding:
    """The interpreter against the project's `requires-python`."""
    wanted = importlib.metadata.metadata(PROJECT)["Requires-Python"]
    version = platform.python_version()
    if version in SpecifierSet(wanted):
        return Finding("OK", version)
    return Finding("FAIL", version, f"use Python {wanted}")


def requirements() -> Iterator[Requirement]:
    """What the project needs, without its extras."""
    for line in importlib.metadata.requires(PROJECT) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def package(requirement: Requirement) -> Finding:
    """An installed package against its range; lower bounds lie above known vulnerabilities."""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("FAIL", "not installed", f"pip install '{wanted}'")
    if requirement.specifier.contains(version, prereleases=True):
        return Finding("OK", version)
    return Finding("FAIL", version, f"pip install '{wanted}'")


# -- hardware ------------------------------------------------------------------------------------


def gpus() -> Finding:
    """GPUs, their memory and type, and whether they compute in bf16."""
    count = torch.cuda.device_count()
    if not count:
        built = torch.version.cuda or "the CPU"
        return Finding("WARN", f"none; torch is built for {built}", "only small runs are for CPUs")
    name = torch.cuda.get_device_name(0)
    memory = torch.cuda.get_device_properties(0).total_memory / _GB
    value = f"{count} x {name}, {memory:.0f} GB, CUDA {torch.version.cuda}, driver {_driver()}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("OK", value)
    return Finding("WARN", f"{value}, no bf16", "train with --train.precision fp16 or fp32")


def compiler() -> Finding:
    """A C compiler, with which Triton builds what starts a kernel."""
    found = c_compiler()
    if found or not torch.cuda.is_available():
        return Finding("OK", found or "not needed: no GPU")
    return Finding("WARN", "none", "install gcc and libc6-dev, else the network's kernels rest")


def overrides() -> Finding:
    """Whether NVIDIA's libraries compute products as torch asks for."""
    found = library_overrides()
    if not found:
        return Finding("OK", "no library computes products otherwise than torch asks for")
    value = ", ".join(found)
    return Finding("FAIL", value, "unset it: what is certified with it on a GPU is refused")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


_SUM = """
import os, sys, torch, torch.distributed as dist
backend, rank, size, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
x = torch.full((1 << 20,), float(rank + 1), device=device)
dist.all_reduce(x)
right = bool((x == size * (size + 1) / 2).all())
dist.barrier()
print(right, flush=True)
os._exit(0 if right else 1)
"""


def all_reduce(backend: str, timeout_s: float) -> Finding:
    """A sum over two processes of this machine."""
    if backend == "nccl" and torch.cuda.device_count() < _RANKS:
        return Finding("OK", "not needed: fewer than two GPUs")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(_RANKS):
            words = [backend, str(rank), str(_RANKS), f"{folder}/store"]
            with Path(folder, str(rank)).open("wb") as said:
                command = [sys.executable, "-c", _SUM, *words]
                processes.append(subprocess.Popen(command, stdout=said, stderr=said))
        errors = []
        deadline = time.monotonic() + timeout_s
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            errors.append(f"no sum within {timeout_s:g} s")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        errors += [Path(folder, str(rank)).read_text() for rank in range(_RANKS)]
    if all(process.returncode == 0 for process in processes):
        return Finding("OK", f"{_RANKS} processes, {time.perf_counter() - begin:.1f} s")
    last = next((text.strip().splitlines()[-1] for text in errors if text.strip()), "wrong sum")
    advice = "see the firewall of the loopback device" + (
        "; NCCL_DEBUG=INFO tells more" if backend == "nccl" else ", or GLOO_SOCKET_IFNAME"
    )
    return Finding("FAIL", last[:300], advice)


_FABRIC_BYTES = 64 << 20
_SLOW = 0.5
"""Share of what the plan assumes between nodes below which the fabric is named."""


def fabric(timeout_s: float) -> Finding:
    """Rate of an all-gather between the ranks of `torchrun`, of which this process is one."""
    size, inside = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.device_count() >= inside
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    created = not dist.is_initialized()
    if created:
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    try:
        seconds = _gather_seconds(device, size)
    finally:
        if created:
            dist.destroy_process_group()
    gbps = 8e-9 * _FABRIC_BYTES * (size - 1) / seconds
    nodes = -(-size // inside)
    value = f"{gbps:,.1f} Gbit/s sent by a rank, all-gather of {size} ranks on {nodes} node(s)"
    # Rings between nodes use all adapters of a node, see pipeline/planner/step_time.py.
    assumed = NETWORK_GBPS * inside * (size - 1) / max(size - inside, 1)
    if nodes == 1 or gbps >= _SLOW * assumed:
        return Finding("OK", value)
    advice = (
        f"the plan assumes {NETWORK_GBPS} Gbit/s per device: see NCCL_DEBUG=INFO for the adapters "
        f"in use, and plan with --link-gbps {gbps * (size - inside) / (size - 1) / inside:.0f}"
    )
    return Finding("WARN", value, advice)


def _gather_seconds(device: torch.device, size: int) -> float:
    """Of the fastest of some all-gathers; the first makes the connections."""
    piece = torch.ones(_FABRIC_BYTES, dtype=torch.uint8, device=device)
    pieces = [torch.empty_like(piece) for _ in range(size)]
    best = float("inf")
    for _ in range(4):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_gather(pieces, piece)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


# -- places --------------------------------------------------------------------------------------


def store(url: str) -> Finding:
    """Write, read, create once, list and remove objects under a fresh name."""
    place = Store(url)
    folder = place.child(f"doctor-{uuid.uuid4().hex[:12]}")
    data = os.urandom(64)
    begin = time.perf_counter()
    try:
        folder.write("object", data)
        problems = []
        if folder.read("object") != data:
            problems.append("an object does not read back as it was written")
        if not folder.create("once", b"a") or folder.create("once", b"b"):
            problems.append("an object can be created twice")
        if folder.ls() != ["object", "once"]:
            problems.append("new objects are not listed")
    finally:
        folder.remove("", recursive=True)
    if folder.exists("object"):
        problems.append("an object cannot be removed")
    if problems:
        return Finding("FAIL", "; ".join(problems), "use a store with strong consistency")
    took = time.perf_counter() - begin
    return Finding("OK", f"{place}: write, read, create once, list, remove in {took:.2f} s")


def store_clock(url: str) -> Finding:
    """The store's clock against ours; leases are measured by the store's."""
    folder = Store(url).child(f"doctor-{uuid.uuid4().hex[:12]}")
    try:
        before = time.time()
        folder.write("now", b"")
        # Stores tell whole seconds.
        return skew(folder.modified("now") - (before + time.time()) / 2, slack_s=1.0)
    finally:
        folder.remove("", recursive=True)


def server_clock(url: str) -> Finding:
    """The Date header of an HTTP server against our clock."""
    request = urllib.request.Request(url, method="HEAD")
    before = time.time()
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # an answer all the same
        date = error.headers["Date"]
    if not date:
        return Finding("WARN", "no Date header", "compare the clocks by hand")
    there = parsedate_to_datetime(date).timestamp()
    return skew(there - (before + time.time()) / 2, slack_s=1.0)


def skew(seconds: float, *, slack_s: float) -> Finding:
    """Judge how far another clock is ahead of ours."""
    value = f"{seconds:+.1f} s"
    beyond = abs(seconds) - slack_s
    if beyond <= _SKEW_S[0]:
        return Finding("OK", value)
    status: Status = "WARN" if beyond <= _SKEW_S[1] else "FAIL"
    return Finding(status, value, "synchronise the clocks (NTP, chrony)")


def shards(url: str) -> Finding:
    """The index of a shard set."""
    index = load_index(url)
    return Finding("OK", f"{index.header.name}: {len(index.select('train'))} training samples")


def mlflow(uri: str) -> Finding:
    """An MLflow store answers with our credentials, and not to strangers."""
    if uri.startswith("sqlite:"):
        database = Path(uri.removeprefix(SQLITE))
        if not database.exists():
            return disk(str(database.parent))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    experiments = connect(uri).search_experiments(max_results=1)
    problem = mlflow_exposure(uri)
    if problem:
        return Finding("FAIL", problem.partition(":")[0] + ": open", problem)
    return Finding("OK", f"answers; {'has' if experiments else 'no'} experiments")


def ray(address: str) -> Finding:
    """A Ray cluster can be reached with our token, and not by strangers."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), timeout=5).close()
    try:
        problem = ray_exposure(address)
    except TokenError as error:
        return Finding("FAIL", "asks for a token", str(error))
    if problem:
        return Finding("FAIL", "open to strangers", problem)
    return Finding("OK", f"{address} answers")


# -- limits --------------------------------------------------------------------------------------


def disk(path: str) -> Finding:
    """Free space where local files of a run go; the folder or its nearest parent can be written."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("FAIL", f"{folder} cannot be written", "choose another --storage")
    free = shutil.disk_usage(folder).free / _GB
    value = f"{free:.1f} GB free at {folder}"
    if free < _DISK_GB[1]:
        return Finding("FAIL", value, "make room, or choose another --storage")
    if free < _DISK_GB[0]:
        return Finding("WARN", value, "python -m pipeline.plan says what a checkpoint needs")
    return Finding("OK", value)


def shared_memory(path: str = "/dev/shm") -> Finding:
    """Size of the shared memory, where Ray keeps its objects and NCCL its buffers."""
    if not Path(path).is_dir():
        return Finding("WARN", f"no {path}", "Ray will use /tmp, which is slower")
    size = shutil.disk_usage(path).total / _GB
    if size < _SHARED_GB:
        advice = "give the container more: --shm-size 8g, or an emptyDir of medium Memory"
        return Finding("WARN", f"{size:.2f} GB", advice)
    return Finding("OK", f"{size:.1f} GB")


def open_files() -> Finding:
    """How many files and sockets a process may open; Ray needs thousands on large clusters."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{soft} (hard limit {hard})"
    if soft < _FILES:
        return Finding("WARN", value, "ulimit -n 65536 before ray start")
    return Finding("OK", value)


def all_checks(
    *, storage: str, mlflow_uri: str, shards_url: str, address: str, timeout_s: float
) -> Iterator[tuple[str, Check]]:
    """Name and check, of everything that applies; empty addresses are left out."""
    yield "python", python
    for requirement in requirements():
        yield requirement.name, functools.partial(package, requirement)
    yield "GPUs", gpus
    yield "C compiler", compiler
    yield "library overrides", overrides
    for backend in ("gloo", "nccl"):
        yield f"all_reduce, {backend}", functools.partial(all_reduce, backend, 0.9 * timeout_s)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "fabric", functools.partial(fabric, 0.9 * timeout_s)
    yield "disk", functools.partial(disk, str(Store(storage).local_path() or Path.home()))
    if Store(storage).local_path() is None or Path(str(Store(storage).local_path())).exists():
        yield "storage", functools.partial(store, storage)
        yield "clock of the storage", functools.partial(store_clock, storage)
    if shards_url:
        yield "shards", functools.partial(shards, shards_url)
    for name, url, check in (("MLflow", mlflow_uri, mlflow), ("Ray", address, ray)):
        if url:
            yield name, functools.partial(check, url)
            if url.startswith("http"):
                yield f"clock of {name}", functools.partial(server_clock, url)
    yield "shared memory", shared_memory
    yield "open files", open_files
