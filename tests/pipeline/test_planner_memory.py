"""Memory of the manifold step against the storages of real steps."""

from typing import Any

import pytest
import torch

from optim.collectives import LocalExchange, ProcessGroupExchange
from optim.zero_layout import plan_rounds
from pipeline.planner import memory
from pipeline.planner.meta_pass import LiveBytes
from tests.harness import run_ranks
from tests.optim.emulation import Emulation, Problem

N = 128
STEPS = 3


def problem(matrices, increment, retraction):
    """One matrix per owner and round; Lookahead, retractions and audits come together and alone."""
    return Problem(
        (N,) * matrices,
        dtype=torch.float32,
        lookahead_steps=2,
        polar_every=3,
        audit_every=2,
        lr=0.015,
        round_elements=1,
        increment=increment,
        retraction=retraction,
    )


def observed(rank, world_size, matrices, increment, retraction="exp"):
    """Most bytes that a step of the matrices holds beyond its state and its gradient."""
    exchange = ProcessGroupExchange() if world_size > 1 else LocalExchange()
    emulation = Emulation(problem(matrices, increment, retraction), exchange)
    optimizer: Any = emulation.optimizer
    peaks = []
    step = optimizer.step

    def observed_step():
        with LiveBytes() as held:
            step()
        peaks.append(held.peak)

    emulation.step(0)  # makes the state
    optimizer.step = observed_step
    for number in range(1, STEPS + 1):
        emulation.step(number)
    return max(peaks)


def planned(world_size, matrices, increment, monkeypatch):
    monkeypatch.setattr(memory, "plan_rounds", one_each)
    weights = memory.Weights((N * N,) * matrices, (7, 15), N * N)
    setting = memory.Setting(
        ranks=world_size,
        working=4,
        lookahead=True,
        rounds_factors=increment != "full",
        nadam=True,
        sub_group=10**9,
        bucket=1,
        prefetch=1,
        live=1,
        interleaved=world_size > 1,
        persist_below=0,
    )
    rows = memory.optimizer_step(weights, setting)
    return sum(row.size for row in rows if not row.name.startswith("gradient"))


def one_each(slots, world_size):
    return plan_rounds(slots, world_size, elements=1)


@pytest.mark.parametrize("increment", ["full", "tf32"])
def test_one_rank_has_one_round_at_a_time(increment, monkeypatch):
    measured = observed(0, 1, 4, increment)
    assert planned(1, 4, increment, monkeypatch) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("increment", ["full", "tf32"])
def test_the_fast_retraction_needs_no_more(increment, monkeypatch):
    measured = observed(0, 1, 4, increment, "fast")
    assert measured <= planned(1, 4, increment, monkeypatch) < 1.5 * measured


CASES = [(2, "full"), (4, "full"), (8, "full"), (8, "tf32")]  # 1, 2 and 4 rounds


def observe_cases(rank, world_size):
    # A thread of gloo that is late holds what it has sent a moment longer than the step does.
    return [min(observed(rank, world_size, *case) for _ in range(4)) for case in CASES]


@pytest.mark.distributed
def test_rounds_that_overlap_are_held_at_once(monkeypatch):
    for (matrices, increment), *measured in zip(CASES, *run_ranks(observe_cases, 2), strict=True):
        expected = pytest.approx(max(measured), rel=0.1)
        assert planned(2, matrices, increment, monkeypatch) == expected, (matrices, increment)
