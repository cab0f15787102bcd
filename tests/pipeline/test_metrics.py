"""Metrics are declared once by name: what ranks reduce comes back under these names."""

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext
from pipeline.training.metric_reducer import SAMPLES, Metric, MetricReducer, Reduction
from tests.harness import run_ranks
from tests.pipeline.small_runs import rank_world

COUNT = Metric(SAMPLES, Reduction.SUM, recorded=False)
LOSS = Metric("train/loss", Reduction.MEAN)
FIRST = Metric("train/first", Reduction.SUM)
STOP = Metric("stop", Reduction.SUM, recorded=False)
RETRIES = Metric("data/retries", Reduction.SUM)
PEAK = Metric("perf/peak", Reduction.MAX)
SECONDS = Metric("seconds", Reduction.PER_RANK)


def reduce(rank, world_size):
    """The same numbers with the declarations in two orders, and a record without a step."""
    numbers = {LOSS: 6.0 + rank, COUNT: 4.0, FIRST: 1.0}
    local = {"stop": rank == 1, "data/retries": 2, "perf/peak": -5.0 - rank, "seconds": 0.5 + rank}
    with rank_world(rank, world_size) as world:
        reduced = []
        for statistics, metrics in (
            ([LOSS, COUNT], [RETRIES, STOP, PEAK, SECONDS]),
            ([FIRST, COUNT, LOSS], [SECONDS, STOP, RETRIES, PEAK]),
        ):
            reducer = MetricReducer(statistics, metrics, world)
            for _ in range(2):  # steps
                reducer.add(torch.tensor([numbers[metric] for metric in statistics]))
            reduced.append(reducer.reduce(local))
        reduced.append(reducer.reduce(local))
    return reduced


@pytest.mark.distributed
def test_a_further_metric_shifts_no_other_and_each_has_its_reduction():
    ranks = run_ranks(reduce, 2)
    assert ranks[0] == ranks[1], "every rank knows the same"
    plain, other, without_steps = ranks[0]
    recorded = {"train/loss": 2 * (6 + 7) / 16, "data/retries": 4.0, "perf/peak": -5.0}
    assert plain.recorded == recorded
    assert other.recorded == {**recorded, "train/first": 4.0}
    for reduced in (plain, other):
        assert (reduced.values[SAMPLES], reduced.values["stop"]) == (16.0, 1.0)
        assert reduced.per_rank == {"seconds": [0.5, 1.5]}
    assert without_steps.recorded == {"train/first": 0.0, "data/retries": 4.0, "perf/peak": -5.0}


ALONE = DistributedContext(0, 1, torch.device("cpu"), None, ("here",))


def test_what_cannot_be_reduced_is_refused_by_name():
    with pytest.raises(PipelineError, match="'data/retries' is declared 2 times"):
        MetricReducer([COUNT], [RETRIES, RETRIES], ALONE)
    with pytest.raises(PipelineError, match="statistic 'perf/peak' has reduction MAX"):
        MetricReducer([COUNT, PEAK], [], ALONE)
    reducer = MetricReducer([COUNT], [RETRIES], ALONE)
    for local in ({}, {"data/retries": 1, "data/tries": 1}):
        with pytest.raises(PipelineError, match="a value on every rank: data/"):
            reducer.reduce(local)
