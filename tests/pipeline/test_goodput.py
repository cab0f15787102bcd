"""What the ranks report of their time: only seconds of steps that were taken."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_shards.streaming.sampler import Cursor
from pipeline.config import CheckpointConfig, TrainConfig
from pipeline.run.events import Metrics
from pipeline.run.step_schedule import make_step_schedule
from pipeline.run.worker_spec import TrainState
from pipeline.training import recorder, trainer, worker
from pipeline.training.hooks import CheckpointHook
from pipeline.training.metrics import STATISTICS
from tests.harness import run_ranks
from tests.pipeline.small_runs import rank_world, small_run

STEP_S, WAIT_S, SAVE_S = 0.05, 0.2, 0.3
SKIPPED, SAVED = 2, 3


class Clock:
    """Seconds that pass when something is done, whatever the machine does meanwhile."""

    def __init__(self):
        self.now = 0.0

    def pass_by(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now

    def time(self):
        return self.now


class Stream:
    """Batches; rank 1 waits for each, and rank 0 waits for rank 1 in the step."""

    retries = 0

    def __init__(self, rank, size, clock):
        self.clock, self.rank, self.size = clock, rank, size
        self.damaged, self.waited_s = Counter(), 0.0

    def __iter__(self):
        images, labels = torch.zeros(self.size, 1, 8, 8), torch.zeros(self.size)
        for _ in range(10):
            self.clock.pass_by(WAIT_S)
            self.waited_s += WAIT_S * (self.rank == 1)
            yield SimpleNamespace(images=images, labels=labels, cursor_after=Cursor(seed=0))


class Engine:
    """Takes its time, and does not take one of the steps."""

    def __init__(self, size, clock):
        self.size, self.clock = size, clock
        self.statistics = [statistic.metric for statistic in STATISTICS]

    def step(self, micro_batches, now):
        self.clock.pass_by(STEP_S)
        return None if now.step + 1 == SKIPPED else torch.tensor([1.0, 1.0, 1.0, self.size])


def train(rank, world_size):
    config = small_run(
        train=TrainConfig(global_batch=8, epochs=1, warmup_epochs=0, stop_after=4),
        checkpoint=CheckpointConfig(every_steps=SAVED),
    )
    plan = make_step_schedule(config.train, config.checkpoint, samples=80, world_size=world_size)
    events = []
    with rank_world(rank, world_size) as world:
        size = plan.rank_batch
        clock: Any = Clock()
        recorder.time = trainer.time = clock
        saver = SimpleNamespace(save=lambda state: clock.pass_by(SAVE_S), poll=lambda: None)
        engine, stream = Engine(size, clock), Stream(rank, size, clock)
        hooks = CheckpointHook(saver)
        training = worker._trainer(
            config,
            plan,
            world=world,
            engine=engine,
            stream=stream,
            progress=TrainState(0, Cursor(seed=0)),
            rollbacks=SimpleNamespace(too_many=lambda skipped: False),
            hooks=hooks,
            emit=events.append,
        )
        training.fit()
    return {e.step: e for e in events if isinstance(e, Metrics)}


@pytest.mark.distributed
def test_waits_checkpoints_and_skipped_steps_are_not_productive():
    records = run_ranks(train, 2)[0]
    assert list(records) == [1, 2, 3, 4]
    assert records[SKIPPED].productive_s == 0
    for step in (1, 3, 4):
        found = records[step]
        assert found.productive_s == pytest.approx(STEP_S)
        assert found.values["data/wait_s"] == pytest.approx(WAIT_S / 2)
