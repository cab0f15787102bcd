"""Runs that are submitted: their tags, their names, and submitting them again."""

import dataclasses
import json
from pathlib import Path

import pytest

import pipeline.driver.preflight
from data_shards.sources.digits import digits
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from pipeline.errors import PipelineError
from pipeline.pretrain import parse
from pipeline.run.ray_job import is_ray_job, submission_tags, uploaded_code
from tests.pipeline.prepared import prepare

pytestmark = pytest.mark.integration


@pytest.fixture
def base(tmp_path):
    write_shard_set(digits(), str(tmp_path / "shards"))
    return ["digits", "--storage", str(tmp_path), "--data.shards", str(tmp_path / "shards")]


def test_tags_of_a_ray_job(monkeypatch):
    metadata = {"job_submission_id": "raysubmit_1", "job_name": "raysubmit_1", "user": "ada"}
    body = {"runtime_env": {}, "metadata": {**metadata, "team": "vision"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(body))
    assert is_ray_job()
    assert submission_tags() == {
        "ray_job": "raysubmit_1",
        "ray_job.team": "vision",
        "mlflow.user": "ada",
    }


def test_tags_of_a_run_without_ray(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("LOGNAME", "grace")
    assert not is_ray_job()
    assert submission_tags() == {"mlflow.user": "grace"}


def test_uploaded_code_is_known_by_its_digest():
    assert uploaded_code(Path("/x/_ray_pkg_0123abcd")) == "uploaded-0123abcd"
    assert uploaded_code(Path("/home/ada/project")) is None


def test_runs_of_the_same_second_have_two_names(base, monkeypatch):
    monkeypatch.setattr(pipeline.driver.preflight, "_new_name", lambda config: "digits-now")
    names = [prepare(parse(base), world_size=2).job.config.name for _ in range(3)]
    assert names == ["digits-now", "digits-now-2", "digits-now-3"]


def test_of_two_runs_of_one_name_one_is_refused(base, monkeypatch):
    named = [*base, "--name", "a"]
    first = prepare(parse(named), world_size=2)
    looks = iter([False])  # the other one looked before the first one wrote

    def exists(store, name=""):
        if store == first.run and name == "run.json":
            return next(looks, True)
        return found(store, name)

    found = type(first.run).exists
    monkeypatch.setattr(type(first.run), "exists", exists)
    with pytest.raises(PipelineError, match="exists: give --resume"):
        prepare(parse(named), world_size=2)


def test_the_same_command_starts_and_continues(base):
    again = parse([*base, "--name", "a", "--start-or-resume"])
    runs = [prepare(again, world_size=2).run for _ in range(2)]
    assert runs[0] == runs[1]
    other = dataclasses.replace(again, train=dataclasses.replace(again.train, seed=1))
    with pytest.raises(PipelineError, match=r"train.seed: 0 -> 1"):
        prepare(other, world_size=2)


def test_a_store_that_excludes_nobody_is_refused_whatever_the_name(base, monkeypatch):
    monkeypatch.setattr(Store, "local_path", lambda store: None)
    monkeypatch.setattr(Store, "create", lambda *_: True)
    for named in (base, [*base, "--name", "a"]):
        with pytest.raises(PipelineError, match="does not honour conditional writes"):
            prepare(parse(named), world_size=2)


def test_who_waits_says_for_which_run(base, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*base, "--wait-for-lease"])
    assert "wait_for_lease needs --name or --resume" in capsys.readouterr().err


def test_a_run_without_a_name_cannot_be_continued_by_the_same_command(base, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*base, "--start-or-resume"])
    assert "start_or_resume needs --name" in capsys.readouterr().err
