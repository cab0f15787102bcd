"""Ranks that stand still: who is named, what is written down, how the process ends."""

import os
import signal
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from data_shards.storage.store import Store
from pipeline.config import ClusterConfig
from pipeline.resilience import hang_detector
from pipeline.resilience.hang_detector import HUNG, HangDetector
from pipeline.resilience.heartbeat import Beat, Phase, behind
from pipeline.run.distributed import DistributedContext
from pipeline.run.events import Hung, Straggling
from tests.harness import run_ranks
from tests.pipeline.small_runs import rank_world, small_run
from tests.pipeline.test_monitor import show

LIMIT_S = 1
SOON_S = 20


def beat(step=4, phase=Phase.STEP, waits=True):
    return Beat(step, phase, overdue=True, waits=waits, place="a.py:1 in f", tick=1)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([beat(), None, beat()], [1]),
        ([beat(), beat(phase=Phase.DATA, waits=False), beat()], [1]),
        ([beat(step=5), beat(), beat(step=5, phase=Phase.DATA)], [1]),
        ([beat(), beat(waits=False), beat()], [1]),
        ([beat(), beat()], []),
        ([beat(waits=False), beat(waits=False)], []),
    ],
    ids=["silent", "phase", "step", "computes", "all wait", "all compute"],
)
def test_the_rank_that_the_others_wait_for_is_named(beats, expected):
    assert behind(beats) == expected


class Ended:
    """Stands in for the end of the process."""

    def __init__(self, after=None):
        self.codes, self.events, self._after = [], [], after

    def __call__(self, code):
        self.codes.append(code)
        if self._after is not None:
            self._after()

    def wait(self):
        deadline = time.monotonic() + SOON_S
        while not self.codes and time.monotonic() < deadline:
            time.sleep(0.05)


def standing_still(rank, world_size, folder):
    """Three ranks, of which one is stopped, then waits for data, then is slow with reason."""
    hang_detector._REPORT_S = 0.5
    cluster = ClusterConfig(launcher="local", hang_timeout_s=LIMIT_S)
    seen = {}
    with rank_world(rank, world_size) as world:
        pids = world.gather(os.getpid())

        def case(name, step, act, ended):
            watching = HangDetector(
                world, cluster, step=0, run=Store(f"{folder}/{name}"),
                emit=ended.events.append, end=ended,
            )  # fmt: skip
            watching.beat(step, Phase.DATA)
            if rank == 1:
                act(watching)
            watching.beat(step, Phase.STEP)
            dist.all_reduce(torch.ones(1))
            if name != "reason" and not (name == "stopped" and rank == 1):  # it may see all is well
                ended.wait()
            watching.close()
            world.barrier()
            seen[name] = (ended.codes, ended.events)

        def wake():
            if rank == 0:
                os.kill(pids[1], signal.SIGCONT)

        case("stopped", 6, lambda _: os.kill(os.getpid(), signal.SIGSTOP), Ended(wake))
        late = Ended()
        case("late", 7, lambda _: late.wait(), late)

        def write(watching):
            watching.beat(7, Phase.CHECKPOINT)
            time.sleep(3 * LIMIT_S)

        hang_detector._REPORT_S = 10.0  # all can answer, if the machine lets them
        case("reason", 8, write, Ended())
    return seen


@pytest.mark.distributed
def test_a_stopped_rank_and_one_without_data_are_named_by_their_peers(tmp_path):
    ranks = run_ranks(standing_still, 3, str(tmp_path), timeout=120)
    for name, who in (("stopped", "does not answer"), ("late", "keeps the others waiting")):
        codes = [rank[name][0] for rank in ranks]
        # The stopped one, once it goes on, ends as well or sees that all is well again.
        assert codes[0] == codes[2] == [HUNG], name
        (event,) = ranks[0][name][1]
        assert ranks[2][name][1] == [], "one rank speaks for all"
        assert event.ranks == [1]
        assert event.step == {"stopped": 7, "late": 8}[name]
        assert f"rank 1 ({os.uname().nodename}, process" in event.report
        assert who in event.report
        report = (tmp_path / name / f"hangs/step-{event.step:08d}-rank-00000.txt").read_text()
        assert event.report in report
        assert "in standing_still" in report  # the stacks of this rank
    assert "test_hang_detector.py" in ranks[0]["late"][1][0].report  # where rank 1 is
    assert [rank["reason"] for rank in ranks] == [([], [])] * 3, "a slow store is no hang"


def test_a_lonely_rank_ends_itself_but_not_in_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(hang_detector, "_REPORT_S", 0.1)
    monkeypatch.setattr(hang_detector, "_FIRST_STEP", 3)
    world = DistributedContext(0, 1, torch.device("cpu"), None, ("here",))
    cluster = ClusterConfig(launcher="local", hang_timeout_s=1)
    begin = time.monotonic()
    for step, least_s in ((0, 3), (5, 1)):
        ended = Ended()
        watching = HangDetector(
            world, cluster, step=0, run=Store(str(tmp_path)), emit=ended.events.append, end=ended
        )
        begin = time.monotonic()
        watching.beat(step, Phase.STEP)
        ended.wait()
        assert time.monotonic() - begin > least_s
        watching.close()
        assert ended.codes == [HUNG]
        assert (tmp_path / f"hangs/step-{step + 1:08d}-rank-00000.txt").exists()


def test_a_rank_that_can_say_nothing_ends_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(hang_detector, "_REPORT_S", 0.1)
    monkeypatch.setattr(
        hang_detector.tempfile, "TemporaryFile", mock.Mock(side_effect=OSError("no room"))
    )
    world = DistributedContext(0, 1, torch.device("cpu"), None, ("here",))
    cluster = ClusterConfig(launcher="local", hang_timeout_s=1)
    ended = Ended()
    full = mock.Mock(write=mock.Mock(side_effect=OSError("no room")))
    with mock.patch.object(sys, "stderr", full):
        watching = HangDetector(
            world, cluster, step=0, run=Store("/dev/null"), emit=print, end=ended
        )
        watching.beat(5, Phase.STEP)
        ended.wait()
        watching.close()
    assert ended.codes == [HUNG]


def test_a_watch_that_a_collective_would_overtake_is_refused():
    with pytest.raises(ValueError, match="hang_timeout_s=700 exceeds"):
        small_run(cluster=ClusterConfig(hang_timeout_s=700))


def test_the_person_and_the_tracker_are_told(tmp_path):
    hung = Hung(7, [1], "rank 1 (b) does not answer", "file:///runs/a/hangs/x.txt")
    text, tracker = show(
        Straggling(5, 3, "node c", 2.25), hung, hung, terminal=False, folder=tmp_path
    )
    assert "slow rank 3 (node c): its forward pass takes 2.2 times the median, at step 5" in text
    assert "hung in step 7: rank 1 (b) does not answer; stacks: /runs/a/hangs/x.txt" in text
    assert tracker.tags["straggler"] == "rank 3, node c"
    assert [values for _, values, _ in tracker.metrics] == [{"faults/hangs": n} for n in (1, 2)]
