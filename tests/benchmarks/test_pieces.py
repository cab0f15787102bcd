"""The pieces that the planner is calibrated with, and the memory while a network is built."""

import sys
import threading
from dataclasses import replace

import pytest

from benchmarks.build import computed, resident, run_of
from benchmarks.calibrate import measure
from benchmarks.scaling import Setup, in_ranks, predicted, volume_rows
from benchmarks.small_steps import Turns
from benchmarks.start import first_step
from model.networks.linf.groupsort import GroupSortConfig
from optim.config import OptimConfig
from pipeline.config import ZeroConfig
from pipeline.errors import PipelineError
from pipeline.planner.calibration import Measured
from pipeline.planner.meta_pass import LiveBytes
from pipeline.training.worker import build_engine
from tests.harness import run_ranks
from tests.pipeline.small_runs import rank_world, small_run


def measured_on(rank, world_size):
    with rank_world(rank, world_size) as world:
        other = GroupSortConfig(input_shape=(1, 8, 8), num_classes=10, width=16, depth=2)
        with pytest.raises(PipelineError, match="of kind 'groupsort' has no pieces"):
            measure(world, small_run(model=other, optim=OptimConfig()), 2)
        return measure(world, Setup(world_size, 1, 32, 1, 2, 1).config(), 1)


@pytest.mark.distributed
def test_pieces_are_those_of_all_ranks_and_make_a_step():
    first, second = run_ranks(measured_on, 2)
    assert first.ranks == 2
    assert first.tokens == 256
    assert not first.overlap
    assert first.exchange_gbps == second.exchange_gbps > 0  # of the slowest rank
    assert first.latency_s == second.latency_s > 0
    time = predicted(Setup(2, 1, 32, 1, 2, 1), first)
    assert time.data == 0
    assert time.total == pytest.approx(
        time.passes + time.zero3 + time.manifold_products + time.manifold_traffic
    )


def test_a_file_of_pieces_is_read_as_it_was_written(tmp_path):
    found = Measured(
        hardware="", date="", device="cpu", precision="fp32", increment="full", ranks=1, nodes=1,
        width=8, tokens=4,
        memory_gb=1.0, working_flops=1e9, single_flops=2e9, pass_efficiency=0.5,
        step_efficiency=0.5, exchange_gbps=0.0, gather_gbps=0.0, scatter_gbps=0.0, latency_s=0.0,
        decode_rate=100.0, overlap=False,
    )  # fmt: skip
    path = tmp_path / "measured.json"
    path.write_text(found.to_json())
    assert Measured.read(path) == found


@pytest.mark.slow
@pytest.mark.distributed
def test_volumes_are_exact():
    (row,) = volume_rows(16, 1, (3,))
    # 256 elements are not divisible by 3: the last rank sends a padded slice as well.
    assert row["measured"] == pytest.approx(row["20 N / W (1 - 1/W)"], rel=0.01)


def small_buckets(ranks, width, depth):
    return replace(run_of(ranks, width, depth), zero=ZeroConfig(reduce_bucket_size=width**2))


def bytes_of(rank, world_size):
    config = small_buckets(world_size, 256, 2)
    with rank_world(rank, world_size) as world, LiveBytes() as held:
        engine = build_engine(config, world=world, micro_batch=1)
        engine.initialise(0)
        return held.live, computed(config, world_size)


@pytest.mark.slow
@pytest.mark.distributed
def test_what_is_built_is_the_partition():
    for live, known in run_ranks(bytes_of, 2):
        assert known["partition"] == pytest.approx(live, rel=0.02)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_never_holds_the_whole_network(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    config = small_buckets(2, 512, 8)
    known = computed(config, 2)
    for found in in_ranks(2, resident, config):
        assert found["held"] == pytest.approx(known["partition"], abs=0.4 * known["partition"])
        assert known["block"] / 2 < found["building"] < known["block"] + 3e6 < known["whole"] / 3


def broken():
    raise SystemExit(3)


@pytest.mark.slow
@pytest.mark.integration
def test_a_rank_that_dies_is_noticed():
    with pytest.raises(RuntimeError, match="a rank of broken has died"):
        in_ranks(1, broken)


def test_contestants_take_turns():
    taken = []
    turns = Turns(threading.Barrier(2), contestants=2, rounds=3, steps=4)

    def contestant(own):
        assert all(seconds >= 0 for seconds in turns.take(own, lambda: taken.append(own)))

    other = threading.Thread(target=contestant, args=(1,))
    other.start()
    contestant(0)
    other.join()
    assert sorted(taken[:2]) == [0, 1]
    assert taken[2:] == 3 * (4 * [0] + 4 * [1])


def test_a_start_without_a_step_says_what_the_command_said(tmp_path):
    words = [sys.executable, "-c", "raise SystemExit('refused: no shards')"]
    with pytest.raises(RuntimeError, match="refused: no shards"):
        first_step(words, tmp_path)
    record = "import pathlib; pathlib.Path('spool.jsonl').write_text('{\"train/loss\": 1}')"
    code = f"import os, time; os.chdir({str(tmp_path)!r}); {record}; time.sleep(1)"
    began, stepped, processor = first_step([sys.executable, "-c", code], tmp_path)
    assert 0 < began <= stepped
    assert list(processor) == ["this command"]
