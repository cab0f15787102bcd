"""Sharded, atomic checkpoints that load at any world size: the format, and how one is written.

A checkpoint is a folder, whose files `pipeline/run/layout.py` names. Each rank writes one
safetensors file with its slices of every tensor (keys `kind/parameter`, 1-D) and a small report of
it; rank 0 waits for all reports and writes `commit.json` last: step, data cursor, scalars, newest
records, resolved configuration, and for each tensor the files and element ranges that hold it, with
the sha256 of every file. A folder without `commit.json` is ignored by readers.

Nothing here is collective, so the writing may happen beside training: ranks coordinate
through files in the store.
"""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from data_shards.storage.store import Store
from model.artifact.safetensors_io import TensorSpec, write_safetensors
from optim.zero3_adam import ShardedManifoldAdam
from optim.zero_layout import Slot
from pipeline.checkpoint.commit_schema import SCHEMA_VERSION, commit_bytes
from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext
from pipeline.run.layout import COMMIT, rank_file, rank_report
from pipeline.run.worker_spec import TrainState

_POLL_S = (0.01, 1.0)
"""Shortest and longest pause between two looks for the other ranks' reports."""


class Partitioned(Protocol):
    """What a checkpoint needs of the engine."""

    optimizer: ShardedManifoldAdam


def held(slot: Slot, rank: int) -> tuple[int, int]:
    """Elements [start, stop) of the row-major parameter that `rank` holds (design of ZeRO-3)."""
    # The last ranks of a small parameter hold padding alone: an empty range.
    start = min(rank * slot.length, slot.numel)
    return start, min(start + slot.length, slot.numel)


def slices(optimizer: ShardedManifoldAdam, rank: int) -> Iterator[tuple[str, Slot, Tensor]]:
    """(kind/parameter, slot, this rank's valid elements) of all tensors, padding left out."""
    for kind, partition, tensor in optimizer.partitioned_state():
        for slot in partition.slots:
            start, stop = held(slot, rank)
            yield f"{kind}/{slot.name}", slot, tensor[slot.offset : slot.offset + stop - start]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of one rank after a step, copied to the host."""

    rank: int
    """Who holds it."""
    world_size: int
    """Number of ranks."""
    tensors: dict[str, Tensor]
    """This rank's elements of every tensor, 1-D, by `kind/parameter`."""
    header: dict[str, Any]
    """Body of `commit.json` without the files."""


class HostMemory:
    """Buffers on the host that every snapshot of a run uses again.

    Fresh pages cost more than the copy into them; next to a GPU they are pinned.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, key: str, values: Tensor) -> Tensor:
        """Copy `values` into the buffer of that key; complete only after a device's synchronise."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            pinned = values.device.type == "cuda"
            buffer = torch.empty_like(values, device="cpu", pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer.copy_(values, non_blocking=True)


@torch.no_grad()
def take_snapshot(
    engine: Partitioned,
    memory: HostMemory,
    *,
    world: DistributedContext,
    progress: TrainState,
    config: Mapping[str, Any],
) -> Snapshot:
    """Copy this rank's state to the host: the part of saving that training waits for.

    Args:
        engine: whose state is copied.
        memory: where to; the snapshot before it is overwritten.
        world: the ranks.
        progress: where training stands.
        config: the resolved configuration as JSON has it; it is written down, and not read here.
    """
    optimizer = engine.optimizer
    tensors, entries = {}, {}
    for key, slot, values in slices(optimizer, world.rank):
        tensors[key] = memory.copy(key, values)
        # Every rank knows what all hold, so that rank 0 commits without asking anyone.
        parts = [[rank_file(rank, world.size), *held(slot, rank)] for rank in range(world.size)]
        entries[key] = {"shape": list(slot.shape), "parts": parts}
    if world.device.type == "cuda":
        # The copies are asynchronous: until this returns the buffers hold old values.
        torch.cuda.synchronize(world.device)
    header = {
        "schema_version": SCHEMA_VERSION,
        "step": progress.step,
        "world_size": world.size,
        "cursor": dataclasses.asdict(progress.cursor),
        "scalars": optimizer.scalar_state(),
        "records": [dataclasses.asdict(record) for record in progress.records],
        "config": config,
        "tensors": entries,
    }
    return Snapshot(world.rank, world.size, tensors, header)


def write_snapshot(folder: Store, snapshot: Snapshot, attempt: str) -> None:
    """Write one rank's file, then the report that says so, or why not.

    Args:
        folder: the checkpoint.
        snapshot: what to write.
        attempt: names this writing, the same on all ranks: a report left by a dead one has another.

    Raises:
        Exception: the store refused; the report says why if it could be written.
    """
    name = rank_file(snapshot.rank, snapshot.world_size)
    report = rank_report(snapshot.rank, snapshot.world_size)
    try:
        specs = [TensorSpec(k, tuple(v.shape), v.dtype) for k, v in snapshot.tensors.items()]
        # Digest while writing: reading a file back would double the traffic.
        size = sum(tensor.nbytes for tensor in snapshot.tensors.values())
        with folder.durable(name, size=size) as stream:
            digest = write_safetensors(stream, specs, snapshot.tensors.items())
    except Exception as error:  # whatever a client of a store raises
        body = {"attempt": attempt, "error": f"cannot write {name}: {error}"}
        folder.write(report, json.dumps(body).encode())
        raise
    done = {"attempt": attempt, "file": name, "sha256": digest.sha256, "size": digest.size}
    folder.write(report, json.dumps(done).encode())


def commit(
    folder: Store,
    snapshot: Snapshot,
    attempt: str,
    *,
    timeout_s: float,
    given_up: threading.Event | None = None,
) -> None:
    """Wait for the reports of all ranks, then make the checkpoint exist. For rank 0.

    Args:
        folder: the checkpoint.
        snapshot: that of rank 0.
        attempt: see `write_snapshot`.
        timeout_s: how long a report may take.
        given_up: ends the waiting when set.

    Raises:
        PipelineError: a rank could not write its file, or did not say, or another process has
            committed the same; nothing was committed.
        OSError: the store refused.
    """
    reports: list[dict[str, Any]] = []
    deadline = time.monotonic() + timeout_s
    for rank in range(snapshot.world_size):
        name = rank_report(rank, snapshot.world_size)
        report = _await_report(folder, name, attempt, deadline, given_up)
        if report is None:
            raise PipelineError(f"{folder}: rank {rank} has not written within {timeout_s:g} s")
        if "error" in report:
            raise PipelineError(f"{folder}: rank {rank}: {report['error']}")
        reports.append({key: report[key] for key in ("file", "sha256", "size")})
    body = {**snapshot.header, "files": reports}
    if not folder.create(COMMIT, commit_bytes(body)):
        raise PipelineError(f"{folder} was committed by another process")
    with contextlib.suppress(OSError):  # the checkpoint exists; what is left over costs little
        for stray in set(folder.ls()) - {COMMIT, *(report["file"] for report in reports)}:
            folder.remove(stray)  # reports, and what an interrupted attempt left
        folder.remove_drafts()


def _await_report(
    folder: Store, name: str, attempt: str, deadline: float, given_up: threading.Event | None
) -> dict[str, Any] | None:
    pause, longest = _POLL_S
    while True:
        if folder.exists(name):
            report = folder.read_object(name)
            # Else it is of an execution that died here; its writer comes again with ours.
            if report.get("attempt") == attempt:
                return report
        if time.monotonic() > deadline or (given_up is not None and given_up.is_set()):
            return None
        time.sleep(pause)
        # Ranks usually end within milliseconds; a slow store is not asked a hundred times a second.
        pause = min(2 * pause, longest)
