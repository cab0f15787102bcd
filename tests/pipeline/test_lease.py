"""A run has one writer: who holds its lease, who takes it over, and whose commits count."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from pipeline.checkpoint.async_saver import AsyncSaver, _Writing
from pipeline.checkpoint.reader import committed
from pipeline.checkpoint.retention import retain
from pipeline.config import CheckpointConfig
from pipeline.errors import PipelineError
from pipeline.resilience.oom import TooLargeError, recorded, too_large
from pipeline.resilience.rollback import Gap, Rollbacks, read_gaps
from pipeline.run import layout, lease
from pipeline.run.lease import (
    Fence,
    Holding,
    Lease,
    LeaseError,
    LeaseFolder,
    Process,
    hold_run,
    read_record,
    write_record,
)
from tests.object_store import BUCKET, s3_clients, s3_server

LEASE_S = 0.6
HOLD = """
import sys, time
from data_shards.storage.store import Store
from pipeline.run.lease import end_without_lease, hold_run
run, lease_s = Store(sys.argv[1]), float(sys.argv[2])
with hold_run(run, newest_step=lambda: -1, lost=end_without_lease, lease_s=lease_s) as lease:
    print(lease.number, flush=True)
    time.sleep(120)
"""


def nobody_loses(why):
    raise AssertionError(why)


def hold(run, *, lease_s=60.0, lost=nobody_loses, waiting=None):
    newest = lambda: max(committed(run), default=-1)  # noqa: E731
    return hold_run(run, newest_step=newest, lost=lost, waiting=waiting, lease_s=lease_s)


@contextlib.contextmanager
def holder(run, lease_s=60.0):
    """Another process that holds the lease of a run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, run.url, str(lease_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().strip().isdigit()
        yield process
    finally:
        process.kill()
        process.communicate()


def commit(run, step, writer):
    """What rank 0 does last."""
    return run.child(layout.written_checkpoint(step, writer)).create(layout.COMMIT, b"{}")


def silence(run):
    """Take a lease as a process that then shows no sign of life; its number."""
    folder = LeaseFolder(run.child(layout.LEASES), lease_s=LEASE_S)
    number = lease.fence(run).number + 1
    assert folder.take(Lease("run", number), {"after": max(committed(run), default=-1)})
    folder.beat(Lease("run", number), folder.process)
    time.sleep(LEASE_S + 0.1)
    return number


@pytest.fixture
def run(tmp_path):
    return Store(tmp_path / "run")


def test_numbers_grow_and_a_clean_end_gives_the_lease_back_at_once(run):
    numbers = []
    for _ in range(3):
        with hold(run) as held:
            numbers.append(held.number)
    assert numbers == [1, 2, 3]


def test_a_second_writer_is_refused_and_hears_of_the_first(run):
    with hold(run), pytest.raises(LeaseError) as refusal, hold(run):
        pass
    who = rf"process {os.getpid()} on \S+ \(for \d+ s, last sign of life \d+ s ago\)"
    assert re.search(who, str(refusal.value))
    assert "--wait-for-lease" in str(refusal.value)


def writers_at_once(run, number=6):
    """Numbers of the leases that so many processes get who begin together and do not end."""
    barrier, numbers, refused = threading.Barrier(number), [], []

    def begin():
        barrier.wait()
        try:
            numbers.append(stack.enter_context(hold(run)).number)
        except LeaseError:
            refused.append(1)

    with contextlib.ExitStack() as stack:
        threads = [threading.Thread(target=begin) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(numbers) + len(refused) == number
    return numbers


def test_of_many_that_begin_together_one_writes(run):
    assert writers_at_once(run) == [1]


@pytest.mark.integration
def test_of_many_that_begin_together_one_writes_into_an_object_store(monkeypatch):
    from moto.s3.models import S3Backend

    put = S3Backend.put_object

    def slow(*arguments, **options):
        time.sleep(0.02)  # between the look of this server and its write
        return put(*arguments, **options)

    monkeypatch.setattr(S3Backend, "put_object", slow)
    with s3_server() as address, s3_clients(f"http://{address}"):
        assert writers_at_once(Store(f"s3://{BUCKET}/run"), 3) == [1]


def test_a_store_that_excludes_nobody_is_refused(monkeypatch):
    monkeypatch.setattr(Store, "create", lambda *_: True)
    with pytest.raises(LeaseError, match="If-None-Match"), hold(Store("memory://run")):
        pass


def test_a_dead_holder_on_this_machine_is_followed_at_once(run):
    with holder(run) as process:
        with pytest.raises(LeaseError, match=f"process {process.pid} "), hold(run):
            pass
        process.kill()
        time.sleep(0.2)  # a zombie: nobody has asked how it ended
        began = time.monotonic()
        with hold(run) as held:
            assert held.number == 2
        assert time.monotonic() - began < lease.RUN_LEASE_S / 2


@pytest.mark.parametrize("field", ["host", "boot", "namespace"])
def test_a_process_of_another_place_is_never_taken_for_dead(field):
    gone = dataclasses.replace(Process.this(), pid=2**22 + 1)
    assert gone.is_dead()
    assert not dataclasses.replace(gone, **{field: "another"}).is_dead()
    assert not dataclasses.replace(gone, boot="").is_dead()  # no /proc


def test_a_number_that_was_given_out_again_is_another_process():
    me = Process.this()
    assert not me.is_dead()
    assert dataclasses.replace(me, started="1").is_dead()
    assert Process.parse(me.dump()) == me
    assert Process.parse(b"") is None


def test_a_stopped_holder_is_followed_after_its_lease_and_ends_when_it_wakes_up(run):
    with holder(run, LEASE_S) as process:
        process.send_signal(signal.SIGSTOP)
        told = []
        with hold(run, lease_s=LEASE_S, waiting=told.append) as held:
            assert held.number == 2
            assert f"process {process.pid} " in told[0]  # it was not taken for dead
            process.send_signal(signal.SIGCONT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "run.0001 was taken over by another process" in errors


def test_what_a_follower_had_not_seen_does_not_count(run):
    first = silence(run)
    assert commit(run, 4, first)
    second = silence(run)
    assert commit(run, 8, first)  # it has woken up
    assert list(committed(run)) == [4]
    assert commit(run, 6, second)
    assert list(committed(run)) == [6, 4]
    time.sleep(LEASE_S)
    with hold(run, lease_s=LEASE_S) as third:
        assert commit(run, 7, second)
        assert commit(run, 9, first)
        assert list(committed(run)) == [6, 4]
        assert commit(run, 7, third.number)
        assert list(committed(run)) == [7, 6, 4]
        assert committed(run)[7].url.endswith("step-00000007/writer-0003")
    assert lease.fence(run) == Fence(3, 6)


def test_a_writer_that_woke_up_overwrites_no_artifact(run):
    written = silence(run)
    world = mock.Mock(rank=0, share=lambda value: value)
    saver = AsyncSaver(
        run,
        world=world,
        engine=mock.Mock(),
        network=mock.Mock(),
        config=mock.Mock(),
        timeout_s=1.0,
        context={},
        calibration=mock.Mock(),
        emit=mock.Mock(),
        writer=written,
    )
    silence(run)
    checkpoint = run.child(layout.written_checkpoint(4, written))
    writing = _Writing(4, checkpoint, run.child(layout.artifact(4)), 0.0)
    saver._write(writing, mock.Mock(), mock.Mock())
    assert "another process has taken over" in writing.error
    assert run.ls(layout.ARTIFACTS) == run.ls(layout.CHECKPOINTS) == []


def test_a_writer_commits_a_step_once(run):
    assert commit(run, 4, 1)
    assert not commit(run, 4, 1)


def test_what_earlier_writers_left_of_a_step_goes_and_of_newer_ones_stays(run):
    for writer in (1, 2, 3):
        run.child(layout.written_checkpoint(4, writer)).write("rank", b"x")
    commit(run, 4, 2)
    retain(run, CheckpointConfig(), {})
    names = [name.rpartition("/")[2] for name in run.ls(layout.checkpoint(4))]
    assert names == ["writer-0002", "writer-0003"]


@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_that_are_an_hour_apart_change_nothing(run, monkeypatch, hours):
    genuine = Store.modified
    monkeypatch.setattr(Store, "modified", lambda *a: genuine(*a) + hours * 3600)
    with hold(run, lease_s=LEASE_S), pytest.raises(LeaseError), hold(run, lease_s=LEASE_S):
        pass
    silence(run)
    with hold(run, lease_s=LEASE_S) as held:
        assert held.number == 3


def test_who_waits_goes_on_when_the_holder_has_ended(run, monkeypatch):
    monkeypatch.setattr(lease, "_POLL_S", 0.05)
    with contextlib.ExitStack() as first:
        first.enter_context(hold(run))
        told = []

        def waiting(held):
            told.append(held)
            if len(told) == 3:
                first.close()

        with hold(run, waiting=waiting) as held:
            assert held.number == 2
    assert len(set(told)) <= 2  # the ages in it


def test_a_store_that_is_away_ends_no_training_and_a_follower_does(run, monkeypatch):
    folder = LeaseFolder(run.child(layout.LEASES), lease_s=0.2)
    folder.take(Lease("run", 1), {"after": -1})
    lost = []
    genuine = Store.write
    with Holding(folder, Lease("run", 1), lost=lost.append, outlasts_store=True)():
        monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(OSError("503")))
        time.sleep(0.6)
        assert not lost
        monkeypatch.setattr(Store, "write", genuine)
        folder.take(Lease("run", 2), {"after": -1})
        time.sleep(0.3)
    assert "run.0001 was taken over" in lost[0]


def test_records_that_are_rewritten_are_those_of_the_newest_holder(run):
    """A holder that stood still and wakes up overwrites nothing, also what nobody has rewritten."""
    for name in layout.RECORDS:
        run.write(name, b"before any lease")
    with hold(run) as first:
        assert read_record(run, layout.ROLLBACKS) == b"before any lease"
        write_record(run, layout.ROLLBACKS, first.number, b"first")
        assert read_record(run, layout.ROLLBACKS) == b"first"
    with hold(run) as second:
        for name in layout.RECORDS:
            write_record(run, name, first.number, b"woken up")
        assert read_record(run, layout.ROLLBACKS) == b"first"
        assert read_record(run, layout.CONFIG) == b"before any lease"
        write_record(run, layout.CONFIG, second.number, b"second")
        write_record(run, layout.CONFIG, first.number, b"woken up again")
        assert read_record(run, layout.CONFIG) == b"second"
    with hold(run):
        assert read_record(run, layout.CONFIG) == b"second"
        assert read_record(run, layout.OUT_OF_MEMORY) == b"before any lease"


def test_a_woken_holder_changes_no_gap_no_size_and_no_setting(run):
    """By the functions that write them: roll-backs, lack of memory, accepted settings."""
    gaps = [Gap(4, 8, Cursor(seed=0), Cursor(seed=0, position=9))]
    with hold(run) as first:
        _rollbacks(run, first.number, gaps)
        assert read_gaps(run) == gaps
    with hold(run) as second:
        _rollbacks(run, first.number, [])
        for writer, size in ((first.number, 2), (second.number, 3), (first.number, 4)):
            with (
                pytest.raises(TooLargeError),
                recorded(run, [], size, recomputes=True, where=str, writer=writer),
            ):
                raise MemoryError
    assert read_gaps(run) == gaps
    assert too_large(run) == [3]


def _rollbacks(run, writer, gaps):
    world = mock.Mock(rank=0, share=lambda gaps: gaps)
    back = Rollbacks(
        run, world=world, engine=None, max_skipped=0, limit=9, per_epoch=10, writer=writer
    )
    back._gaps = gaps
    back._write()


def test_a_damaged_lease_is_named(run):
    run.write("lease/run.0001.claim", json.dumps({"after": "x"}).encode())
    with pytest.raises(PipelineError, match=r"run\.0001\.claim is damaged"):
        committed(run)


def test_names_of_leases():
    assert Lease.parse("run.0012") == Lease("run", 12)
    with pytest.raises(LeaseError, match="no lease"):
        Lease.parse("run")
