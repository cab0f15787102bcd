"""A run whose budget is processor time: where its schedules stand, and when it ends."""

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import pytest

from pipeline.config import CheckpointConfig, ClusterConfig, TrainConfig, replaced
from pipeline.presets import run_preset
from pipeline.run.step_schedule import make_step_schedule
from pipeline.training import processor_time
from pipeline.training.hooks import Record
from pipeline.training.metrics import Reduced
from pipeline.training.processor_time import ProcessorTimeHook
from pipeline.training.schedules import StepContext

TOTAL = 50


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every look at the clock costs a second."""
    ticks = itertools.count(100.0)
    monkeypatch.setattr(processor_time, "time", SimpleNamespace(process_time=lambda: next(ticks)))


def context_at(step):
    return StepContext(step, step / TOTAL, lr_factor=1 - step / TOTAL, eps=0.1)


def record(hook, step, ranks=2):
    """A record of ranks that have used the same time."""
    values = {name: ranks * value for name, value in hook.local_metrics().items()}
    found = Record(step, Reduced(values, {}, values), {})
    hook.on_record(found)
    return found


def test_schedules_follow_the_share_that_is_used_and_the_run_ends_when_it_is_all():
    hook = ProcessorTimeHook(10.0)
    at = hook.scheduled(context_at, TOTAL)
    assert at(0) == context_at(0)
    ends = []
    for step in range(1, 6):
        found = record(hook, step)
        assert found.reduced.values["train/processor_s"] == 2 * step  # of both ranks
        ends.append((found.stop, found.save))
        now = at(step)
        assert now.step == step
        assert now.lr_factor == 1 - min(10 * step, TOTAL - 1) / TOTAL
        assert now.progress == min(10 * step, TOTAL - 1) / TOTAL
    assert ends == [(False, False)] * 4 + [(True, True)]


def test_without_a_budget_time_is_recorded_and_nothing_else_changes():
    hook = ProcessorTimeHook(0.0)
    assert hook.scheduled(context_at, TOTAL) is context_at
    found = record(hook, 1)
    assert (found.stop, found.save) == (False, False)
    assert found.reduced.values["train/processor_s"] == 2


@pytest.mark.parametrize(("stop_after", "end"), [(0, sys.maxsize), (7, 7), (70, 70)])
def test_a_budget_has_as_many_steps_as_it_has_time_for(stop_after, end):
    train = TrainConfig(epochs=2, global_batch=4, processor_seconds=9, stop_after=stop_after)
    plan = make_step_schedule(train, CheckpointConfig(), samples=100, world_size=1)
    assert (plan.total_steps, plan.last_step) == (TOTAL, end)


@pytest.mark.parametrize(
    "changes",
    [{"cluster": ClusterConfig()}, {"resume": True}, {"start_or_resume": True, "name": "mine"}],
)
def test_a_budget_of_a_run_in_several_executions_is_refused(changes):
    config = dataclasses.replace(
        run_preset("digits"), cluster=ClusterConfig(launcher="local", cpus_per_worker=1)
    )
    config = replaced(config, "train.processor_seconds", 9.0)
    with pytest.raises(ValueError, match=r"train\.processor_seconds=9 needs"):
        dataclasses.replace(config, **changes)
