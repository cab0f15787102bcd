"""A stop or a preemption while training: a checkpoint out of turn, and no bit lost."""

import os
import signal

import pytest

from pipeline.resilience.signals import StopSignal
from pipeline.run.events import Started
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training import hooks
from tests.harness import run_ranks
from tests.pipeline.small_runs import (
    Undisturbed,
    observed_run,
    rank_world,
    same_bits,
    small_run,
    small_shards,
    whole_state,
)

STOP = 3


class Asked(Undisturbed):
    """One rank hears of it, when it looks for the `at`-th time."""

    def __init__(self, at=0, preemption_at=0):
        self.at, self.preemption_at = at, preemption_at
        self.looked = self.asked = 0

    def stop_requested(self):
        self.looked += 1
        return self.looked == self.at

    def preempted(self):
        self.asked += 1
        return 0 < self.preemption_at <= self.asked


def runs(rank, world_size, folder, shards):
    config = small_run()
    outcomes = {}
    hooks._ASK_PREEMPTION_S = 0.0
    with rank_world(rank, world_size):

        def run(name, url, interruption=None):
            outcomes[name] = observed_run(
                WorkerSpec(config, f"{folder}/{url}", shards, {}), interruption
            )

        run("whole", "whole")
        run("stopped", "stopped", Asked(STOP) if rank == 1 else Asked())
        run("resumed", "stopped")
        run("preempted", "preempted", Asked(preemption_at=2))
    return outcomes


@pytest.mark.distributed
def test_stop_and_preemption_keep_a_checkpoint_out_of_turn(tmp_path):
    shards = small_shards(tmp_path / "shards")
    ranks = run_ranks(runs, 2, str(tmp_path), shards, timeout=200)
    whole, stopped, resumed, preempted = (
        [rank[name] for rank in ranks] for name in ("whole", "stopped", "resumed", "preempted")
    )
    total = list(whole[0].kept)[-1]
    assert not any(rank.error for outcome in (whole, stopped, resumed) for rank in outcome)
    assert list(stopped[0].losses) == list(range(1, STOP + 1))
    assert list(stopped[0].kept) == [STOP]
    assert isinstance(resumed[0].events[0], Started)
    assert resumed[0].events[0].step == STOP
    assert {**stopped[0].losses, **resumed[0].losses} == whole[0].losses
    assert resumed[0].kept[total].digest == whole[0].kept[total].digest
    ends = [whole_state([rank.end for rank in outcome]) for outcome in (whole, resumed)]
    assert same_bits(*ends)
    # Told of a node's end at step 2, the ranks keep that step, once, and go on.
    assert list(preempted[0].kept) == [2, total]
    assert preempted[0].losses == whole[0].losses


@pytest.fixture
def stop():
    stop = StopSignal()
    stop.install()
    return stop


def test_a_signal_outside_of_training_stops_at_once(stop):
    with pytest.raises(SystemExit) as exit_:
        os.kill(os.getpid(), signal.SIGTERM)
    assert exit_.value.code == 143
    assert not stop.stop_requested()


def test_a_signal_while_training_is_noted_and_ends_the_process_afterwards(stop):
    noted = []

    def train():
        with stop.deferred():
            assert not stop.stop_requested()
            os.kill(os.getpid(), signal.SIGTERM)
            noted.append(stop.stop_requested())

    with pytest.raises(SystemExit) as exit_:
        train()
    assert noted == [True]
    assert exit_.value.code == 143


def test_a_second_signal_does_not_wait(stop):
    reached = []

    def train():
        with stop.deferred():
            for signal_number in (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append(signal_number)

    with pytest.raises(SystemExit):
        train()
    assert reached == [1]
