import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.tracking.client import (
    EvaluationRecord,
    TrackingConfig,
    log_evaluation,
    ui_command,
)
from pipeline.tracking.spool import Tracker
from tests.harness import forking_context
from tests.mlflow_database import empty_database
from tests.strangers import listening, off_loopback

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One sqlite store for the file."""
    folder = tmp_path_factory.mktemp("mlflow")
    empty_database(folder, "")
    return folder / "mlflow.db"


@pytest.fixture
def config(store, request):
    return TrackingConfig(uri=f"sqlite:///{store}", experiment=request.node.name)


def client_of(config):
    from mlflow import MlflowClient

    return MlflowClient(config.uri)


def series(config, run_id, name):
    points = client_of(config).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def evaluation(**changes):
    fields = {
        "eval_key": "key-1",
        "artifact_url": "file:///artifacts/step3",
        "artifact_digest": "d" * 64,
        "dataset_name": "digits-test",
        "dataset_digest": "e" * 64,
        "dataset_url": "file:///shards",
        "metrics": {"clean": 0.9, "cra_nominal/l2/36_255": 0.7},
        "params": {"batch_size": 8},
        "artifacts": {"cra.png": b"png"},
        "tags": {"norm": "l2"},
        "step": 3,
    }
    return EvaluationRecord(**{**fields, **changes})


@pytest.mark.parametrize("uri", ["mlruns", "file:///x", "postgresql://x"])
def test_config_refuses_an_unknown_store(uri):
    with pytest.raises(ValueError, match="must start with sqlite"):
        TrackingConfig(uri=uri)


def test_config_makes_sqlite_paths_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert TrackingConfig().uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_importing_the_file_does_not_import_mlflow():
    code = "import sys, pipeline.tracking.client; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_training_run_reaches_the_store(config, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(
        config,
        tmp_path / "spool",
        run_name="digits",
        params={"optim": {"lr": 0.01}, "long": "x" * 7000, **{f"p{i}": i for i in range(150)}},
        tags={"preset": "digits"},
        wait_seconds=60,
    )
    for step in range(1200):
        tracker.log_metrics(step, {"loss": step / 2})
    tracker.finish()
    assert tracker.close()

    run = client_of(config).get_run(tracker.run.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "digits"
    assert run.data.tags["preset"] == "digits"
    assert run.data.params["optim.lr"] == "0.01"
    assert run.data.params["p149"] == "149"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("(truncated, 7000 characters)")
    assert series(config, run.info.run_id, "loss") == [(i, i / 2) for i in range(1200)]
    assert run.info.artifact_uri.startswith(store.parent.as_uri())
    assert not (tmp_path / "mlruns").exists()


def test_opening_the_spool_again_goes_on_with_the_run(config, tmp_path):
    options = {"run_name": "resumed", "params": {"lr": 1}, "wait_seconds": 60}
    first = Tracker(config, tmp_path, **options)
    first.log_metrics(0, {"loss": 2.0})
    assert first.close()
    with (tmp_path / "spool.jsonl").open("ab") as file:
        file.write(b'{"kind": "metr')  # killed while writing
    second = Tracker(config, tmp_path, **options)
    second.log_metrics(1, {"loss": 1.0})
    assert second.close()
    assert second.run == first.run
    assert series(config, first.run.run_id, "loss") == [(0, 2.0), (1, 1.0)]


def test_tags_and_the_newest_value_outlive_an_execution(config, tmp_path):
    first = Tracker(config, tmp_path, run_name="counted", wait_seconds=60)
    assert first.last_value("cost/device_hours") is None
    first.log_metrics(0, {"cost/device_hours": 1.5})
    first.log_metrics(1, {"cost/device_hours": 2.5, "loss": 1.0})
    first.log_metrics(2, {"loss": 0.5})
    first.set_tags({"device": "cpu"})
    assert first.close()
    second = Tracker(config, tmp_path, run_name="counted", wait_seconds=60)
    assert second.last_value("cost/device_hours") == 2.5
    assert second.last_value("cost/device_hours", until=0) == 1.5
    assert second.close()
    tags = client_of(config).get_run(first.run.run_id).data.tags
    assert tags["device"] == "cpu"


def test_a_run_is_resumed_by_its_id_without_the_spool(config, tmp_path):
    first = Tracker(config, tmp_path / "a", run_name="x", params={"lr": 1}, wait_seconds=60)
    assert first.close()
    run_id = first.run.run_id
    second = Tracker(config, tmp_path / "b", run_name="x", run_id=run_id, wait_seconds=60)
    assert second.close()
    assert second.run == first.run
    with pytest.raises(ValueError, match="another spool"):
        Tracker(config, tmp_path / "b", run_name="x", run_id="0" * 32)


def test_a_run_is_resumed_by_its_key_without_the_spool(config, tmp_path):
    runs = []
    for machine in ("a", "b"):
        tracker = Tracker(
            config, tmp_path / machine, run_name="moved", run_key="moved", wait_seconds=60
        )
        assert tracker.close()
        runs.append(tracker.run)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("state", ["", '{"acknowledged": 1000000}'], ids=["empty", "ahead"])
def test_a_state_beyond_reason_ships_everything_once_more(config, tmp_path, state):
    for step in (1, 2):
        tracker = Tracker(config, tmp_path, run_name="went down", wait_seconds=60)
        tracker.log_metrics(step, {"loss": 1.0}, timestamp_ms=step)
        assert tracker.close()
        (file,) = tmp_path.glob("server-*.json")
        file.write_text(state)
    assert [point[0] for point in series(config, tracker.run.run_id, "loss")] == [1, 2]


def test_replaying_the_whole_spool_adds_nothing(config, tmp_path):
    tracker = Tracker(config, tmp_path, run_name="replayed", wait_seconds=60)
    tracker.log_metrics(5, {"loss": 2.0, "nan": float("nan")}, timestamp_ms=1000)
    tracker.log_checkpoint(5, "file:///a", "f" * 64, wait_seconds=60)
    tracker.log_evaluation(evaluation(eval_key="replay", artifact_digest="f" * 64))
    assert tracker.close()
    (state,) = tmp_path.glob("server-*.json")
    state.unlink()  # the acknowledgement never arrived
    again = Tracker(config, tmp_path, run_name="replayed", wait_seconds=60)
    assert again.close()
    client = client_of(config)
    experiment = [tracker.run.experiment_id]
    assert again.run == tracker.run
    assert len(client.search_runs(experiment)) == 2
    assert len(client.search_logged_models(experiment)) == 1
    for name in ("loss", "nan", "clean"):
        assert len(client.get_metric_history(tracker.run.run_id, name)) == 1


def test_a_checkpoint_becomes_an_external_logged_model(config, tmp_path):
    tracker = Tracker(config, tmp_path, run_name="a run/1", wait_seconds=60)
    model_id = tracker.log_checkpoint(
        7, "s3://bucket/step7", "a" * 64, {"cra": 0.5}, wait_seconds=60
    )
    assert tracker.close()
    model = client_of(config).get_logged_model(model_id)
    assert model.source_run_id == tracker.run.run_id
    assert model.tags["artifact_url"] == "s3://bucket/step7"
    assert model.tags["artifact_digest"] == "a" * 64
    assert model.params == {"step": "7", "cra": "0.5"}
    assert model.status == "READY"


def test_an_evaluation_is_a_flat_run_linked_to_model_dataset_and_training_run(config, tmp_path):
    tracker = Tracker(config, tmp_path, run_name="evaluated", wait_seconds=60)
    model_id = tracker.log_checkpoint(3, "file:///a", "d" * 64, wait_seconds=60)
    tracker.log_evaluation(evaluation())
    assert tracker.close()
    client = client_of(config)
    (run,) = client.search_runs([tracker.run.experiment_id], "tags.stage = 'cra-eval'")
    assert run.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.data.tags["train_run_id"] == tracker.run.run_id
    assert run.data.tags["model_id"] == model_id
    assert run.data.tags["eval_key"] == "key-1"
    assert run.data.tags["norm"] == "l2"
    assert run.data.tags["artifact_url"] == "file:///artifacts/step3"
    assert run.data.params == {"batch_size": "8"}
    assert run.data.metrics == evaluation().metrics
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["cra.png"]
    assert run.inputs.dataset_inputs[0].dataset.name == "digits-test"
    metrics = client.get_logged_model(model_id).metrics
    assert {(m.key, m.value, m.dataset_name) for m in metrics} == {
        ("clean", 0.9, "digits-test"),
        ("cra_nominal/l2/36_255", 0.7, "digits-test"),
    }
    assert series(config, tracker.run.run_id, "cra_nominal/l2/36_255") == [(3, 0.7)]


def test_a_finished_evaluation_is_reused_by_its_key(config):
    unknown = "0" * 32  # in this store: no series
    first = log_evaluation(config, evaluation(train_run_id=unknown))
    again = log_evaluation(config, evaluation(train_run_id=unknown, metrics={"clean": 0.1}))
    other = log_evaluation(config, evaluation(eval_key="key-2", metrics={"clean": 0.2}))
    assert first == again
    assert other.run_id != first.run_id
    client = client_of(config)
    assert client.get_run(first.run_id).data.metrics["clean"] == 0.9
    assert len(client.search_logged_models([first.experiment_id])) == 1


def test_training_runs_with_equal_weights_each_show_their_checkpoint_and_evaluation(
    config, tmp_path
):
    runs = []
    for name in ("a", "b"):
        tracker = Tracker(config, tmp_path / name, run_name=name, wait_seconds=60)
        tracker.log_checkpoint(3, "file:///a", "d" * 64, wait_seconds=60)
        tracker.log_evaluation(evaluation())
        assert tracker.close()
        runs.append(tracker.run)
    client = client_of(config)
    found = client.search_runs([runs[0].experiment_id], "tags.stage = 'cra-eval'")
    assert {run.data.tags["train_run_id"] for run in found} == {run.run_id for run in runs}
    models = client.search_logged_models([runs[0].experiment_id])
    assert {model.source_run_id for model in models} == {run.run_id for run in runs}


def test_artifact_that_does_not_name_its_training_run_is_found_by_its_digest(config, tmp_path):
    def train(name):
        tracker = Tracker(config, tmp_path / name, run_name=name, wait_seconds=60)
        tracker.log_checkpoint(3, "file:///a", "d" * 64, wait_seconds=60)
        assert tracker.close()
        return tracker.run.run_id

    only = train("only")
    linked = client_of(config).get_run(log_evaluation(config, evaluation()).run_id)
    assert linked.data.tags["train_run_id"] == only
    assert linked.info.run_name == "cra-only-step3"
    assert series(config, only, "clean") == [(3, 0.9)]
    train("twin")
    record = evaluation(eval_key="key-2")
    ambiguous = client_of(config).get_run(log_evaluation(config, record).run_id)
    assert ambiguous.data.tags["train_run_id"] == ""


def test_an_unfinished_evaluation_is_completed(config):
    first = log_evaluation(config, evaluation())
    client = client_of(config)
    client.update_run(first.run_id, status="RUNNING")
    assert log_evaluation(config, evaluation()) == first
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(first.run_id, "clean")) == 1


def test_an_unreachable_server_neither_blocks_nor_loses_anything(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:  # bound and not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        away = TrackingConfig(uri=f"http://127.0.0.1:{free.getsockname()[1]}")
        tracker = Tracker(away, tmp_path, run_name="offline", wait_seconds=60)
        assert tracker.run is None
        tracker.log_metrics(0, {"loss": 2.0})
        assert tracker.log_checkpoint(0, "file:///a", "d" * 64, wait_seconds=60) is None
        tracker.log_evaluation(evaluation())
        assert not tracker.close(timeout=0.1)

    back = Tracker(config, tmp_path, run_name="offline", wait_seconds=60)
    back.log_metrics(1, {"loss": 1.0})
    assert back.close()
    assert series(config, back.run.run_id, "loss") == [(0, 2.0), (1, 1.0)]
    assert series(config, back.run.run_id, "clean") == [(3, 0.9)]
    assert len(client_of(config).search_logged_models([back.run.experiment_id])) == 1


def test_misuse_is_refused(config, tmp_path):
    tracker = Tracker(config, tmp_path, run_name="misused", wait_seconds=60)
    with pytest.raises(ValueError, match="metric name 'a\\?'"):
        tracker.log_metrics(0, {"a?": 1.0})
    with pytest.raises(ValueError, match="DONE"):
        tracker.finish("DONE")
    assert tracker.close()
    with pytest.raises(RuntimeError, match="closed"):
        tracker.log_metrics(0, {"a": 1.0})


def track(uri, spool):
    tracker = Tracker(TrackingConfig(uri=uri, experiment="e"), spool, run_name="x", wait_seconds=60)
    sys.exit(not (tracker.run and tracker.close()))


@pytest.mark.slow
def test_processes_may_create_the_schema_together(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    context = forking_context()
    processes = [context.Process(target=track, args=(uri, tmp_path / name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_ui_command(config, tmp_path):
    run = log_evaluation(config, evaluation())
    command, address = ui_command(config.uri, run)
    assert f"mlflow ui --backend-store-uri {config.uri} --host 127.0.0.1" in command
    assert "--host 127.0.0.1 --port 5000" in (ROOT / "Makefile").read_text()
    path = f"/#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"
    assert address == f"http://127.0.0.1:5000{path}"
    command, address = ui_command("http://host:5000", run)
    assert address == f"http://host:5000{path}"
    assert address in command


@pytest.mark.slow
def test_the_ui_listens_on_loopback_whatever_mlflow_was_told(config, tmp_path):
    command, _ = ui_command(config.uri, log_evaluation(config, evaluation()))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (tmp_path / "ui.log").open("wb") as log:
        ui = subprocess.Popen(
            ["bash", "-c", command.replace("--port 5000", f"--port {port}")],
            env={**os.environ, "MLFLOW_HOST": "0.0.0.0", "MLFLOW_WORKERS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 250
        while port not in {found[2] for found in listening(ui.pid)}:
            assert ui.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert off_loopback(listening(ui.pid)) == set()
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait(60)
