"""A storage that is copied or moved as a whole is not tied to its old place."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.run.layout import is_ray_folder
from pipeline.run.relative_urls import relative, resolve
from pipeline.tracking.checkpoint_query import CheckpointQuery
from pipeline.tracking.client import EvaluationRecord, MlflowConnection, TrackingConfig, now_ms
from pipeline.tracking.relocation import follow
from pipeline.tracking.spool import Tracker
from tests.mlflow_database import empty_database


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("/a b/runs/data/digits", "../../../data/digits"),
        ("file:///a b/runs/data/digits", "../../../data/digits"),
        ("/a b/runs2/data", "/a b/runs2/data"),
        ("s3://bucket/data", "s3://bucket/data"),
    ],
)
def test_addresses_inside_of_a_storage_are_relative(address, written):
    base = "/a b/runs/one/artifacts/step-00000001"
    assert relative(address, base=base, within="/a b/runs") == written
    if written.startswith(".."):
        moved = resolve(written, base="/elsewhere/one/artifacts/step-00000001")
        assert moved == "file:///elsewhere/data/digits"
    else:
        assert resolve(written, base=base) == written


def test_the_same_on_an_object_store():
    base = "s3://bucket/runs/one/artifacts/step-00000001"
    written = relative("s3://bucket/runs/data/x", base=base, within="s3://bucket/runs")
    assert written == "../../../data/x"
    assert resolve(written, base=base) == "s3://bucket/runs/data/x"


def evaluation(key, url, run_id):
    return EvaluationRecord(
        eval_key=key,
        artifact_url=url,
        artifact_digest="d" * 64,
        dataset_name="digits-test",
        dataset_digest="e" * 64,
        dataset_url=f"{url.rpartition('/')[0]}/data",
        metrics={"cra_sound/l2/36_255": 0.5},
        params={"split": "test"},
        artifacts={"summary.json": b"{}"},
        train_run_id=run_id,
    )


@pytest.fixture
def storage(tmp_path):
    """A run with a checkpoint and an evaluation, under a path with a blank and a wildcard."""
    folder = tmp_path / "old runs_%"
    folder.mkdir()
    config = empty_database(folder, "digits")
    server = MlflowConnection(config)
    run = server.start_run("key", None, "one", {"storage": str(folder)}, {}, now_ms())
    url = f"file://{folder}/one/artifacts/step-00000001"
    server.find_or_create_model(
        run.run_id, step=1, artifact_url=url, digest="d" * 64, params={"checkpoint_url": url}
    )
    server.log_evaluation(evaluation("first", url, run.run_id))
    return folder, run.run_id


def files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_a_store_that_was_copied_or_moved_names_and_writes_its_own_place(storage, tmp_path, how):
    old, run_id = storage
    new = tmp_path / "new"
    how(old, new)
    before = files(old)
    config = TrackingConfig(uri=f"sqlite:///{new}/mlflow.db", experiment="digits")
    (checkpoint,) = CheckpointQuery(config.uri, ["digits"]).checkpoints()
    assert checkpoint.artifact_url == f"file://{new}/one/artifacts/step-00000001"
    MlflowConnection(config).log_evaluation(evaluation("second", checkpoint.artifact_url, run_id))
    assert files(old) == before
    client = MlflowClient(config.uri)
    experiment = client.get_experiment_by_name("digits")
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.artifact_uri.startswith(f"{new.as_uri()}/mlartifacts/")
        if run.data.tags["stage"] == "cra-eval":
            assert [file.path for file in client.list_artifacts(run.info.run_id)]
            (data,) = run.inputs.dataset_inputs
            assert json.loads(data.dataset.source)["uri"].startswith(f"file://{new}/")
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert model.params["checkpoint_url"] == checkpoint.artifact_url
    assert Path(model.artifact_location.removeprefix("file://")).is_relative_to(new)
    assert follow(config.uri, f"file://{old}/one/x") == f"file://{new}/one/x"
    assert follow(config.uri, "/other/one") == "/other/one"


def test_a_folder_with_two_names_is_not_moved(storage, tmp_path):
    old, _ = storage
    link = tmp_path / "link"
    link.symlink_to(old)
    (found,) = CheckpointQuery(f"sqlite:///{link}/mlflow.db", ["digits"]).checkpoints()
    assert found.artifact_url.startswith(f"file://{old}/")


def test_what_waits_in_a_spool_is_shipped_with_the_place_of_its_copy(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    url = f"file://{old}/one/artifacts/step-00000001"
    away = TrackingConfig(uri="http://127.0.0.1:9", experiment="digits")
    tracker = Tracker(away, old / "one/tracking", run_name="one", wait_seconds=0)
    tracker.log_checkpoint(1, url, "d" * 64, wait_seconds=0)
    tracker.log_evaluation(evaluation("first", url, None))
    tracker.close(0)
    shutil.copytree(old, new)
    config = empty_database(new, "digits")
    tracker = Tracker(config, new / "one/tracking", run_name="one")
    assert tracker.close()
    (found,) = CheckpointQuery(config.uri, ["digits"]).checkpoints()
    assert found.artifact_url == url.replace("/old/", "/new/")
    runs = MlflowClient(config.uri).search_runs(["1"], "tags.stage = 'cra-eval'")
    assert [run.data.tags["artifact_url"] for run in runs] == [found.artifact_url]


def test_folders_of_ray_train_are_known_by_their_exact_names():
    found = filter(is_ray_folder, ["ray-0123abcd", "ray-notes", "ray-0123abcd.bak", "raying"])
    assert list(found) == ["ray-0123abcd"]
