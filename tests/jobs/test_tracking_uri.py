"""Where an evaluation is recorded: in the store of the run that made the artifact."""

import types

import pytest

from jobs.errors import EvaluationError
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.tracking_uri import record_store
from pipeline.run.ray_job import default_storage
from pipeline.tracking.client import TrackingConfig

SUMMARY = types.SimpleNamespace(dataset="digits-test", split="test")


def store(folder, stated=None, **tracking):
    artifact = folder / "a/artifacts/step-00000005"
    config = EvaluationConfig(
        artifact=str(artifact), tracking=TrackingConfig(**{"uri": "", **tracking})
    )
    context = {} if stated is None else {"tracking": stated}
    return record_store(config, types.SimpleNamespace(context=context), SUMMARY)


def test_it_is_the_store_of_the_run_also_after_both_have_moved(tmp_path):
    (tmp_path / "mlflow.db").touch()
    stated = {"uri": "sqlite:///../../../mlflow.db", "experiment": "mine"}
    found = store(tmp_path, stated)
    assert (found.uri, found.experiment) == (f"sqlite:///{tmp_path}/mlflow.db", "mine")


def test_what_is_named_wins_and_what_nobody_names_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stated = {"uri": "sqlite:///../../../none.db", "experiment": "mine"}
    named = store(tmp_path, stated, uri="http://tracker:5000", experiment="other")
    assert (named.uri, named.experiment) == ("http://tracker:5000", "other")
    default = store(tmp_path)
    assert default.experiment == "digits"  # as a training names its own
    assert default.uri == f"sqlite:///{tmp_path / default_storage()}/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///../../../none.db", r"no MLflow store .*/none.db: give --tracking.uri"),
        ("http://stranger:5000", r"recorded on the server http://stranger:5000: if it is yours"),
    ],
)
def test_a_store_that_an_artifact_names_is_there_or_listed(tmp_path, uri, message):
    with pytest.raises(EvaluationError, match=message):
        store(tmp_path, {"uri": uri, "experiment": "e"})
    listed = store(
        tmp_path,
        {"uri": "http://stranger:5000", "experiment": "e"},
        addresses=("http://stranger:5000",),
    )
    assert listed.uri == "http://stranger:5000"
