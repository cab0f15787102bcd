"""Reading checkpoints back: which one, is it sound, and into any number of ranks."""

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError
from model.artifact.safetensors_io import difference, read_header, tensor_of
from optim.zero3_adam import OPTIONAL_SCALARS, ShardedManifoldAdam
from pipeline.checkpoint.commit_schema import Commit, CommittedFile, CommittedTensor, read_commit
from pipeline.checkpoint.writer import Partitioned, held, slices
from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext
from pipeline.run.layout import (
    CHECKPOINTS,
    COMMIT,
    DAMAGED_COMMIT,
    checkpoint,
    step_of,
    writer_folder,
    writer_of,
)
from pipeline.run.lease import fence
from pipeline.run.worker_spec import TrainState

logger = logging.getLogger(__name__)


class UnreadableError(PipelineError):
    """A store does not answer; that does not make a checkpoint a damaged one."""


_BLOCK = 1 << 24
_strays: set[tuple[Store, str]] = set()
"""What this process has named already."""


def committed(run: Store) -> dict[int, Store]:
    """The committed checkpoints of a run by step, the highest one first.

    Of a step that several processes have committed it is that of the last one to hold the run's
    lease. What a process has committed after another one took its lease over does not count.

    Args:
        run: folder of the run.
    """
    limit = fence(run)
    found = {}
    steps = [step for name in run.ls(CHECKPOINTS) if (step := step_of(name)) is not None]
    for step in sorted(steps, reverse=True):  # as texts, step-100000000 comes before step-99999999
        folder = run.child(checkpoint(step))
        writers = [writer for name in folder.ls() if (writer := writer_of(name)) is not None]
        for writer in sorted(writers, reverse=True):
            written = folder.child(writer_folder(writer))
            if limit.admits(writer, step) and written.exists(COMMIT):
                found[step] = written
                break
    return found


def name_strays(run: Store) -> None:
    """Say once per process what lies among the checkpoints and is none by its name.

    Args:
        run: folder of the run.
    """
    found = {(run, name) for name in run.ls(CHECKPOINTS) if step_of(name) is None} - _strays
    if found:
        _strays.update(found)
        names = ", ".join(repr(name) for _, name in sorted(found, key=lambda stray: stray[1]))
        logger.warning("%s: ignored, no names of checkpoints: %s", run, names)


def load_newest(
    run: Store, *, world: DistributedContext, engine: Partitioned
) -> tuple[TrainState | None, list[str]]:
    """Load the newest checkpoint that is sound; newer ones are put aside (`commit.damaged.json`).

    Ranks: all call it together.

    Args:
        run: folder of the run.
        world: the ranks.
        engine: whose state is filled.

    Returns:
        Where it stands, None if nothing was ever committed; and what was wrong with newer ones.

    Raises:
        PipelineError: there are checkpoints and none is sound; raised on every rank.
        UnreadableError: the store does not answer; raised on every rank.
    """
    # One listing for all ranks: a store may show them different ones.
    found = world.share(list(committed(run).values()) if world.rank == 0 else None)
    damaged: list[str] = []
    for folder in found:
        loaded = _try_load(folder, world, engine)
        if isinstance(loaded, TrainState):
            if world.rank == 0:
                for passed_over in found[: len(damaged)]:
                    _put_aside(passed_over)
            return loaded, damaged
        damaged.append(loaded)
    if damaged:
        raise PipelineError("no checkpoint can be loaded; " + "; ".join(damaged))
    return None, []


def _put_aside(folder: Store) -> None:
    """Steps behind it will be written anew, so it must not count as the newest any more."""
    with contextlib.suppress(OSError):  # then it is passed over once more next time
        try:
            data = folder.read(COMMIT, limit="json_bytes")
        except UntrustedError as error:  # too large to be moved
            data = str(error).encode()
        folder.write(DAMAGED_COMMIT, data)
        folder.remove(COMMIT)


def _try_load(folder: Store, world: DistributedContext, engine: Partitioned) -> TrainState | str:
    try:
        return load_checkpoint(folder, world=world, engine=engine)
    except UnreadableError:
        raise
    except PipelineError as error:
        return str(error)


def load_checkpoint(folder: Store, *, world: DistributedContext, engine: Partitioned) -> TrainState:
    """Fill the optimizer's partitions from a checkpoint written by any number of ranks.

    Ranks: all call it together.

    Raises:
        PipelineError: a file is missing, short or altered, or a tensor does not fit; raised on
            every rank before any state is touched.
        UnreadableError: the store does not answer; the same.
    """
    error, unread, commit = None, None, None
    try:
        commit = read_commit(folder)
        _check_fit(commit, folder, engine.optimizer, world.rank)
        # Each file is hashed once, by one rank.
        for record in commit.files[world.rank :: world.size]:
            _check_file(folder, record)
            _check_tensors(folder, record.file, commit.tensors)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    except Exception as failure:  # whatever a client of a store raises
        unread = f"checkpoint {folder} cannot be read: {type(failure).__name__}: {failure}"
    # First whether all could read: a store that is away must not make a checkpoint a damaged one.
    world.agree(unread, UnreadableError)
    world.agree(error)
    if commit is None:
        raise AssertionError("unreachable: one of the errors above was raised")
    # All checks lie behind: a refusal after this would leave state half old, half new.
    _fill(folder, commit, engine.optimizer, world.rank)
    engine.optimizer.load_scalar_state(commit.scalars)
    # Masters were filled behind ZeRO's back: its working weights have to follow.
    for partition in engine.optimizer.partitions:
        partition.publish()
    return TrainState(commit.step, commit.next_sample, tuple(commit.records))


def _check_fit(commit: Commit, folder: Store, optimizer: ShardedManifoldAdam, rank: int) -> None:
    """The checkpoint holds the tensors and scalars of this network and optimizer."""
    expected = {key: list(slot.shape) for key, slot, _ in slices(optimizer, rank)}
    stored = {key: tensor.shape for key, tensor in commit.tensors.items()}
    if wrong := difference(stored, expected):
        raise PipelineError(f"checkpoint {folder.url} does not fit the network: {wrong}")
    needed = optimizer.scalar_state().keys() - OPTIONAL_SCALARS
    if lacking := sorted(needed - commit.scalars.keys()):
        raise PipelineError(f"checkpoint {folder.url} lacks the scalars {', '.join(lacking)}")


def _check_file(folder: Store, record: CommittedFile) -> None:
    name = record.file
    if not folder.exists(name):
        raise PipelineError(f"checkpoint file {folder.url}/{name} is missing")
    size = folder.size(name)
    if size != record.size:
        raise PipelineError(
            f"checkpoint file {folder.url}/{name} has {size} bytes, committed were {record.size}"
        )
    digest = hashlib.sha256()
    for start in range(0, size, _BLOCK):  # not a stream: ranges wait for a store that is away
        digest.update(folder.read_range(name, start, min(start + _BLOCK, size)))
    if digest.hexdigest() != record.sha256:
        raise PipelineError(
            f"checkpoint file {folder.url}/{name} has sha256 {digest.hexdigest()}, "
            f"committed was {record.sha256}"
        )


def _check_tensors(folder: Store, name: str, tensors: Mapping[str, CommittedTensor]) -> None:
    """A file holds the parts that the commit places there, each of its length, in float32."""
    with folder.open(name, "rb") as stream:
        header, _ = read_header(stream)
    for key, entry in tensors.items():
        for file, first, last in entry.parts:
            if file != name or first == last:
                continue
            if header[key].shape != (last - first,):
                raise PipelineError(
                    f"checkpoint file {folder.url}/{name} has {key} of shape {header[key].shape}, "
                    f"committed were {last - first} elements"
                )
            if header[key].dtype != torch.float32:
                raise PipelineError(
                    f"checkpoint file {folder.url}/{name} has {key} of {header[key].dtype}; the "
                    "state of an optimizer is float32"
                )


def _fill(folder: Store, commit: Commit, optimizer: ShardedManifoldAdam, rank: int) -> None:
    """Copy the intersection of every stored range with this rank's ranges."""
    headers: dict[str, Any] = {}
    for key, slot, target in slices(optimizer, rank):
        start, stop = held(slot, rank)
        for name, first, last in commit.tensors[key].parts:
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
