"""An MLflow server that somebody else runs: what it answers and names is not simply believed."""

import contextlib
import gzip
import http.server
import json
import logging
import threading
import types

import pytest

from jobs.predict import PredictConfig, _resolve
from jobs.scheduling.backlog import Backlog
from jobs.scheduling.claims import ClaimPhase
from jobs.scheduling.config import ScheduleConfig, arguments
from pipeline.tracking import checkpoint_query
from pipeline.tracking.checkpoint_query import Checkpoint, CheckpointQuery
from pipeline.tracking.client import MlflowConnection, QuoteError, TrackingConfig, quoted
from pipeline.tracking.model_registry import Registry, RegistryError, Version
from pipeline.tracking.reader import Reader
from pipeline.tracking.spool import Tracker
from pipeline.tracking.untrusted_server import AddressError, AnswerError, require_location
from tests.mlflow_database import empty_database

EXPERIMENT = {"experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}}


def run_of(artifact_uri, status="RUNNING"):
    info = {
        "run_id": "r1",
        "run_uuid": "r1",
        "experiment_id": "1",
        "status": status,
        "artifact_uri": artifact_uri,
        "lifecycle_stage": "active",
        "run_name": "x",
    }
    return {"run": {"info": info, "data": {"tags": [{"key": "stage", "value": "cra-eval"}]}}}


@contextlib.contextmanager
def serving(answers):
    """An HTTP server; `answers` by a part of the path, `{}` for every other one."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append(self.path)
            found = next((body for part, body in answers.items() if part in self.path), {})
            status, headers, body = (
                found if isinstance(found, tuple) else (200, {}, json.dumps(found).encode())
            )
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = answer  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def config(uri, **fields):
    return TrackingConfig(uri=uri, experiment="e", **fields)


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"experiments/get-by-name": EXPERIMENT},
        {"experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "another"}}},
    ],
    ids=["nothing", "an experiment alone", "another experiment"],
)
def test_an_empty_answer_is_no_record(tmp_path, answers, caplog):
    with serving(answers) as (uri, _):
        with caplog.at_level(logging.WARNING):
            tracker = Tracker(config(uri), tmp_path, run_name="x", wait_seconds=60)
            tracker.log_metrics(1, {"loss": 1.0})
            tracker.finish()
            assert tracker.close(timeout=1) is False
        assert tracker.run is None
        assert "answers " in caplog.text


def test_a_run_that_did_not_end_is_not_recorded_as_ended():
    answers = {"experiments/get-by-name": EXPERIMENT, "runs/get": run_of("mlflow-artifacts:/1")}
    with serving(answers) as (uri, _):
        server = MlflowConnection(config(uri))
        with pytest.raises(AnswerError, match="answers 'RUNNING' for the status of run r1"):
            server.finish_run("r1", "FINISHED", 1)
        with pytest.raises(AnswerError, match="answers 'r1' for a run, not 'r2'"):
            server.finish_run("r2", "FINISHED", 1)


@pytest.mark.parametrize("form", ["{}", "file://{}", "file:{}"])
def test_a_server_that_names_local_files_neither_gets_nor_writes_them(tmp_path, form):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "summary.json").write_text('{"secret": 1}')
    answers = {
        "experiments/get-by-name": EXPERIMENT,
        "experiments/search": {"experiments": [EXPERIMENT["experiment"]]},
        "runs/get": run_of(form.format(victim)),
        "logged-models": {
            "model": {"info": {"model_id": "m", "artifact_uri": form.format(victim)}}
        },
    }
    with serving(answers) as (uri, _):
        server = Registry(config(uri))
        with pytest.raises(AddressError, match="lies under no listed address"):
            server._log_files("r1", {"cra.png": b"chosen by the server"})
        with pytest.raises(RegistryError, match="lies under no listed address"):
            server.recorded_evaluation("r1")
        reader = Reader(config(uri))
        for read in (
            lambda: reader.read_file("r1", "summary.json"),
            lambda: reader.file_names("r1"),
        ):
            with pytest.raises(AddressError):
                read()
        assert sorted(path.name for path in victim.iterdir()) == ["summary.json"]
        # It may, where the person has listed the folder.
        trusting = Registry(config(uri, addresses=(str(victim),)))
        assert trusting.recorded_evaluation("r1").summary == {"secret": 1}


@pytest.mark.parametrize(
    ("location", "passes"),
    [
        ("mlflow-artifacts:/1/r/artifacts", True),
        ("mlflow-artifacts://tracker:5000/1/r", True),
        ("mlflow-artifacts://other:5000/1/r", False),
        ("s3://bucket/runs/a", True),
        ("s3://bucket/runs", True),
        ("s3://bucket/runs-of-others/a", False),
        ("s3://bucket/runs/../secrets", False),
        ("s3://bucket/runs/%2e%2e/secrets", False),
        ("s3://bucket@evil/runs/a", False),
        ("gs://bucket/runs/a", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("/data/runs/a", True),
        ("file:///data/runs/a", True),
        ("/data/runs/../../etc/passwd", False),
        ("/etc/passwd", False),
        ("runs:/r1/x", False),
        ("models:/m/1", False),
        ("", False),
    ],
)
def test_an_address_lies_under_a_listed_prefix(location, passes):
    listed = ("s3://bucket/runs", "/data/runs/")
    embedded = "sqlite:////data/mlflow.db"
    assert require_location(embedded, (), location) == location
    if passes:
        assert require_location("http://tracker:5000", listed, location) == location
        return
    with pytest.raises(AddressError, match="addresses or CERTIFIED_PRETRAIN_ADDRESSES"):
        require_location("http://tracker:5000", listed, location)


def test_prefixes_of_the_environment_are_those_of_every_job(monkeypatch):
    monkeypatch.setenv("CERTIFIED_PRETRAIN_ADDRESSES", "s3://bucket/runs  /data")
    assert config("http://tracker:5000").addresses == ("s3://bucket/runs", "/data")


def checkpoint(url):
    return Checkpoint("m1", "e", "r1", "run", 1, url, "d" * 64, 0.0, False, "test", ())


def test_an_artifact_that_a_server_names_is_not_asked_for(tmp_path):
    with serving({}) as (uri, seen):
        secret = f"{uri}/latest/meta-data"
        watch = types.SimpleNamespace(
            checkpoints=lambda: [checkpoint(secret)], recorded=lambda runs: set()
        )
        claims = types.SimpleNamespace(states=dict)
        schedule = ScheduleConfig(tracking=config("http://tracker:5000"), claims=str(tmp_path))
        (entry,) = Backlog(schedule, claims, watch).look(["certify"])
        assert entry.phase is ClaimPhase.FAILED
        assert "lies under no listed address" in entry.note
        assert seen == []


def test_a_scheduled_evaluation_gets_the_prefixes():
    tracking = config("http://tracker:5000", addresses=("s3://a", "s3://b"))
    schedule = ScheduleConfig(tracking=tracking, claims="s3://a/claims")
    words = arguments(schedule.evaluation("certify", checkpoint("s3://a/x")))
    at = words.index("--tracking.addresses")
    assert words[at + 1 : at + 3] == ["s3://a", "s3://b"]


def test_a_registered_model_elsewhere_is_not_opened():
    version = {
        "name": "digits",
        "version": "1",
        "tags": [
            {"key": "artifact_url", "value": "http://169.254.169.254/latest"},
            {"key": "artifact_digest", "value": "d" * 64},
        ],
    }
    answers = {
        "experiments/get-by-name": EXPERIMENT,
        "model-versions/get": {"model_version": version},
    }
    with serving(answers) as (uri, _):
        asked = PredictConfig(model="models:/digits/1", inputs=("x.png",), tracking=config(uri))
        with pytest.raises(RegistryError, match=r"names 'http://169\.254\.169\.254/latest'"):
            _resolve(asked)


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_is_held_to_its_limit_uncompressed(monkeypatch, packed):
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_ANSWER_BYTES", str(1 << 20))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    body = json.dumps({"x": "0" * (8 << 20)}).encode()
    headers = {}
    if packed:
        body, headers = gzip.compress(body), {"Content-Encoding": "gzip"}
        assert len(body) < 10_000
    answer = (200, headers, body)
    with (
        serving({"experiments/get-by-name": answer}) as (uri, _),
        pytest.raises(Exception, match=r"the answer of 127\.0\.0\.1:\d+ has .* limit is 1,048"),
    ):
        MlflowConnection(config(uri)).log_comparison("c", {}, {}, {})


def test_a_server_does_not_send_us_to_another_one(monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_HTTP_REDIRECTS", raising=False)
    with serving({}) as (inside, seen):
        headers = {"Location": f"{inside}/latest/meta-data"}
        with serving({"experiments": (302, headers, b"")}) as (uri, asked):
            with pytest.raises(Exception, match=r"302|answers|JSON"):
                MlflowConnection(config(uri)).log_comparison("c", {}, {}, {})
            assert asked
        assert seen == []


def test_one_record_beyond_reason_does_not_hide_the_others(monkeypatch, caplog):
    def model(number, **fields):
        tags = {"artifact_url": f"s3://b/{number}"}
        return types.SimpleNamespace(
            **{
                "model_id": f"m{number}",
                "experiment_id": "1",
                "source_run_id": "",
                "name": "x",
                "params": {"step": str(number)},
                "tags": tags,
                "creation_timestamp": 1000 * number,
                **fields,
            }
        )

    found = [
        model(1, params={"step": "soon"}),
        model(2, creation_timestamp=None),
        model(3, params={"step": None}),
        model(4),
    ]

    class Page(list):
        token = None

    evaluation = types.SimpleNamespace(data=types.SimpleNamespace(tags={}, params={}))
    client = types.SimpleNamespace(
        get_experiment_by_name=lambda name: types.SimpleNamespace(experiment_id="1"),
        get_experiment=lambda key: types.SimpleNamespace(name="e"),
        search_experiments=lambda: [types.SimpleNamespace(experiment_id="1")],
        search_logged_models=lambda *a, **k: Page(found),
        search_runs=lambda ids, condition, **k: Page(
            [evaluation] if "cra-eval" in condition else []
        ),
    )
    monkeypatch.setattr(checkpoint_query, "connect", lambda uri: client)
    query = CheckpointQuery("http://tracker:5000", ("e",))
    for _ in range(2):
        assert [c.step for c in query.checkpoints()] == [4]
    assert query.recorded([""]) == set()  # that of an evaluation without a key
    assert [record.args[0] for record in caplog.records] == ["m1", "m2", "m3"]


@pytest.mark.parametrize("text", ["plain", "it's", 'a "b"', "größe"])
def test_a_name_with_quotes_is_a_name_in_a_search(tmp_path, text):
    registry = Registry(empty_database(tmp_path, "e"))
    registry.set_model_tags(text, {})
    assert registry.versions(text) == []
    assert quoted(text)[1:-1] == text


@pytest.mark.parametrize("text", ["'\"", "a\\"])
def test_what_no_search_can_hold_is_refused(text):
    with pytest.raises(QuoteError, match="cannot search for"):
        quoted(text)


@pytest.mark.parametrize("key", ["../../../secret", "/etc", "d" * 63, ""])
def test_a_digest_that_a_server_names_becomes_no_path(tmp_path, key):
    registry = Registry(empty_database(tmp_path, "e"))
    version = Version("digits", 1, (), {"model_id": "m", "certificate_digest": key})
    with pytest.raises(RegistryError, match="carries no certificate"):
        registry.evidence(version, key)
