"""A hook and a statistic of one's own join a run in a few lines each; the loop is not touched."""

from typing import Any

import pytest

from pipeline.config import CheckpointConfig
from pipeline.run.events import Metrics
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training import objective
from pipeline.training.hooks import Hook, HookList
from pipeline.training.metric_reducer import Metric, Reduction
from pipeline.training.metrics import STATISTICS, Statistic
from tests.harness import run_ranks
from tests.pipeline.small_runs import observed_run, rank_world, small_run, small_shards

STOP_AFTER = 4


class Longest(Hook):
    """Records a number of its own, notes the moments, and ends the run after some steps."""

    metrics = (Metric("perf/highest_rank", Reduction.MAX),)

    def __init__(self, rank):
        self.rank, self.moments = rank, []

    def local_metrics(self):
        return {"perf/highest_rank": self.rank}

    def on_record(self, record):
        record.values["perf/twice"] = 2 * record.reduced.values["perf/highest_rank"]
        record.save = record.stop = record.step == STOP_AFTER

    def before_batch(self, step):
        self.moments.append(("before_batch", step))

    def before_step(self, step):
        self.moments.append(("before_step", step))

    def before_checkpoint(self, step):
        self.moments.append(("before_checkpoint", step))

    def on_save(self, state):
        self.moments.append(("on_save", state.step))

    def after_step(self, step):
        self.moments.append(("after_step", step))

    def at_end(self):
        self.moments.append(("at_end",))


def run(rank, world_size, folder, shards):
    wrong = Statistic(
        Metric("train/wrong", Reduction.MEAN),
        lambda found: (found.label_logit <= found.rivals.amax(1, keepdim=True)).sum().float(),
    )
    module: Any = objective
    module.STATISTICS = (wrong, *STATISTICS)
    hook = Longest(rank)
    config = small_run(checkpoint=CheckpointConfig(every_steps=3))
    with rank_world(rank, world_size):
        outcome = observed_run(WorkerSpec(config, folder, shards, {}), hooks=[hook])
    return outcome.events, hook.moments


@pytest.mark.distributed
def test_a_custom_hook_and_a_custom_statistic_are_in_every_record(tmp_path):
    shards = small_shards(tmp_path / "shards")
    (events, moments), (_, others) = run_ranks(run, 2, str(tmp_path / "run"), shards, timeout=200)
    records = {event.step: event.values for event in events if isinstance(event, Metrics)}
    assert list(records) == [1, 2, 3, 4], "the hook has stopped the run"
    for values in records.values():
        assert (values["perf/highest_rank"], values["perf/twice"]) == (1.0, 2.0)
        # No other metric was shifted by the one before it.
        assert values["data/retries"] == values["data/damaged"] == 0
        assert 0 <= values["train/certified"] <= values["train/clean"] < 1
        assert values["train/wrong"] == pytest.approx(1 - values["train/clean"])
    assert others == moments
    assert moments == [
        *[
            moment
            for step in range(STOP_AFTER)
            for moment in (
                ("before_batch", step),
                ("before_step", step),
                ("before_checkpoint", step),
                *[("on_save", step + 1)] * (step + 1 in (3, STOP_AFTER)),
                ("after_step", step + 1),
            )
        ],
        ("at_end",),
    ]


def test_every_moment_reaches_every_hook_in_order():
    """A moment that is added to Hook and not to HookList would never be called."""
    calls = []

    def noting(name, number):
        def note(*arguments):
            calls.append((name, number, arguments))
            return {}

        return note

    moments = [name for name in vars(Hook) if not name.startswith("_") and name != "metrics"]
    for name in moments:
        hooks = [Hook(), Hook()]
        for number, hook in enumerate(hooks):
            setattr(hook, name, noting(name, number))
        arguments = () if name in ("wants_record", "local_metrics", "at_end") else (object(),)
        getattr(HookList(hooks), name)(*arguments)
        assert calls[-2:] == [(name, 0, arguments), (name, 1, arguments)]
    assert len(moments) == len(calls) / 2 == 10
