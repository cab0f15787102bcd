"""Joining the world of ranks: Ray Train, torchrun, or this process alone."""

import contextlib
import dataclasses
import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pipeline.config import ClusterConfig
from pipeline.errors import PipelineError
from pipeline.run.malloc import keep_freed_memory

_LOOPBACK = "127.0.0.1"
_ALLOCATOR = "expandable_segments:True"
"""Blocks of CUDA's allocator that grow: micro-batches and rounds of different sizes would leave
others in pieces."""
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The second is its former name, which the first would overrule."""
_INTERFACES = {
    "gloo": ("GLOO_SOCKET_IFNAME",),
    "nccl": ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),  # gloo is beside it, for control
}


@dataclasses.dataclass(frozen=True)
class DistributedContext:
    """One rank's view.

    Attributes:
        rank: 0 <= rank < size.
        size: number of ranks.
        device: where this rank computes.
        control: gloo group for barriers, votes and small objects, also beside NCCL.
        hosts: machine and process of every rank, for messages.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    hosts: tuple[str, ...]

    def barrier(self) -> None:
        """Wait for all ranks (host side)."""
        dist.barrier(group=self.control)

    def agree(self, error: str | None, kind: type[PipelineError] = PipelineError) -> None:
        """Raise on every rank if any rank reports an error, instead of leaving the others waiting.

        Raises:
            PipelineError: of that kind, the first reported error, with its rank if it is one of
                several.
        """
        for rank, report in enumerate(self.gather(error)):
            if report is not None:
                raise kind(f"rank {rank}: {report}" if self.size > 1 else report)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank (small picklable objects)."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, value: Any) -> Any:
        """The value of rank 0, on every rank (any small picklable object)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


def use_cuda(device: str, ranks_per_node: int) -> bool:
    """True if every rank of this node gets a GPU.

    Raises:
        PipelineError: `cuda` was asked for and there are fewer GPUs than ranks.
    """
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and count < ranks_per_node:
        raise PipelineError(f"cluster.device=cuda: {ranks_per_node} ranks here but {count} GPUs")
    return count >= ranks_per_node and count > 0


def _single_process_environment() -> None:
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
        MASTER_ADDR=_LOOPBACK, MASTER_PORT="0",
    )  # fmt: skip


def on_one_machine() -> bool:
    """Whether the ranks meet on the loopback device: nothing of theirs must listen elsewhere."""
    return os.environ.get("MASTER_ADDR", _LOOPBACK) in (_LOOPBACK, "localhost")


def listening_store(port: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """A store that this process keeps for all ranks; on one machine it listens on loopback alone.

    Args:
        port: 0 takes a free one.
        timeout: of its requests.
    """
    if not on_one_machine():
        host = os.environ["MASTER_ADDR"]
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)
    with socket.create_server((_LOOPBACK, port)) as server:
        bound = server.getsockname()[1]
        return dist.TCPStore(
            _LOOPBACK,
            bound,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=server.detach(),  # torch's own would listen on all devices
        )


def create_group(backend: str, timeout: datetime.timedelta) -> None:
    """Create the process group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Torch's `env://`, but on one machine the store of the group and the sockets between the ranks
    are on the loopback device.
    """
    if on_one_machine():
        for name in _INTERFACES[backend]:
            os.environ[name] = _loopback_device()
    if not on_one_machine() or "TORCHELASTIC_USE_AGENT_STORE" in os.environ:  # torchrun keeps it
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank == 0:
        store = listening_store(port, timeout)
    else:
        store = dist.TCPStore(_LOOPBACK, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _loopback_device() -> str:
    """Name of the loopback device: lo, or lo0 on macOS."""
    return next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == _LOOPBACK for address in addresses)
    )


@contextlib.contextmanager
def join_process_group(cluster: ClusterConfig) -> Iterator[DistributedContext]:
    """Join (or create) the process group; leave it as it was found.

    Args:
        cluster: device, timeout of collectives, compute threads of this rank on CPU.
    """
    created = not dist.is_initialized()
    if created and "RANK" not in os.environ:
        _single_process_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = use_cuda(cluster.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if cuda:
        if not any(name in os.environ for name in _ALLOCATOR_NAMES):
            os.environ[_ALLOCATOR_NAMES[0]] = _ALLOCATOR  # read at the first allocation
        torch.cuda.set_device(local_rank)
        chosen = torch.device("cuda", local_rank)
    else:
        torch.set_num_threads(cluster.cpus_per_worker)
        keep_freed_memory()
        chosen = torch.device("cpu")
    timeout = datetime.timedelta(seconds=cluster.collective_timeout_s)
    if created:
        create_group("nccl" if cuda else "gloo", timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    size = dist.get_world_size()
    hosts: list[str] = [""] * size
    here = f"{socket.gethostname()}, process {os.getpid()}"
    dist.all_gather_object(hosts, here, group=control)
    world = DistributedContext(dist.get_rank(), size, chosen, control, tuple(hosts))
    try:
        yield world
    finally:
        if created:
            dist.destroy_process_group()
