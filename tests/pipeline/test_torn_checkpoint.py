"""A process killed at any write of a checkpoint: the newest committed one always loads."""

import dataclasses
import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from pipeline.checkpoint import writer
from pipeline.checkpoint.commit_schema import SCHEMA_VERSION, read_commit
from pipeline.checkpoint.reader import _check_file, committed
from pipeline.checkpoint.writer import Snapshot, commit, write_snapshot
from pipeline.errors import PipelineError
from pipeline.run.layout import COMMIT, written_checkpoint

pytestmark = pytest.mark.integration

RANKS = 2


def snapshot(rank: int, step: int) -> Snapshot:
    tensors = {f"master/w{i}": torch.full((40 + rank,), float(step + i)) for i in range(3)}
    header = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "world_size": RANKS,
        "cursor": dataclasses.asdict(Cursor(seed=0, position=step)),
        "scalars": {},
        "records": [],
        "config": {},
        "tensors": {},
    }
    return Snapshot(rank, RANKS, tensors, header)


def save(folder: Store, step: int, attempt: str) -> None:
    """What the two background threads do, one after the other."""
    for rank in reversed(range(RANKS)):
        write_snapshot(folder, snapshot(rank, step), attempt)
    commit(folder, snapshot(0, step), attempt, timeout_s=5)


class Mortal:
    """Counts all calls that change the disk, and dies before the n-th."""

    def __init__(self, last: int) -> None:
        self.left = last

    def count(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def install(self) -> None:
        places = [(Store, "open"), (Store, "remove"), (Path, "open"), (Path, "replace")]
        for place, name in [*places, (os, "fsync"), (writer, "write_safetensors")]:
            genuine = getattr(place, name)

            def counted(*arguments, genuine=genuine, **options):
                self.count()
                return genuine(*arguments, **options)

            setattr(place, name, counted)


def killed_while_saving(folder: Store, step: int, last: int) -> bool:
    """Fork a process that saves and dies before its `last` write; whether it died."""
    child = os.fork()
    if child == 0:
        Mortal(last).install()
        save(folder, step, "first")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
def test_killed_at_any_write(tmp_path):
    newest_steps = []
    for last in itertools.count():
        run = Store(tmp_path / str(last))
        save(run.child(written_checkpoint(4, 1)), 4, "before")
        folder = run.child(written_checkpoint(8, 1))
        died = killed_while_saving(folder, 8, last)
        newest = next(iter(committed(run).values()))
        newest_steps.append(read_commit(newest).step)
        assert newest_steps[-1] == (8 if folder.exists(COMMIT) else 4)
        for record in read_commit(newest).files:
            _check_file(newest, record)
        # The same step once more, as after a restart: nothing of the dead attempt is left. One that
        # has committed it is not made again by the same writer.
        if folder.exists(COMMIT):
            with pytest.raises(PipelineError, match="was committed by another process"):
                save(folder, 8, "second")
            folder = run.child(written_checkpoint(8, 2))
        save(folder, 8, "second")
        files = [f"rank-{rank:05d}-of-00002.safetensors" for rank in range(RANKS)]
        assert sorted(os.listdir(folder.local_path())) == [COMMIT, *files]
        if not died:
            break
    assert len(newest_steps) > 20
    assert newest_steps == sorted(newest_steps)
    assert {4, 8} == set(newest_steps[:-1])


def test_a_report_of_a_dead_attempt_is_not_believed(tmp_path):
    folder = Store(tmp_path)
    for rank in range(RANKS):
        write_snapshot(folder, snapshot(rank, 8), "dead")
    write_snapshot(folder, snapshot(0, 8), "alive")
    with pytest.raises(PipelineError, match=r"rank 1 has not written within 0\.1 s"):
        commit(folder, snapshot(0, 8), "alive", timeout_s=0.1)
    assert not folder.exists(COMMIT)


def test_waiting_ends_when_the_run_is_given_up(tmp_path):
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(PipelineError, match="rank 0 has not written"):
        commit(Store(tmp_path), snapshot(0, 8), "x", timeout_s=60, given_up=given_up)


def test_the_reason_of_a_rank_reaches_rank_0(tmp_path, monkeypatch):
    folder = Store(tmp_path)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    write_snapshot(folder, snapshot(0, 8), "x")
    with monkeypatch.context() as patched:
        patched.setattr(Store, "durable", full)
        with pytest.raises(OSError, match="No space left"):
            write_snapshot(folder, snapshot(1, 8), "x")
    with pytest.raises(PipelineError, match=r"rank 1: cannot write rank-00001.*No space left"):
        commit(folder, snapshot(0, 8), "x", timeout_s=5)
