"""Saved at 4 ranks, loaded at 1, 2, 3, 8 and back: every tensor has the same sha256."""

import hashlib

import pytest
import torch

from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from optim.collectives import Exchange, LocalExchange
from pipeline.checkpoint.reader import load_checkpoint
from pipeline.checkpoint.writer import HostMemory, commit, held, take_snapshot, write_snapshot
from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext
from pipeline.run.worker_spec import TrainState
from tests.optim.emulation import Emulation, Problem

PROBLEM = Problem((30, 17, 8), dtype=torch.float32, matrices_per_group=2)
SYNC = PROBLEM.lookahead_steps
STEPS = [SYNC, SYNC + 3]  # at a Lookahead synchronisation, and between two


class Idle(Exchange):
    """Ranks that share nothing but files: whatever they ask of each other is 0."""

    def _all_to_all(self, buffer, send, recv, out):
        return (buffer.new_zeros(sum(recv)) if out is None else out.zero_()), None


class Alone(DistributedContext):
    """A rank whose peers have nothing to object."""

    def agree(self, error, kind=PipelineError):
        if error:
            raise kind(error)


def ranks_of(size):
    """(world, engine) of every rank, with a state that still has to be loaded."""
    for rank in range(size):
        world = Alone(rank, size, torch.device("cpu"), None, ("here",) * size)
        yield world, Emulation(PROBLEM, LocalExchange() if size == 1 else Idle(rank, size))


def save(group, folder, step):
    progress = TrainState(step, Cursor(seed=0, epoch=1, position=step))
    snapshots = [
        take_snapshot(engine, HostMemory(), world=world, progress=progress, config={})
        for world, engine in group
    ]
    for snapshot in snapshots:
        write_snapshot(folder, snapshot, "x")
    commit(folder, snapshots[0], "x", timeout_s=5)


def load(folder, size):
    group = list(ranks_of(size))
    for world, engine in group:
        progress = load_checkpoint(folder, world=world, engine=engine)
        assert progress.cursor == Cursor(seed=0, epoch=1, position=progress.step)
    return group


def digests(group):
    """sha256 of every reassembled tensor, and the scalars."""
    found = {}
    for world, engine in group:
        for kind, partition, flat in engine.optimizer.partitioned_state():
            for slot in partition.slots:
                start, stop = held(slot, world.rank)
                values = flat[slot.offset : slot.offset + stop - start]
                sha = found.setdefault(f"{kind}/{slot.name}", hashlib.sha256())
                sha.update(values.numpy().tobytes())
    scalars = [engine.optimizer.scalar_state() for _, engine in group]
    assert all(value == scalars[0] for value in scalars)
    return {name: sha.hexdigest() for name, sha in found.items()} | scalars[0]


@pytest.mark.parametrize("step", STEPS)
def test_every_tensor_survives_every_number_of_ranks(tmp_path, step):
    store = Store(tmp_path)
    trained = list(ranks_of(1))
    trained[0][1].run(last=step)
    whole = digests(trained)
    assert len(whole) == 3 * 5 + 2 * 4 + 3  # tensors of matrices and of others, scalars
    assert whole["step"] == step
    moving = trained[0][1].whole("tangent_sum")
    assert any(value.any() for value in moving.values()) == (step % SYNC != 0)
    save(trained, store.child("1"), step)
    four = load(store.child("1"), 4)
    save(four, store.child("4"), step)
    assert digests(four) == whole
    for size in (1, 2, 3, 8):
        group = load(store.child("4"), size)
        assert digests(group) == whole, size
        save(group, store.child(f"4-{size}"), step)
        assert digests(load(store.child(f"4-{size}"), 4)) == whole, size
