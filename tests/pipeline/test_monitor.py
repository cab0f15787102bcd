"""The driver's side: what is shown, what is queued, what happens to evaluations."""

import io
import json
import threading
from pkgutil import resolve_name
from unittest import mock

import pytest

import pipeline.driver.evaluations
from data_shards.storage.store import Store
from data_shards.untrusted.terminal import PlainConsole
from pipeline.config import DataConfig
from pipeline.driver.console import RunConsole
from pipeline.driver.evaluations import Evaluations, Splits
from pipeline.driver.event_log import EventLog
from pipeline.driver.goodput import UsageMetrics
from pipeline.driver.monitor import RunMonitor
from pipeline.planner.meta_pass import training_flops
from pipeline.presets.registry import run_preset
from pipeline.run.events import (
    CheckpointFailed,
    CheckpointSaved,
    GroupFailed,
    Metrics,
    MetricsReplayed,
    Started,
)

VALUES = {
    "train/loss": 1.25,
    "train/clean": 0.5,
    "train/certified": 0.25,
    "train/eps": 0.1,
    "train/lr": 1e-3,
    "train/images_per_s": 100.0,
}


class Recorder:
    """Stands in for the tracker."""

    def __init__(self):
        self.metrics, self.checkpoints, self.tags = [], [], {}

    def last_value(self, name, until=None):
        return None

    def recorded(self, records):
        return {(step, time_ms) for step, _, time_ms in self.metrics}

    def set_tags(self, tags):
        self.tags |= tags

    def log_metrics(self, step, values, timestamp_ms=None):
        self.metrics.append((step, values, timestamp_ms))

    def log_checkpoint(self, step, url, digest, params, wait_seconds):
        self.checkpoints.append((step, url, digest, params))


def usage_of(recorder):
    """Metrics of use of a run of digits that `recorder` keeps."""
    config = run_preset("digits")
    return UsageMetrics(
        config.cluster, config.train.precision, training_flops(config), recorder.last_value
    )


def show(*events, terminal, folder):
    nowhere = open("/dev/null", "w")  # noqa: SIM115
    console = PlainConsole(record=True, force_terminal=terminal, width=160, file=nowhere)
    usage = usage_of(Recorder())
    monitor = RunMonitor(
        RunConsole(console),
        Recorder(),
        None,
        lambda: None,
        usage,
        EventLog(folder, Store(folder)),
        Store(folder),
    )
    for event in events:
        monitor.handle(event)
    monitor.wait()
    monitor._display.close()
    console.file.close()
    return console.export_text(), monitor._tracker


@pytest.mark.parametrize("terminal", [True, False])
def test_person_sees_facts_progress_and_checkpoints(tmp_path, terminal):
    text, tracker = show(
        Started(
            {"partitioned matrices": "9 of 9"},
            0,
            10,
            micro_batch=6,
            recomputed_blocks=2,
            measured_flops=2.422784e9,
        ),
        Metrics(10, VALUES, 7, productive_s=1e-9),
        CheckpointSaved(
            10,
            "file:///runs/a/checkpoints/x",
            "file:///runs/a/artifacts/x",
            "d" * 64,
            4e-7,
            0.25,
            1.5,
        ),
        CheckpointFailed(20, "rank 1: no space left"),
        terminal=terminal,
        folder=tmp_path,
    )
    for part in ("partitioned matrices: 9 of 9", "loss 1.2500", "clean 50.0%", "certified 25.0%"):
        assert part in text
    for part in ("lr 1.00e-03", "eps 0.100", "100 img/s", "/runs/a/checkpoints/x", "dddddddddddd"):
        assert part in text
    assert "MFU 10.0% of measured  goodput 0.0%" in text
    assert "training waited 0.25 s" in text
    assert "not kept step 20: rank 1: no space left" in text
    stalls = {"checkpoint/stall_s": 0.25, "checkpoint/write_s": 1.5}
    first, (step, values, time_ms), *others = tracker.metrics
    assert first == (0, {"train/micro_batch": 6, "train/recomputed_blocks": 2}, None)
    assert (step, time_ms) == (10, 7)
    assert {name: values[name] for name in VALUES} == VALUES
    assert values["cost/device_hours"] > 0
    assert 0 < values["perf/goodput"] < 1
    assert others == [(10, stalls, None), (20, {"checkpoint/failed": 1}, None)]
    assert tracker.tags == {
        "device": "cpu", "devices": "1", "micro_batch": "6", "mfu_of": "measured"
    }  # fmt: skip
    where = {"checkpoint_url": "file:///runs/a/checkpoints/x"}
    assert tracker.checkpoints == [(10, "file:///runs/a/artifacts/x", "d" * 64, where)]


def test_records_that_only_a_checkpoint_holds_are_made_up_for(tmp_path):
    records = tuple(Metrics(step, VALUES, 10 * step) for step in (1, 2, 3))
    events = (Started({}, 0, 9), *records[:2], Started({}, 3, 9), MetricsReplayed(records))
    _, tracker = show(*events, terminal=False, folder=tmp_path)
    found = [(step, time_ms) for step, values, time_ms in tracker.metrics if "train/loss" in values]
    assert found == [(1, 10), (2, 20), (3, 30)]
    assert "MetricsReplayed" not in (tmp_path / "events.jsonl").read_text()


def test_deaths_are_told_with_the_restarts_that_are_left(tmp_path):
    events = [GroupFailed(f"rank {left} is gone [/x]", left) for left in (None, 2, -1)]
    text, _ = show(*events, terminal=False, folder=tmp_path)
    assert [line.rstrip() for line in text.splitlines()] == [
        "died rank None is gone [/x]; started again, any number of restarts left",
        "died rank 2 is gone [/x]; started again, 2 restarts left",
        "died rank -1 is gone [/x]; no restart is left",
    ]
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["restarts_left"] for row in rows] == [None, 2, -1]


def evaluations(monkeypatch, fn, *, beside_training=True, splits=None):
    monkeypatch.setattr(pipeline.driver.evaluations, "resolve_name", lambda entry: fn)
    splits = splits or Splits("test", "test")
    return Evaluations({}, print, splits=splits, beside_training=beside_training)


def test_evaluations_run_in_order_beside_training(monkeypatch):
    first_may_end = threading.Event()
    begun = threading.Event()

    def fake(settings, *, step, log):
        begun.set()
        first_may_end.wait(10)
        return settings["artifact"], settings["split"], step

    queue = evaluations(monkeypatch, fake)
    queue.submit("a", 1)  # returns although the evaluation waits
    queue.submit("b", 2)
    assert begun.wait(10)
    assert queue.waiting == 2
    first_may_end.set()
    assert queue.results() == [("a", "test", 1), ("b", "test", 2)]
    assert queue.waiting == 0


def test_without_ray_evaluations_wait_for_the_end_of_training(monkeypatch):
    begun = threading.Event()

    def evaluate(settings, **_):
        begun.set()
        return 1

    queue = evaluations(monkeypatch, evaluate, beside_training=False)
    queue.submit("a", 1)
    assert not begun.wait(0.2)
    assert queue.results() == [1]
    assert begun.is_set()


def scored(scores, seen):
    """An evaluation that finds these shares, by split and step."""

    def fake(settings, *, step, log):
        seen.append((settings["split"], settings["artifact"], step))
        sound = mock.Mock(cra={"36/255": scores[settings["split"], step]})
        return mock.Mock(step=step, split=settings["split"], columns={"sound": sound})

    return fake


@pytest.mark.parametrize(("best_at", "result"), [("36/255", 2), (None, 3)])
@pytest.mark.parametrize("beside_training", [True, False])
def test_the_test_split_is_looked_at_once_for_what_validation_chose(
    monkeypatch, best_at, result, beside_training
):
    shares = {1: 0.5, 2: 0.8, 3: 0.7}
    scores = {("validation", step): share for step, share in shares.items()}
    # On the test split step 1 would win: nobody may see that.
    scores |= {("test", step): 1 - share for step, share in shares.items()}
    seen = []
    queue = evaluations(
        monkeypatch,
        scored(scores, seen),
        splits=Splits("validation", "test", best_at),
        beside_training=beside_training,
    )
    for step in shares:
        queue.submit(f"artifact-{step}", step)
    found = queue.results()
    assert [s.split for s in found] == ["validation"] * 3 + ["test"]
    assert [entry for entry in seen if entry[0] == "test"] == [
        ("test", f"artifact-{result}", result)
    ]
    assert seen[-1][0] == "test"
    assert [s.split for s in queue.finished()] == ["validation"] * 3  # what retention keeps by


def test_where_nothing_is_held_out_nothing_is_chosen(monkeypatch):
    seen = []
    scores = {("test", 1): 0.9, ("test", 2): 0.1}
    splits = Splits(None, "test", "36/255")
    queue = evaluations(monkeypatch, scored(scores, seen), splits=splits)
    queue.submit("a", 1)
    queue.submit("b", 2)
    assert queue.unfinished() == set()
    assert [s.step for s in queue.results()] == [2]
    assert seen == [("test", "b", 2)]


def test_splits_of_a_configuration():
    assert DataConfig().selection_split is None
    assert DataConfig(train_split="fit").selection_split == "validation"


def test_a_failed_evaluation_is_raised_after_the_others(monkeypatch):
    done = []

    def fake(settings, *, step, log):
        if step == 1:
            raise ValueError("no artifact")
        done.append(step)

    queue = evaluations(monkeypatch, fake)
    queue.submit("a", 1)
    queue.submit("b", 2)
    with pytest.raises(ValueError, match="no artifact"):
        queue.results()
    assert done == [2]


def test_cancel_drops_what_has_not_begun(monkeypatch):
    done = []
    queue = evaluations(
        monkeypatch, lambda settings, *, step, log: done.append(step), beside_training=False
    )
    queue.submit("a", 1)
    queue.submit("b", 2)
    queue.cancel()
    assert 2 not in done


def test_the_entry_resolves_to_the_evaluation_job():
    assert resolve_name(pipeline.driver.evaluations.ENTRY).__module__ == "jobs.evaluate_cra"


def test_what_an_earlier_execution_kept_is_recorded_and_certified_once(tmp_path, monkeypatch):
    run = Store(tmp_path)
    for step in (10, 20, 30):
        run.write(f"artifacts/step-{step:08d}/artifact.json", str(step).encode())
    info = mock.Mock(side_effect=lambda opener: mock.Mock(digest=opener("artifact.json").read()))
    monkeypatch.setattr("pipeline.driver.monitor.read_info", info)
    recorder, evaluations = Recorder(), mock.Mock()
    usage = usage_of(recorder)
    console = PlainConsole(file=io.StringIO())
    event_log = EventLog(tmp_path, run)
    monitor = RunMonitor(
        RunConsole(console), recorder, evaluations, lambda: None, usage, event_log, run
    )
    monitor.handle(Started({}, 20, 40))  # 30 was never committed: it will be made again
    monitor.handle(Started({}, 20, 40))
    monitor.wait()
    steps = [call.args[1] for call in evaluations.submit.call_args_list]
    assert steps == [step for step, *_ in recorder.checkpoints] == [10, 20]
    assert [digest for _, _, digest, _ in recorder.checkpoints] == [b"10", b"20"]


def test_what_a_store_refuses_keeps_no_event_waiting(tmp_path):
    recorder, text = Recorder(), io.StringIO()
    usage, run, console = usage_of(recorder), Store(tmp_path), PlainConsole(file=text)
    refuse = mock.Mock(side_effect=OSError("no [room]"))
    event_log = EventLog(tmp_path, run)
    monitor = RunMonitor(
        RunConsole(console), recorder, None, lambda: None, usage, event_log, run, refuse
    )
    monitor.handle(Started({}, 0, 40))
    monitor.wait()
    assert "changed settings are not kept: no [room]" in text.getvalue()
