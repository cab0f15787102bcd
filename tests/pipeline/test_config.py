import ast
import dataclasses
import pickle
from pathlib import Path

import pytest

import pipeline
from pipeline.config import (
    CheckpointConfig,
    RunConfig,
    TrainConfig,
    changes,
    decides_result,
    flatten,
)
from pipeline.errors import PipelineError
from pipeline.presets.registry import PRESETS, run_preset
from pipeline.run.step_schedule import make_step_schedule
from tests.pipeline.small_runs import small_run


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_round_trips(name):
    config = run_preset(name)
    assert config.preset == name
    assert RunConfig.from_json(config.to_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    batch, parts = config.train.global_batch, config.cluster.workers * config.train.accumulation
    assert batch % parts == 0


def test_unknown_preset_names_the_close_one():
    with pytest.raises(PipelineError, match=r"unknown preset 'digit' \(nearest: digits, .*--list"):
        run_preset("digit")


def test_digits_trains_with_lookahead_and_polar_on_two_ranks():
    config = run_preset("digits")
    assert config.optim.lookahead_steps > 0
    assert config.optim.polar_every > 0
    assert config.cluster.workers == 2
    assert config.cluster.launcher == "ray"


def test_another_schema_version_is_refused():
    text = small_run().to_json().replace('"schema_version": 3', '"schema_version": 7')
    with pytest.raises(PipelineError, match="schema_version=7"):
        RunConfig.from_json(text)


def test_unknown_key_in_a_saved_file_is_refused():
    text = small_run().to_json().replace('"seed"', '"sead"')
    with pytest.raises(PipelineError, match="sead"):
        RunConfig.from_json(text)


def test_changes_that_matter_on_resume_are_listed():
    old = small_run()
    same = small_run(
        train=dataclasses.replace(old.train, stop_after=3),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    assert not any(map(decides_result, changes(old, same)))
    new = small_run(train=dataclasses.replace(old.train, seed=1))
    assert changes(old, new) == {"train.seed": "0 -> 1"}
    assert decides_result("train.seed")


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_plan_counts():
    config = small_run(
        train=TrainConfig(global_batch=24, epochs=2.5, warmup_epochs=1, accumulation=2),
        checkpoint=CheckpointConfig(every_steps=4),
    )
    plan = make_step_schedule(config.train, config.checkpoint, samples=100, world_size=3)
    assert plan.total_steps == plan.last_step == 11  # ceil(250 / 24)
    assert plan.warmup_steps == 4
    assert (plan.rank_batch, plan.micro_batch) == (8, 4)
    assert [step for step in range(1, 12) if plan.saves(step)] == [4, 8, 11]


def test_stop_after_ends_early_with_a_checkpoint():
    config = small_run(train=TrainConfig(global_batch=24, epochs=1, stop_after=3))
    plan = make_step_schedule(config.train, config.checkpoint, samples=240, world_size=2)
    assert (plan.total_steps, plan.last_step) == (10, 3)
    assert [step for step in range(1, 4) if plan.saves(step)] == [3]


@pytest.mark.parametrize(
    ("batch", "accumulation", "world_size", "message"),
    [
        (24, 1, 5, r"train.global_batch=24 is not divisible by 5 ranks x train.accumulation=1 = 5"),
        (
            30,
            3,
            4,
            r"train.global_batch=30 is not divisible by 4 ranks x train.accumulation=3 = 12",
        ),
        (200, 1, 1, r"train.global_batch=200 exceeds the 100 samples"),
    ],
)
def test_impossible_batches_are_refused(batch, accumulation, world_size, message):
    config = small_run(train=TrainConfig(global_batch=batch, accumulation=accumulation))
    with pytest.raises(PipelineError, match=message):
        make_step_schedule(config.train, config.checkpoint, samples=100, world_size=world_size)


READERS_OF_ALL = {
    "pipeline/training/worker.py": "takes the configuration apart and builds the parts of a rank",
    "pipeline/run/worker_spec.py": "carries the configuration to the ranks",
    "pipeline/run/config_file.py": "reads and writes it as a file",
}


def test_parts_of_a_run_get_their_own_part_of_the_configuration():
    """So a signature says what a component depends on; only who builds the parts sees all."""
    root = Path(pipeline.__file__).parents[1]
    found = {
        str(path.relative_to(root))
        for package in ("training", "checkpoint", "resilience", "run")
        for path in (root / "pipeline" / package).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if "RunConfig" in (getattr(node, name, "") for name in ("id", "attr", "name", "value"))
    }
    assert found == set(READERS_OF_ALL)
