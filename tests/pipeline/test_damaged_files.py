"""Files of a run that a dying machine, a tool or a person has damaged."""

import dataclasses
import io
import logging
import types

import pytest

from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError
from data_shards.untrusted.terminal import PlainConsole
from jobs.scheduling import status_page
from jobs.scheduling.claims import ClaimPhase, Claims
from pipeline.config import RESERVED_NAMES
from pipeline.driver.console import RunConsole
from pipeline.driver.preflight import _continue, _run_key
from pipeline.errors import PipelineError
from pipeline.presets.registry import run_preset
from pipeline.resilience.oom import too_large
from pipeline.resilience.rollback import read_gaps
from pipeline.run import layout
from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.run.events import Started
from pipeline.run.lease import Lease
from pipeline.tracking import spool
from pipeline.tracking.client import RunReference, TrackingConfig
from pipeline.tracking.spool import Tracker

NO_OBJECTS = [b"", b"{", b"[]", b"null", b"\0" * 40, b"[" * 100_000, b'{"gaps": "x"}']


@pytest.mark.parametrize("data", NO_OBJECTS)
def test_a_run_whose_configuration_is_gone_is_refused_by_name(tmp_path, data):
    (tmp_path / layout.CONFIG).write_bytes(data)
    config = dataclasses.replace(run_preset("digits"), name="x", resume=True)
    with pytest.raises(PipelineError, match=r"run\.json cannot be used: .*another --name"):
        _continue(config, Store(tmp_path))


@pytest.mark.parametrize("data", [b"", b"\0" * 32, b"\xff" * 32, b"' or '1", b"a" * 33])
def test_a_key_of_a_run_that_cannot_be_read_is_refused_by_name(tmp_path, data):
    (tmp_path / layout.TRACKING_KEY).write_bytes(data)
    with pytest.raises(PipelineError, match=r"tracking\.key is damaged: .* is no key"):
        _run_key(Store(tmp_path))
    (tmp_path / layout.TRACKING_KEY).unlink()
    assert _run_key(Store(tmp_path)) == _run_key(Store(tmp_path))


@pytest.mark.parametrize("data", NO_OBJECTS)
def test_gaps_that_cannot_be_read_are_not_forgotten(tmp_path, data):
    (tmp_path / layout.ROLLBACKS).write_bytes(data)
    with pytest.raises(PipelineError, match=r"rollbacks\.json cannot be used"):
        read_gaps(Store(tmp_path))


@pytest.mark.parametrize("data", [*NO_OBJECTS, b'{"too_large": [0]}', b'{"too_large": ["x"]}'])
def test_micro_batches_that_cannot_be_read_are_found_once_more(tmp_path, data, caplog):
    (tmp_path / layout.OUT_OF_MEMORY).write_bytes(data)
    assert too_large(Store(tmp_path)) == []
    assert "memory.json is not used" in caplog.text


@pytest.mark.parametrize("data", [b"", b"[]", b'{"code": "x"}', b'{"code": null}', b"\0"])
def test_a_claim_whose_end_cannot_be_read_has_failed(tmp_path, data, caplog):
    claims = Claims(str(tmp_path), lease_s=60, attempts=1)
    claim = Lease("k" * 16, 1)
    assert claims.take(claim, {})
    (tmp_path / f"{claim.name}.end").write_bytes(data)
    assert claims.states()["k" * 16].phase is ClaimPhase.FAILED
    assert "counts as a failure" in caplog.text


@pytest.mark.parametrize("data", [b"", b"[]", b'{"surprise": 1}'])
def test_the_status_page_does_without_what_it_cannot_read(tmp_path, monkeypatch, data):
    (tmp_path / layout.PROGRESS).write_bytes(data)
    monkeypatch.setattr(status_page, "output", lambda config: Store(tmp_path))
    checkpoint = types.SimpleNamespace(run_name="x", step=1)
    entry = types.SimpleNamespace(
        suite="certify",
        checkpoint=checkpoint,
        attempted=True,
        claim=Lease("k" * 16, 1),
        note="",
        config=object(),
        phase=ClaimPhase.RUNNING,
    )
    (tmp_path / "k.claim").write_bytes(data)
    claims = types.SimpleNamespace(read=lambda claim: Store(tmp_path).read_object("k.claim"))
    assert status_page._line(entry, claims) == f"certify of x step 1; claim {entry.claim.name}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "is taken") for name in RESERVED_NAMES),
        ("one\ntwo", r"holds '\\n', which no terminal shows"),
        ("x\x1b[2J", r"holds '\\x1b'"),
        ("a\u202egnp", r"holds '\\u202e'"),
        ("lone\ud800", r"holds '\\ud800'"),
        ("zero\u200bwidth", r"holds '\\u200b'"),
        ("a/b", "without /"),
        ("..", "without /"),
        ("ä" * 128, "has 256 bytes; file systems take 255"),
    ],
)
def test_names_that_are_no_names_of_runs(name, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(run_preset("digits"), name=name)


def test_names_in_all_languages_are_names():
    for name in ("digits-20261128", "größe", "試行 1", "[x]<script>", "-"):
        assert dataclasses.replace(run_preset("digits"), name=name).name == name


class Recorder:
    """A server that keeps what it is told."""

    def __init__(self, config):
        self.rows, self.ended = [], ""

    def start_run(self, run_key, **fields):
        self.key = run_key
        return RunReference("1", "r1")

    def log_metrics(self, run_id, rows):
        self.rows += [row["step"] for row in rows]

    def finish_run(self, run_id, status, timestamp_ms):
        self.ended = status


def record(folder, *steps, finish=False):
    """Open the spool of a run, record steps and ship; returns the server."""
    config = TrackingConfig(uri="http://tracker:5000", experiment="e")
    tracker = Tracker(config, folder, run_name="x", wait_seconds=5)
    for step in steps:
        tracker.log_metrics(step, {"loss": float("nan")})
    if finish:
        tracker.finish()
    assert tracker.close(timeout=5)
    return tracker._server


DAMAGE = {
    "NUL": b"\0" * 300 + b"\n",
    "a cut line": b'{"kind": "metrics", "step": 1, "val\n',
    "no record": b"[1, 2]\n",
    "half a record": b'{"kind": "metrics", "step": 1}\n',
    "an unknown kind": b'{"kind": "surprise"}\n',
    "too deep": b"[" * 100_000 + b"\n",
    "no UTF-8": b'{"kind": "\xff"}\n',
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("place", ["first", "middle"])
def test_a_damaged_line_of_the_spool_is_counted_and_all_others_arrive(
    tmp_path, monkeypatch, caplog, what, place
):
    monkeypatch.setattr(spool, "MlflowConnection", Recorder)
    key = record(tmp_path, 1, 2).key
    path = tmp_path / layout.SPOOL
    lines = path.read_bytes().splitlines(keepends=True)
    at = 0 if place == "first" else 2
    path.write_bytes(b"".join([*lines[:at], DAMAGE[what], *lines[at + (place == "first") :]]))
    for state in tmp_path.glob("server-*.json"):
        state.unlink()  # as on another machine: everything is shipped once more
    with caplog.at_level(logging.WARNING):
        server = record(tmp_path, 3, finish=True)
    assert server.rows == [1, 2, 3]
    assert server.ended == "FINISHED"
    assert server.key == key or place == "first"
    assert "1 damaged lines are not recorded, first line" in caplog.text


@pytest.mark.parametrize("state", [b"", b"[]", b'{"acknowledged": "x"}', b'{"run": 5}', b"\0"])
def test_a_damaged_state_of_the_spool_ships_everything_once_more(tmp_path, monkeypatch, state):
    monkeypatch.setattr(spool, "MlflowConnection", Recorder)
    record(tmp_path, 1)
    (path,) = tmp_path.glob("server-*.json")
    path.write_bytes(state)
    assert record(tmp_path, 2).rows == [1, 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "list, not a JSON object"),
        (b"{}", "norm: Field required|Field required"),
        (b'{"samples": "9"}', "Field required"),
        (b"[" * 100_000, "maximum recursion"),
    ],
)
def test_a_summary_that_is_none_is_named(data, reason):
    with pytest.raises(UntrustedError, match=rf"summary\.json is damaged.*{reason}"):
        EvaluationSummary.from_json(data)


def test_what_a_rank_says_cannot_end_a_run():
    out = io.StringIO()
    display = RunConsole(PlainConsole(file=out, width=200))
    hostile = ["rank 0: /data/[old]/x is missing", "commit.json: [/] is in", "[/x]<script>\x1b[2J"]
    for text in hostile:
        display.started(Started({"damaged checkpoints passed over": text}, 5, 10))
        display.message(f" step 5: {text}", "not kept", "red")
    for text in hostile[:2]:
        assert out.getvalue().count(text) == 2
    assert "\x1b" not in out.getvalue()
