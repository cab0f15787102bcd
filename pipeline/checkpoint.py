"""Sharded, atomic checkpoints that load at any world size.

A checkpoint is a folder. Each rank writes one safetensors file with its slices of every tensor
(keys `kind/parameter`, 1-D); rank 0 writes `commit.json` last: step, data cursor, scalars, resolved
configuration, and for every tensor the files and element ranges that hold it, with the sha256 of
every file. A folder without `commit.json` does not exist for a reader.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.order import Cursor
from data_shards.store import Store
from model.safetensors_io import TensorSpec, read_header, tensor_of, write_safetensors
from optim.layout import Slot
from optim.sharded import ShardedManifoldAdam
from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.ranks import World
from pipeline.trainer import Progress

SCHEMA_VERSION = 1
COMMIT = "commit.json"
_BLOCK = 1 << 24


class Partitioned(Protocol):
    """What a checkpoint needs of the engine."""

    optimizer: ShardedManifoldAdam


def _held(slot: Slot, rank: int) -> tuple[int, int]:
    """Elements [start, stop) of the row-major parameter that `rank` holds (design of ZeRO-3)."""
    start = min(rank * slot.length, slot.numel)
    return start, min(start + slot.length, slot.numel)


def _slices(optimizer: ShardedManifoldAdam, rank: int) -> Iterator[tuple[str, Slot, Tensor]]:
    """(kind/parameter, slot, this rank's valid elements) of all tensors, padding left out."""
    for kind, partition, tensor in optimizer.partitioned_state():
        for slot in partition.slots:
            start, stop = _held(slot, rank)
            yield f"{kind}/{slot.name}", slot, tensor[slot.offset : slot.offset + stop - start]


def _file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def save_checkpoint(
    folder: Store,
    *,
    world: World,
    engine: Partitioned,
    progress: Progress,
    config: RunConfig,
) -> None:
    """Write one checkpoint; it exists once `commit.json` is written.

    Ranks: all call it together.

    Raises:
        PipelineError: a rank could not write; raised on every rank, nothing was committed.
    """
    optimizer = engine.optimizer
    name = _file_name(world.rank, world.size)
    report: dict[str, Any] = {}
    error = None
    try:
        parts = list(_slices(optimizer, world.rank))
        specs = [TensorSpec(key, tuple(values.shape), values.dtype) for key, _, values in parts]
        with folder.open(name, "wb") as stream:
            digest = write_safetensors(stream, specs, ((key, v) for key, _, v in parts))
        report = {"file": name, "sha256": digest.sha256, "size": digest.size}
    except OSError as failure:
        error = f"cannot write {name} of {folder.url}: {failure}"
    world.agree(error)
    reports: list[dict[str, Any]] = [{}] * world.size
    dist.all_gather_object(reports, report, group=world.control)
    if world.rank == 0:
        try:
            folder.write(COMMIT, _commit(optimizer, world, progress, config, reports).encode())
            for stray in set(folder.ls()) - {COMMIT, *(record["file"] for record in reports)}:
                folder.remove(stray)  # left by an interrupted attempt with other ranks
        except OSError as failure:
            error = f"cannot commit {folder.url}: {failure}"
    world.agree(error)


def _commit(
    optimizer: ShardedManifoldAdam,
    world: World,
    progress: Progress,
    config: RunConfig,
    reports: list[dict[str, Any]],
) -> str:
    tensors = {
        key: {
            "shape": list(slot.shape),
            "parts": [
                [_file_name(rank, world.size), *_held(slot, rank)] for rank in range(world.size)
            ],
        }
        for key, slot, _ in _slices(optimizer, world.rank)
    }
    body = {
        "schema_version": SCHEMA_VERSION,
        "step": progress.step,
        "world_size": world.size,
        "cursor": dataclasses.asdict(progress.cursor),
        "scalars": optimizer.scalar_state(),
        "config": json.loads(config.to_json()),
        "files": reports,
        "tensors": tensors,
    }
    return json.dumps(body, indent=1, sort_keys=True)


def newest_checkpoint(checkpoints: Store) -> Store | None:
    """The committed checkpoint with the highest step, or None."""
    names = sorted((name for name in checkpoints.ls("") if name.startswith("step-")), reverse=True)
    for name in names:
        if checkpoints.child(name).exists(COMMIT):
            return checkpoints.child(name)
    return None


def load_checkpoint(folder: Store, *, world: World, engine: Partitioned) -> Progress:
    """Fill the optimizer's partitions from a checkpoint written by any number of ranks.

    Ranks: all call it together.

    Raises:
        PipelineError: a file is missing, short or altered, or a tensor does not fit; raised on
            every rank before any state is touched.
    """
    error, commit = None, {}
    try:
        commit = _read_commit(folder)
        # Each file is hashed once, by one rank.
        for record in commit["files"][world.rank :: world.size]:
            _check_file(folder, record)
        expected = {key: list(slot.shape) for key, slot, _ in _slices(engine.optimizer, world.rank)}
        stored = {key: entry["shape"] for key, entry in commit["tensors"].items()}
        if stored != expected:
            names = sorted(k for k in stored | expected if stored.get(k) != expected.get(k))
            first = names[0]
            raise PipelineError(
                f"checkpoint {folder.url} does not fit the network: {len(names)} tensors differ, "
                f"first {first}: stored {stored.get(first)}, expected {expected.get(first)}"
            )
    except (OSError, ValueError, KeyError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    world.agree(error)
    _fill(folder, commit, engine.optimizer, world.rank)
    engine.optimizer.load_scalar_state(commit["scalars"])
    for partition in engine.optimizer.partitions:
        partition.publish()
    return Progress(commit["step"], Cursor(**commit["cursor"]))


def _read_commit(folder: Store) -> dict[str, Any]:
    try:
        commit: dict[str, Any] = json.loads(folder.read(COMMIT))
    except ValueError as error:
        raise PipelineError(f"checkpoint file {folder.url}/{COMMIT} is damaged: {error}") from error
    version = commit.get("schema_version")
    if version != SCHEMA_VERSION:
        raise PipelineError(f"{folder.url}/{COMMIT} has schema_version={version}, not 1")
    return commit


def _check_file(folder: Store, record: dict[str, Any]) -> None:
    name = record["file"]
    if not folder.exists(name):
        raise PipelineError(f"checkpoint file {folder.url}/{name} is missing")
    size = folder.size(name)
    if size != record["size"]:
        raise PipelineError(
            f"checkpoint file {folder.url}/{name} has {size} bytes, committed were {record['size']}"
        )
    digest = hashlib.sha256()
    with folder.open(name, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != record["sha256"]:
        raise PipelineError(
            f"checkpoint file {folder.url}/{name} has sha256 {digest.hexdigest()}, "
            f"committed was {record['sha256']}"
        )


def _fill(folder: Store, commit: dict[str, Any], optimizer: ShardedManifoldAdam, rank: int) -> None:
    """Copy the intersection of every stored range with this rank's ranges."""
    headers: dict[str, Any] = {}
    for key, slot, target in _slices(optimizer, rank):
        start, stop = _held(slot, rank)
        for name, first, last in commit["tensors"][key]["parts"]:
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            if name not in headers:
                with folder.open(name, "rb") as stream:
                    headers[name], _ = read_header(stream)
            where = headers[name][key]
            width = where.dtype.itemsize
            begin = where.start + (low - first) * width
            data = folder.read_range(name, begin, begin + (high - low) * width)
            with torch.no_grad():
                target[low - start : high - start] = tensor_of(data, where.dtype, (high - low,))
