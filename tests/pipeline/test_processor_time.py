"""A run whose budget is processor time: where its schedules stand, and when it ends."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from pipeline.config import CheckpointConfig, ClusterConfig, TrainConfig, replaced
from pipeline.presets.registry import run_preset
from pipeline.run.step_schedule import make_step_schedule
from pipeline.training import processor_time
from pipeline.training.hooks import Record
from pipeline.training.metric_reducer import Reduced
from pipeline.training.processor_time import ProcessorTimeHook
from pipeline.training.schedules import StepContext

TOTAL = 50


@pytest.fixture
def clock(monkeypatch):
    """The processor time of this process."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(processor_time, "time", SimpleNamespace(process_time=lambda: clock.now))
    return clock


def context_at(step):
    return StepContext(step, step / TOTAL, lr_factor=1 - step / TOTAL, eps=0.1)


def record(hook, step):
    values = hook.local_metrics()
    found = Record(step, Reduced(values, {}, values), {})
    hook.on_record(found)
    return found


def test_schedules_follow_the_share_that_is_used_and_the_run_ends_when_it_is_all(clock):
    hook = ProcessorTimeHook(10.0)
    at = hook.scheduled(context_at, TOTAL)
    assert at(0) == context_at(0)
    for step in range(1, 10):
        hook.before_step(step - 1)
        clock.now += 1.0
        assert not hook.wants_record()
        found = record(hook, step)
        assert found.reduced.values["train/processor_s"] == step
        assert (found.stop, found.save) == (False, False)
        now = at(step)
        assert now.step == step
        assert now.lr_factor == 1 - 5 * step / TOTAL
        assert now.progress == 5 * step / TOTAL
    hook.before_step(9)
    clock.now += 1.5
    assert at(10) == dataclasses.replace(context_at(TOTAL - 1), step=10)
    assert hook.wants_record()  # after the first step beyond it, whatever `log_every`
    found = record(hook, 10)
    assert (found.stop, found.save) == (True, True)


@pytest.mark.parametrize(("step", "ends"), [(0.9, False), (1.4, True), (3.0, True)])
def test_a_run_ends_with_the_step_nearest_to_its_budget(clock, step, ends):
    """After one more step of 1.4 s it would be 0.8 s beyond its 10 s, where it is 0.6 s short."""
    hook = ProcessorTimeHook(10.0)
    clock.now += 9.4 - step
    hook.before_step(7)
    clock.now += step
    assert hook.wants_record() is ends
    assert record(hook, 8).stop is ends


def test_without_a_budget_time_is_recorded_and_nothing_else_changes(clock):
    hook = ProcessorTimeHook(0.0)
    assert hook.scheduled(context_at, TOTAL) is context_at
    clock.now += 1.0
    assert not hook.wants_record()
    found = record(hook, 1)
    assert (found.stop, found.save) == (False, False)
    assert found.reduced.values["train/processor_s"] == 1


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
