"""Full disks and trackers that are away or slow: training goes on, nothing arrives twice."""

import contextlib
import json
import os
import resource
import signal
import sqlite3
import threading
import time
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
import ray
import sqlalchemy

from data_shards.storage.store import Store
from pipeline.checkpoint.reader import committed
from pipeline.config import CheckpointConfig, TrainConfig
from pipeline.driver.event_log import EventLog
from pipeline.launch import ray_launcher
from pipeline.launch.control_actor import STOP
from pipeline.launch.ray_launcher import _pump
from pipeline.pretrain import main
from pipeline.resilience.signals import (
    StopSignal,
)
from pipeline.run.append_log import AppendLog
from pipeline.run.events import CheckpointFailed, Skipped
from pipeline.run.worker_spec import WorkerSpec
from pipeline.tracking import spool as tracker_file
from pipeline.tracking.client import MlflowConnection, RunReference, TrackingConfig
from pipeline.tracking.spool import Tracker, _Spool
from pipeline.training.trainer import Trainer
from pipeline.training.zero3 import Zero3
from tests.harness import run_command, run_ranks
from tests.mlflow_database import empty_database
from tests.pipeline.small_runs import (
    observed_run,
    rank_world,
    same_bits,
    small_run,
    small_shards,
    whole_state,
)

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH, EVERY = 8, 24, 2
FULL = (4, 5)  # steps after which the disk of rank 1 is full


@contextlib.contextmanager
def full_disk(bytes_per_file):
    """The kernel refuses to let a file of this process grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_for_room_and_are_never_torn(tmp_path, caplog):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntorn")  # left by a process that died
    lines = AppendLog(path)
    with full_disk(9):
        assert lines.append(b"two\n") == 8
        assert lines.append(b"three\n") == lines.end == 14  # one byte of it would fit
        assert path.read_bytes() == b"one\ntwo\n"
        assert lines.append(b"four\n") == 19
    assert caplog.text.count("lines wait in memory") == 1
    assert lines.append(b"five\n") == 24
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\nfive\n"


# -- a tracker that is away or slow ----------------------------------------------------------------


class FakeServer:
    """MLflow's behaviour as the shipper sees it, with faults by a script.

    Attributes:
        script: what happens to the next calls: "down", "lost" (done, and no answer) or "silent"
            until it is allowed to answer.
        may_answer: the event that allows it.
        overslept: whether nobody did in a minute.
        arrived: metrics in the order of their first arrival.
        status: final status of the run.
        threads: who has called.
    """

    def __init__(self, script):
        self.script = list(script)
        self.arrived: list[tuple[int, float, int]] = []
        self.status = ""
        self.threads = set()
        self.may_answer = threading.Event()
        self.overslept = False

    def _meet(self):
        self.threads.add(threading.get_ident())
        fault = self.script.pop(0) if self.script else ""
        if fault == "down":
            raise ConnectionError("no answer")
        if fault == "silent":
            self.overslept = not self.may_answer.wait(60)
        return fault

    def _answer(self, fault):
        if fault == "lost":
            raise ConnectionError("the answer was lost")

    def start_run(self, **row):
        self._answer(self._meet())
        return RunReference("1", "run")

    def log_metrics(self, run_id, rows):
        fault = self._meet()
        for row in rows:
            for value in row["values"].values():
                point = (row["step"], value, row["timestamp_ms"])
                if point not in self.arrived:  # as MLflow's store, which has such a key
                    self.arrived.append(point)
        self._answer(fault)

    def finish_run(self, run_id, status, timestamp_ms):
        fault = self._meet()
        self.status = status
        self._answer(fault)


SCRIPTS = {
    "at the start": ["down", "down"],
    "in the middle": ["", "", "down", "down"],
    "at the end": ["", "", "", "down"],
    "answers lost": ["lost", "", "lost", "lost"],
}


@pytest.mark.parametrize("when", SCRIPTS)
def test_an_outage_loses_nothing(tmp_path, monkeypatch, when):
    server = FakeServer(SCRIPTS[when])
    monkeypatch.setattr(tracker_file, "MlflowConnection", lambda config: server)
    away = TrackingConfig(uri="http://127.0.0.1:9")
    tracker = Tracker(away, tmp_path, run_name="x", wait_seconds=0.2)
    for step in range(6):
        tracker.log_metrics(step, {"loss": step / 2}, timestamp_ms=step)
        if step in (1, 3):
            time.sleep(0.3)  # the shipper meets the script between two records
    tracker.finish()
    assert tracker.close(30)
    assert server.arrived == [(step, step / 2, step) for step in range(6)]
    assert server.status == "FINISHED"
    assert threading.get_ident() not in server.threads


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_training_waits_for_no_answer(tmp_path, monkeypatch, calls):
    """The server answers its first to third call when all is logged, and never before."""
    server = FakeServer(["silent"] * calls)
    monkeypatch.setattr(tracker_file, "MlflowConnection", lambda config: server)
    away = TrackingConfig(uri="http://127.0.0.1:9")
    tracker = Tracker(away, tmp_path, run_name="x", wait_seconds=0.2)
    for step in range(6):
        tracker.log_metrics(step, {"loss": step / 2}, timestamp_ms=step)
    tracker.finish()
    server.may_answer.set()
    assert tracker.close(30)
    assert not server.overslept
    assert server.arrived == [(step, step / 2, step) for step in range(6)]
    assert server.status == "FINISHED"


def test_records_outlive_a_full_disk(tmp_path, monkeypatch):
    server = FakeServer([])
    monkeypatch.setattr(tracker_file, "MlflowConnection", lambda config: server)
    away = TrackingConfig(uri="http://127.0.0.1:9")
    tracker = Tracker(away, tmp_path, run_name="x", wait_seconds=10)
    with full_disk((tmp_path / "spool.jsonl").stat().st_size + 100):
        for step in range(20):
            tracker.log_metrics(step, {"loss": 1.0}, timestamp_ms=step)
    assert tracker.close(30)
    assert server.arrived == [(step, 1.0, step) for step in range(20)]
    rows = [json.loads(line) for line in (tmp_path / "spool.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "metrics"] == list(range(20))


@pytest.mark.integration
def test_output_that_cannot_be_written_ends_no_run(tmp_path):
    empty_database(tmp_path, "digits")
    flags = "--cluster.launcher local --cluster.device cpu --checkpoint.no-evaluate --name run"
    flags += " --model.width 24 --model.depth 1"
    words = ["digits", *flags.split(), "--train.stop-after", "3", "--storage", str(tmp_path)]
    done = run_command("pipeline.pretrain", *words, stdout="/dev/full")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run/tracking/spool.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "train/loss" in row.get("values", {})]
    assert steps == [1, 2, 3]


def test_ranks_are_stopped_when_nobody_records_them(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda events, **options: events)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    mail, orders = mock.Mock(), mock.Mock()
    mail.take.remote.side_effect = [["an event"], []]
    told = threading.Event()
    orders.give.remote.side_effect = lambda order: told.set()

    def handle(event):
        raise OSError("no room")

    pump = _pump(mail, handle, orders, StopSignal(), threading.Event())
    with pytest.raises(OSError, match="no room"), pump:
        assert told.wait(10)
    orders.give.remote.assert_called_once_with(STOP)


def test_a_process_that_is_told_to_stop_waits_for_no_rank_that_is_not_there(monkeypatch):
    monkeypatch.setattr(ray_launcher, "_DEAF_S", 0.3)
    monkeypatch.setattr(ray, "get", lambda answer, **options: answer)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    stop, killed = StopSignal(), threading.Event()
    stop._number = signal.SIGTERM
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.set())
    for silence, ended in ((0.1, False), (9.0, True)):
        mail, orders = mock.Mock(), mock.Mock()
        mail.take.remote.return_value = []
        orders.silence_s.remote.return_value = silence
        with _pump(mail, print, orders, stop, threading.Event()):
            assert killed.wait(2) == ended


def test_a_disk_that_lets_nothing_be_taken_back_tears_no_line(tmp_path, monkeypatch):
    lines = AppendLog(tmp_path / "lines")
    lines.append(b"one\n")
    monkeypatch.setattr(os, "truncate", mock.Mock(side_effect=OSError("read-only")))
    with full_disk(6):
        lines.append(b"two\n")
    lines.append(b"three\n")
    monkeypatch.undo()
    assert lines.path.read_bytes() == b"one\ntw"
    lines.append(b"four\n")
    assert lines.path.read_bytes() == b"one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize("torn", [b"", b"x" * 70_000, b"x"])
def test_only_whole_lines_are_kept_of_a_file_that_is_read_from_its_end(tmp_path, torn):
    for whole in (b"", b"one\n", b"one\n" + b"y" * 70_000 + b"\n"):
        path = tmp_path / "lines"
        path.write_bytes(whole + torn)
        assert AppendLog(path).end == len(whole)
        assert path.read_bytes() == whole


def test_a_long_spool_is_opened_in_little_memory(tmp_path):
    """Of 100,000 steps it was 313 MB."""
    row = {"kind": "metrics", "values": {f"train/metric-{i}": 0.5 for i in range(10)}}
    lines = [json.dumps({**row, "step": i, "timestamp_ms": i}).encode() for i in range(2000)]
    lines += [json.dumps({"kind": "evaluation", "record": {"eval_key": "k"}}).encode()]
    (tmp_path / "spool.jsonl").write_bytes(b'{"run_key": "r"}\n' + b"\n".join(lines) + b"\n")
    tracemalloc.start()
    try:
        spool = _Spool(tmp_path, "server", "key")
        assert spool.recorded({(7, 7), (8, 9), (1999, 1999)}) == {(7, 7), (1999, 1999)}
        assert spool.evaluations() == {"k"}
        assert spool.last_value("train/metric-3", None) == 0.5
        assert tracemalloc.get_traced_memory()[1] < 300_000  # the file: 0.6 MB
    finally:
        tracemalloc.stop()


def test_a_line_without_an_end_is_passed_over_in_little_memory(tmp_path, caplog):
    """A machine that went down may leave any number of NUL bytes."""
    row = {"kind": "metrics", "step": 1, "timestamp_ms": 1, "values": {"loss": 0.5}}
    path = tmp_path / "spool.jsonl"
    with path.open("wb") as file:
        file.write(b'{"kind": "start", "run_key": "r"}\n')
        file.truncate(100 << 20)
        file.seek(0, 2)
        file.write(b"\n" + json.dumps(row).encode() + b"\n")
    tracemalloc.start()
    try:
        spool = _Spool(tmp_path, "server", "key")
        rows = [row for row, _ in spool.read(10)]
        assert spool.last_value("loss", None) == 0.5
        assert spool.recorded({(1, 1)}) == {(1, 1)}
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert [found["kind"] for found in rows] == ["damaged", "damaged", "metrics"]
    assert "2 damaged lines are not recorded, first line 1" in caplog.text


def test_a_database_that_is_locked_is_told_in_one_line(tmp_path, capfd, caplog, monkeypatch):
    def impatient(text, genuine=sqlalchemy.sql.text):
        return genuine(text.replace("busy_timeout = 20000", "busy_timeout = 500"))

    monkeypatch.setattr("mlflow.store.db.utils.sql.text", impatient)
    config = empty_database(tmp_path, "digits")
    MlflowConnection(config)
    tracker = Tracker(config, tmp_path / "tracking", run_name="run")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        tracker.set_tags({"a": "b"})
        deadline = time.monotonic() + 100
        while tracker._failures < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        database.rollback()
    assert tracker.close(60)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "database is locked" in told
    assert len(told.splitlines()) == 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_event_log_follows_a_run_to_another_machine(tmp_path):
    run = Store(f"memory://{tmp_path.name}")
    for machine in ("a", "b"):
        event_log = EventLog(tmp_path / machine, run)
        event_log.add(Skipped(1))
        event_log.publish()
    assert run.read("events.jsonl").count(b'"event": "Skipped"') == 2


# -- training on a disk that is full for a while ---------------------------------------------------


def config(**parts):
    train = TrainConfig(global_batch=BATCH, epochs=(STEPS - 0.5) * BATCH / 135, warmup_epochs=0)
    return small_run(train=train, checkpoint=CheckpointConfig(every_steps=EVERY), **parts)


def on_a_full_disk(rank, world_size, folder, shards):
    """A plain run, and one where no file of rank 1 may grow beyond 4 kB for two steps."""
    outcomes, newest = {}, []
    genuine = Zero3.step
    with rank_world(rank, world_size), contextlib.ExitStack() as disk:

        def step(engine, *arguments, **options):
            done = engine.optimizer.scalar_state()["step"]
            if rank == 1 and done == FULL[0] - 1:
                disk.enter_context(full_disk(4096))
            if done == FULL[1]:
                disk.close()
                newest.extend(str(step) for step in committed(Store(f"{folder}/full")))
            return genuine(engine, *arguments, **options)

        outcomes["plain"] = observed_run(WorkerSpec(config(), f"{folder}/plain", shards, {}))
        with mock.patch.object(Zero3, "step", step):
            outcomes["full"] = observed_run(WorkerSpec(config(), f"{folder}/full", shards, {}))
        outcomes["again"] = observed_run(WorkerSpec(config(), f"{folder}/full", shards, {}))
    return outcomes, newest


@pytest.mark.slow
@pytest.mark.distributed
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path):
    shards = small_shards(tmp_path / "shards")
    ranks = run_ranks(on_a_full_disk, 2, str(tmp_path), shards, timeout=200)
    (first, newest), (second, _) = ranks
    full, plain = first["full"], first["plain"]
    assert [full.error, second["full"].error] == ["", ""]
    failed = [e for e in full.events if isinstance(e, CheckpointFailed)]
    assert [e.step for e in failed] == [4]
    assert "rank 1: cannot write" in failed[0].error
    assert "File too large" in failed[0].error
    assert newest == ["2"]  # while it was full, the one before stayed
    assert list(full.kept) == [2, 6, 8]
    assert full.losses == plain.losses
    ends = [whole_state([rank[name].end for rank, _ in ranks]) for name in ("plain", "full")]
    assert same_bits(*ends)
    started, recalled = first["again"].events[:2]
    assert started.step == STEPS
    assert [record.step for record in recalled.records] == [5, 6, 7, 8]
    for record in recalled.records:  # as they were told
        assert record in full.events


# -- the training thread ---------------------------------------------------------------------------


def calls_while_training(rank, world_size, folder):
    """Threads that reached a store or the tracking server while the loop ran, by what they did."""
    calls, training = [], []
    fit, open_store = Trainer.fit, Store._fs

    def noted_fit(trainer):
        training.append(threading.get_ident())
        try:
            fit(trainer)
        finally:
            training.append(None)

    def noted_store(store, **options):
        if training and training[-1]:
            calls.append(("store", threading.get_ident()))
        return open_store(store, **options)

    class NotedServer(FakeServer):
        def _meet(self):
            if training and training[-1]:
                calls.append(("tracker", threading.get_ident()))
            return super()._meet()

        def __getattr__(self, name):  # tags and models
            return lambda *_, **__: self._meet()

    options = ["--cluster.launcher", "local", "--train.epochs", "1", "--model.width", "24"]
    options += ["--model.depth", "1", "--checkpoint.every-steps", "6", "--storage", folder]
    options += ["--checkpoint.no-evaluate", "--tracking.uri", "http://127.0.0.1:9"]
    with (
        rank_world(rank, world_size),
        mock.patch.object(Trainer, "fit", noted_fit),
        mock.patch.object(Store, "_fs", noted_store),
        mock.patch.object(tracker_file, "MlflowConnection", return_value=NotedServer([])),
    ):
        code = main(["digits", *options])
    return code, training[0], calls


@pytest.mark.distributed
def test_no_store_and_no_tracker_is_called_on_the_training_thread(tmp_path):
    ((code, training, calls),) = run_ranks(calls_while_training, 1, str(tmp_path), timeout=200)
    assert code == 0
    assert {what for what, _ in calls} == {"store", "tracker"}  # or nothing was observed
    assert [what for what, thread in calls if thread == training] == []
