"""The rank that computes more slowly than the others: measured without waiting, and named."""

import dataclasses
import functools
import operator
import time
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.resilience import straggler as pace
from pipeline.resilience.straggler import Stopwatch, StragglerDetector
from pipeline.run.events import Metrics, Straggling
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training.zero3 import Zero3
from tests.harness import run_ranks
from tests.pipeline import small_runs
from tests.pipeline.small_runs import observed_run, rank_world, small_run, small_shards


class Slow(nn.Module):
    """Owns a parameter, and takes a second of the clock."""

    def __init__(self, clock):
        super().__init__()
        self.weight, self._clock = nn.Parameter(torch.zeros(1)), clock

    def forward(self, x):
        self._clock.now += 1.0
        return x * self.weight


class Clock:
    """Args: now: seconds; readings: how often it was asked."""

    now, readings = 0.0, 0

    def __call__(self):
        self.readings += 1
        return self.now


def test_only_the_modules_with_parameters_are_timed_once_per_reading(monkeypatch):
    clock = Clock()
    network = nn.Sequential(Slow(clock), nn.ReLU(), nn.Sequential(Slow(clock), nn.Flatten()))

    def gather(*_):
        clock.now += 0.1

    for module in network.modules():  # as a gather of parameters: before, and not counted
        module.register_forward_pre_hook(gather)
    watch = Stopwatch(network, torch.device("cpu"))
    monkeypatch.setattr(pace.time, "perf_counter", clock)
    assert watch.read() == 0
    for _ in range(3):
        network(torch.ones(1, 1))
    assert clock.readings == 4, "two modules, one of three passes"
    assert watch.read() == pytest.approx(2.0)
    assert watch.read() == 0


def test_a_rank_is_named_once_after_several_slow_records():
    """A record every 10 s, and eight in a second: named after 5 records and 30 s."""
    for every_s, last, first in ((10.0, 12, 4), (0.125, 1200, 240)):
        clock = [0.0]
        ranks = StragglerDetector(1.5, functools.partial(operator.getitem, clock, 0))
        named = []
        for record in range(2 * last):
            clock[0] = record * every_s
            slow = 3.0 if record != last else 1.0
            values = ranks.compare([1.0, 1.1, slow, 0.9])
            named.append(ranks.straggler())
            if record != last:
                assert values == {"perf/slowest_rank": 2, "perf/slowest_ratio": 3.0}
        found = [record for record, rank in enumerate(named) if rank is not None]
        assert found == [first, last + 1 + first]
    assert ranks.compare([1.0]) == ranks.compare([0.0, 1.0]) == {}


def slow_run(rank, world_size, folder, shards):
    class Slow(Zero3):
        def __init__(self, **parts):
            super().__init__(**parts)
            if rank == 1:
                stem = next(m for m in self._network.modules() if m in pace._leaves(self._network))
                forward = stem.forward

                def slow(*arguments, **options):
                    time.sleep(0.1)
                    return forward(*arguments, **options)

                stem.forward = slow

    config = small_run()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1.2))
    module: Any = small_runs
    module.Zero3, pace._SECONDS = Slow, 0.0
    with rank_world(rank, world_size):
        return observed_run(WorkerSpec(config, folder, shards, {}))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_slow_rank_is_named_while_it_trains(tmp_path):
    shards = small_shards(tmp_path / "shards")
    first, second = run_ranks(slow_run, 2, str(tmp_path / "run"), shards, timeout=280)
    records = [event.values for event in first.events if isinstance(event, Metrics)]
    assert {record["perf/slowest_rank"] for record in records} == {1.0}
    assert min(record["perf/slowest_ratio"] for record in records) > 3
    (event,) = [event for event in first.events if isinstance(event, Straggling)]
    assert (event.step, event.rank) == (5, 1)
    assert "process" in event.host
    assert not any(isinstance(event, Straggling) for event in second.events)
