"""Adding an evaluation suite or an attack suite takes one entry of a table."""

import pytest
from pydantic import ValidationError

from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from jobs.evaluation.config import EvaluationConfig, suite_config
from jobs.evaluation.suites import ATTACK_SUITES, EVALUATION_SUITES, NO_ATTACK, AttackSuite
from jobs.scheduling.config import ScheduleConfig, arguments
from model.attacks import pgd

pytestmark = pytest.mark.integration


@pytest.fixture
def toy(monkeypatch):
    """An attack suite of one step and the evaluation suite that uses it: an entry each."""
    monkeypatch.setitem(ATTACK_SUITES, "toy", AttackSuite({"pgd": pgd}, steps=1))
    monkeypatch.setitem(EVALUATION_SUITES, "certify+toy-attack", {"attack": "toy"})
    return "certify+toy-attack"


def test_an_added_suite_evaluates(toy, artifact, fields):
    settings = {name: fields[name] for name in ("launcher", "batch_size", "eps", "record")}
    summary = evaluate(suite_config(toy, artifact, **settings))
    assert (summary.attack.suite, summary.attack.steps) == ("toy", 1)
    assert summary.attack.methods == ("pgd",)
    assert summary.out_url == str(Store(artifact).child("evaluation/test-certify-toy-attack"))


def test_an_added_suite_can_be_scheduled_and_named_on_the_command_line(toy, artifact):
    assert ScheduleConfig(rules=(f"{toy}@6h",)).suites == (toy,)
    words = arguments(suite_config(toy, artifact))
    assert words[words.index("--attack") + 1] == "toy"


def test_every_name_means_one_thing():
    assert not {NO_ATTACK, *ATTACK_SUITES} & set(EVALUATION_SUITES)
    for name, settings in EVALUATION_SUITES.items():
        parts = name.split("+")
        assert parts[0] == "certify"
        attack = settings.get("attack", NO_ATTACK)
        assert [part for part in parts if part.endswith("-attack")] == (
            [] if attack == NO_ATTACK else [f"{attack}-attack"]
        )


def test_an_unknown_attack_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match="no attack suite 'slow'; known: none, fast, strong"):
        EvaluationConfig(artifact="x", attack="slow")
