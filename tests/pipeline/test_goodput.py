"""What the ranks report of their time: only seconds of steps that were taken."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from data_shards.streaming.sampler import Cursor
from pipeline.config import CheckpointConfig, TrainConfig
from pipeline.run.events import Metrics
from pipeline.run.state import TrainState
from pipeline.run.step_schedule import make_step_schedule
from pipeline.training.hooks import CheckpointHook
from pipeline.training.objective import STATISTICS
from pipeline.training.recorder import Recorder
from pipeline.training.schedules import StepContext
from pipeline.training.trainer import Trainer
from tests.harness import run_ranks
from tests.pipeline.small_runs import rank_world, small_run

STEP_S, WAIT_S, KEEP_S = 0.05, 0.2, 0.3
SKIPPED, KEPT = 2, 3


class Stream:
    """Batches; rank 1 waits for each."""

    retries = 0

    def __init__(self, rank, size):
        self.rank, self.size, self.damaged, self.waited_s = rank, size, Counter(), 0.0

    def __iter__(self):
        images, labels = torch.zeros(self.size, 1, 8, 8), torch.zeros(self.size)
        for _ in range(10):
            if self.rank == 1:
                time.sleep(WAIT_S)
                self.waited_s += WAIT_S
            yield SimpleNamespace(images=images, labels=labels, cursor_after=Cursor(seed=0))


class Engine:
    """Takes its time, and does not take one of the steps."""

    def __init__(self, size):
        self.size = size
        self.statistics = [statistic.metric for statistic in STATISTICS]

    def step(self, micro_batches, now):
        time.sleep(STEP_S)
        return None if now.step + 1 == SKIPPED else torch.tensor([1.0, 1.0, 1.0, self.size])

    def forward_seconds(self):
        return 0.0

    def audit_metrics(self):
        return {}


def train(rank, world_size):
    config = small_run(
        train=TrainConfig(global_batch=8, epochs=1, warmup_epochs=0, stop_after=4),
        checkpoint=CheckpointConfig(every_steps=KEPT),
    )
    plan = make_step_schedule(config.train, config.checkpoint, samples=80, world_size=world_size)
    events = []
    with rank_world(rank, world_size) as world:
        size = plan.rank_batch
        saver = SimpleNamespace(save=lambda state: time.sleep(KEEP_S), poll=lambda: None)
        engine, stream, hooks = Engine(size), Stream(rank, size), CheckpointHook(saver)
        trainer = Trainer(
            plan=plan,
            context_at=lambda step: StepContext(step, step / plan.total_steps, 1.0, 0.1),
            engine=engine,
            stream=stream,
            progress=TrainState(0, Cursor(seed=0)),
            recorder=Recorder(
                world=world,
                statistics=engine.statistics,
                stream=stream,
                hooks=hooks,
                global_batch=config.train.global_batch,
                peak_lr=config.optim.lr,
                emit=events.append,
            ),
            rollbacks=SimpleNamespace(too_many=lambda skipped: False),
            hooks=hooks,
            emit=events.append,
        )
        trainer.fit()
    return {e.step: e for e in events if isinstance(e, Metrics)}


@pytest.mark.distributed
def test_waits_checkpoints_and_skipped_steps_are_not_productive():
    records = run_ranks(train, 2)[0]
    assert list(records) == [1, 2, 3, 4]
    assert records[SKIPPED].productive_s == 0
    for step in (1, 3, 4):
        found = records[step]
        assert STEP_S * 0.9 < found.productive_s < STEP_S + 0.9 * min(WAIT_S, KEEP_S)
        assert found.values["data/wait_s"] == pytest.approx(WAIT_S / 2, rel=0.01)
