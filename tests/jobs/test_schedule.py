"""The scheduler: rules, what is open, and one evaluation from the store to the record."""

import json
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import tyro
from mlflow import MlflowClient
from pydantic import ValidationError

from data_shards.untrusted.terminal import PlainConsole
from jobs.errors import EvaluationError
from jobs.evaluation.config import EvaluationConfig, suite_config
from jobs.evaluation.suites import EVALUATION_SUITES
from jobs.schedule import Scheduler, _apply, _due_now, _mark, main, rules_by_time, trigger
from jobs.scheduling.backlog import Backlog
from jobs.scheduling.claims import ClaimPhase, Claims
from jobs.scheduling.config import ScheduleConfig, arguments
from jobs.scheduling.launchers import submission_id
from jobs.scheduling.status_page import page
from pipeline.run.lease import Lease
from pipeline.tracking.checkpoint_query import CheckpointQuery
from pipeline.tracking.client import TrackingConfig
from tests.jobs.mlflow_store import Store

pytestmark = pytest.mark.integration


@pytest.fixture
def store(tmp_path, shards):
    return Store(tmp_path, shards)


def backlog(store, **changes):
    config = store.config(**changes)
    claims = Claims(config.claims_url, lease_s=config.lease_s)
    return Backlog(config, claims, store.watch(models=config.models)), claims, config


class Recorder:
    """A submitter that only remembers; evaluations end with the next exit code."""

    def __init__(self, *codes):
        self.codes, self.submitted = list(codes), []

    def submit(self, claim, words, metadata):
        self.submitted.append((claim, words, metadata))
        return "nowhere"

    def ended(self, claim):
        return self.codes.pop(0) if self.codes else None

    def close(self):
        pass


def test_rules_name_suites_and_times():
    rules = (
        "certify@checkpoint",
        "certify+fast-attack",
        "certify+strong-attack+bfloat16@0 3 * * *",
        "certify+strong-attack@6h",
    )
    config = ScheduleConfig(rules=rules)
    assert rules_by_time(config) == {
        "checkpoint": ["certify", "certify+fast-attack"],
        "0 3 * * *": ["certify+strong-attack+bfloat16"],
        "6h": ["certify+strong-attack"],
    }
    now = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)
    due = trigger("0 3 * * *", config).get_next_fire_time(None, now)
    assert due == datetime(2026, 11, 22, 3, tzinfo=timezone.utc)
    with pytest.raises(EvaluationError, match=r"'often' is neither.*nor a cron"):
        trigger("often", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": ("nightly@6h",)}, "no evaluation suite 'nightly'; known: certify, certify"),
        ({"tracking": TrackingConfig(uri="https://mlflow.example")}, "needs --claims URL"),
        ({"tracking": TrackingConfig(uri="https://me:sesame@x")}, "credentials"),
        ({"runtime_env": "[]"}, "runtime_env .*not a JSON object"),
    ],
)
def test_impossible_schedules_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**changes)


@pytest.mark.parametrize("suite", EVALUATION_SUITES)
def test_the_command_says_what_the_suite_says(suite, tmp_path):
    config = suite_config(
        suite,
        (tmp_path / "a").as_uri(),
        shards="s3://bucket/set",
        placement={"role": "!training"},
        num_gpus=0.25,
        tracking=TrackingConfig(uri="https://mlflow.example", experiment="two words"),
    )
    assert tyro.cli(EvaluationConfig, args=arguments(config)) == config


def test_suites_differ_in_their_result_and_in_its_place(artifact):
    configs = [suite_config(suite, artifact) for suite in EVALUATION_SUITES]
    assert len({config.out for config in configs}) == len(EVALUATION_SUITES)
    assert configs[0] == EvaluationConfig(artifact=artifact)  # what training makes
    with pytest.raises(EvaluationError, match="no evaluation suite"):
        suite_config("slow", artifact)


def test_what_is_open_done_left_to_training_or_unreadable(store):
    store.checkpoint(1)
    busy = store.train("busy", "RUNNING", **{"checkpoint.evaluate": "True"})
    store.checkpoint(2, run_id=busy)
    gone = Path(store.checkpoint(3)[0].removeprefix("file://"))
    (gone / "artifact.json").unlink()
    look, claims, config = backlog(store, rules=("certify", "certify+fast-attack"))
    entries = {(e.suite, e.checkpoint.step): e for e in look.look(config.suites)}
    phases = {name: entry.phase for name, entry in entries.items()}
    assert phases == {
        ("certify", 1): ClaimPhase.OPEN,
        ("certify", 2): ClaimPhase.RUNNING,
        ("certify", 3): ClaimPhase.FAILED,
        ("certify+fast-attack", 1): ClaimPhase.OPEN,
        ("certify+fast-attack", 2): ClaimPhase.OPEN,
        ("certify+fast-attack", 3): ClaimPhase.FAILED,
    }
    assert entries["certify", 2].note == "left to its training"
    assert "no artifact" in entries["certify", 3].note
    with pytest.raises(EvaluationError, match="no artifact"):
        _ = entries["certify", 3].next

    impatient = backlog(store, patience_s=1e-6)[0]
    assert impatient.look(["certify"])[1].phase is ClaimPhase.OPEN

    claims.take(entries["certify+fast-attack", 1].next, {"suite": "certify+fast-attack"})
    assert {e.phase for e in look.look(["certify+fast-attack"])} == {
        ClaimPhase.RUNNING,
        ClaimPhase.OPEN,
        ClaimPhase.FAILED,
    }
    console = PlainConsole(record=True, width=200)
    page(console, config, claims, look.look(config.suites))
    text = console.export_text()
    assert "certify+fast-attack of run step 1; claim" in text
    assert "left to its training" in text
    assert "no artifact at" in text


def test_an_evaluation_has_the_split_and_the_radii_of_its_training(store):
    params = {"data.test_split": "validation", "checkpoint.evaluate_eps": "['1/255', '8/255']"}
    store.checkpoint(1, run_id=store.train("other", **params))
    (checkpoint,) = store.watch().checkpoints()
    for suite in EVALUATION_SUITES:
        config = store.config().evaluation(suite, checkpoint)
        assert (config.split, config.eps) == ("validation", ("1/255", "8/255"))
        assert config.out is None or "/evaluation/validation-" in config.out


def test_only_the_newest_checkpoint_of_each_run(store):
    other = store.train("other")
    for step in (1, 2, 3):
        store.checkpoint(step)
        store.checkpoint(10 * step, run_id=other)
    found = backlog(store, newest=True)[0].look(["certify+fast-attack"])
    assert sorted(entry.checkpoint.step for entry in found) == [3, 30]


def test_versions_of_registered_models_are_watched(store):
    _, _, model_id = store.checkpoint(5)
    client = MlflowClient(store.tracking.uri)
    client.create_registered_model("digits")
    source = client.get_logged_model(model_id).artifact_location
    client.create_model_version("digits", source, tags={"model_id": model_id})
    config = store.config(models=("digits",), tracking=TrackingConfig(uri=store.tracking.uri))
    watch = store.watch(models=config.models)
    watch._experiments = ("another",)
    claims = Claims(config.claims_url, lease_s=60)
    (entry,) = Backlog(config, claims, watch).look(["certify+fast-attack"])
    assert entry.checkpoint.model_id == model_id
    assert entry.config.tracking.experiment == "set"


def test_two_schedulers_share_the_work_and_keep_their_bounds(store):
    for step in range(5):
        store.checkpoint(step, run_id=store.train(f"run-{step}"))
    submitters = [Recorder(), Recorder()]
    schedulers = []
    for submitter in submitters:
        look, claims, config = backlog(store, parallel=2)
        schedulers.append(Scheduler(config, claims, look, submitter))
    for scheduler in schedulers:
        scheduler.look(["certify+fast-attack"])
    for scheduler in schedulers * 2:
        scheduler.tick()
    assert [len(s.submitted) for s in submitters] == [2, 2]
    submitters[0].codes = [0, 1]
    schedulers[0].tick()
    claims = [claim for s in submitters for claim, _, _ in s.submitted]
    assert len({claim.key for claim in claims}) == 5
    assert schedulers[0].failures == 1
    _, words, facts = submitters[0].submitted[0]
    assert words[:2] == ["-m", "jobs.scheduling.claimed_evaluation"]
    assert facts["suite"] == "certify+fast-attack"
    assert submission_id(Lease("ab", 2)) == "cra-ab-0002"


def test_a_time_that_passed_without_a_scheduler_is_caught_up(store):
    look, claims, config = backlog(store)
    cron = "0 3 * * *"
    assert _due_now("checkpoint", config, claims)
    assert _due_now("1h", config, claims)
    assert not _due_now(cron, config, claims)  # never applied: its time will come
    _apply(Scheduler(config, claims, look, Recorder()), claims, cron, ["certify+fast-attack"])
    assert not _due_now(cron, config, claims)
    (mark,) = [name for name in claims.store.ls() if name.startswith("rule.")]
    claims.store.write(mark, json.dumps({"at": time.time() - 86400}).encode())
    assert _due_now(cron, config, claims)


@pytest.mark.parametrize(
    "mark",
    [b"", b"[]", b"{}", b"\0" * 40, b'{"at": "x"}', b'{"at": null}', b'{"at": NaN}',
     b'{"at": 1e18}', b'{"at": 1e300}', b'{"at": 253402300799}', b'{"at": [1]}'],
)  # fmt: skip
def test_a_damaged_mark_of_a_rule_applies_it_now(tmp_path, caplog, mark):
    config = ScheduleConfig(claims=str(tmp_path))
    claims = Claims(config.claims_url, lease_s=60)
    for when in ("1h", "0 3 * * *"):
        claims.store.write(_mark(when), mark)
        assert _due_now(when, config, claims)
    assert caplog.text.count("the rule is applied now") == 2


@pytest.mark.parametrize(
    ("params", "note"),
    [
        ({"data.test_split": "../../secret"}, "would leave the store"),
        ({"checkpoint.evaluate_eps": "['1/0']"}, "1/0"),
    ],
)
def test_one_record_beyond_reason_leaves_the_others_to_be_evaluated(store, params, note):
    store.checkpoint(1, run_id=store.train("odd", **params))
    store.checkpoint(2)
    odd, sound = backlog(store)[0].look(["certify+fast-attack"])
    assert (odd.phase, sound.phase) == (ClaimPhase.FAILED, ClaimPhase.OPEN)
    assert note in odd.note


def test_a_version_whose_model_was_deleted_hides_no_other(store, caplog):
    client = MlflowClient(store.tracking.uri)
    client.create_registered_model("it's")
    for step in (1, 2):
        model_id = store.checkpoint(step)[2]
        source = client.get_logged_model(model_id).artifact_location
        client.create_model_version("it's", source, tags={"model_id": model_id})
    client.delete_logged_model(model_id)
    watch = CheckpointQuery(store.tracking.uri, ("another",), ("it's",))
    assert [found.step for found in watch.checkpoints()] == [1]
    assert "is passed over" in caplog.text


def test_a_store_that_does_not_answer_is_asked_again(store, monkeypatch, caplog):
    store.checkpoint(1)
    look, claims, config = backlog(store)
    scheduler = Scheduler(config, claims, look, submitter := Recorder())
    with monkeypatch.context() as patch:
        patch.setattr(look._watch, "checkpoints", lambda: 1 / 0)
        scheduler.look(["certify+fast-attack"])
    assert "cannot look for checkpoints: ZeroDivisionError" in caplog.text
    scheduler.look(["certify+fast-attack"])
    scheduler.tick()
    assert len(submitter.submitted) == 1


def test_once_evaluates_records_and_then_has_nothing_to_do(store, capfd, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(store.folder / "cache"))
    url, _, model_id = store.checkpoint(7)
    flags = ["--tracking.uri", store.tracking.uri, "--tracking.experiment", "set"]
    flags += ["--rules", "certify@checkpoint", "--cluster.launcher", "local"]
    assert main([*flags, "--once"]) == 0
    log = next((store.folder / "cache").rglob("*.log")).read_text()
    assert "certified robust accuracy" in log
    client = MlflowClient(store.tracking.uri)
    experiment = client.get_experiment_by_name("set").experiment_id
    (run,) = client.search_runs([experiment], "tags.stage = 'cra-eval'")
    assert run.data.tags["model_id"] == model_id
    assert run.data.tags["train_run_id"] == store.run_id
    assert Path(url.removeprefix("file://"), "evaluation/test/summary.json").exists()
    capfd.readouterr()
    assert main([*flags, "--once"]) == 0
    assert "attempt" not in capfd.readouterr().err
    assert main([*flags, "--status"]) == 0
    assert "│ certify │ 1           │ 0    │ 0       │ 0       │ 1    │ 0      │" in (
        capfd.readouterr().out
    )


def test_bad_input_is_refused_by_the_command(capfd):
    assert main(["--rules", "certify@now and then"]) == 2
    assert "neither `checkpoint`" in capfd.readouterr().out
