"""Out of memory: half the micro-batch, the same samples and losses; down to one, then refused."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch

from data_shards.storage.store import Store
from pipeline.config import TrainConfig, changes, decides_result
from pipeline.errors import PipelineError
from pipeline.planner import activation_checkpointing
from pipeline.planner.activation_checkpointing import decided
from pipeline.resilience.oom import (
    TooLargeError,
    fit_here,
    fit_in_memory,
    fitting,
    is_out_of_memory,
    recorded,
    too_large,
)
from pipeline.resilience.signals import Flag
from pipeline.run.events import Metrics, Started
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training import worker
from pipeline.training.objective import Objective
from tests.harness import run_ranks
from tests.pipeline.small_runs import Undisturbed, rank_world, small_run, small_shards

BATCH = 24
CPU_TEXT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes."


def config(accumulation=1):
    return small_run(
        train=TrainConfig(global_batch=BATCH, epochs=1, warmup_epochs=0, accumulation=accumulation)
    )


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError(CPU_TEXT), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_allocators_say_it_in_several_ways(error, is_one):
    assert is_out_of_memory(error) == is_one


@pytest.mark.parametrize(
    ("accumulation", "sizes", "ranks", "expected"),
    [
        (1, [], 2, 1),
        (1, [12], 2, 1),  # the same once more, recomputed
        (1, [12], 1, 2),  # on fewer ranks: 24 = 2 x 12
        (1, [12, 12], 2, 2),  # 12 = 2 x 6
        (1, [12, 12, 6], 2, 4),
        (1, [12, 12, 6, 3], 2, 12),  # of 3 the half is 1
        (1, [12, 12, 6, 3, 1], 2, 12),
        (1, [12, 12], 1, 4),  # fewer ranks: 24 = 4 x 6
        (1, [12, 12], 4, 1),  # more ranks: 6 each
        (3, [8, 8], 1, 6),
    ],
)
def test_the_next_micro_batch_is_at_most_half(accumulation, sizes, ranks, expected):
    asked = config(accumulation).train
    wanted = "all" if sizes else "none"
    recomputed = dataclasses.replace(config(expected).train, activation_checkpointing=wanted)
    assert fitting(asked, sizes, ranks) == recomputed
    if sizes:
        some = dataclasses.replace(asked, activation_checkpointing=3)  # then more of them
        assert fitting(some, sizes, ranks) == recomputed
        # Where it was asked for, the first attempt was recomputed already.
        asked = dataclasses.replace(asked, activation_checkpointing="all")
        assert fitting(asked, sizes[1:] or sizes, ranks).activation_checkpointing == "all"
        assert len(sizes) == 1 or fitting(asked, sizes[1:], ranks) == recomputed


def test_what_lack_of_memory_changes_may_change_on_resume():
    recomputed = dataclasses.replace(config(2).train, activation_checkpointing="all")
    assert not any(map(decides_result, changes(config(), small_run(train=recomputed))))


def test_what_did_not_fit_is_recorded_until_nothing_smaller_is_left(tmp_path):
    run = Store(tmp_path)
    for sizes, size in (([], 3), ([3], 1)):
        expected = TooLargeError if size > 1 else PipelineError
        with (
            pytest.raises(expected, match=r"step 7, rank 1: out of memory with (3|3, 1) samples"),
            recorded(run, sizes, size, recomputes=True, where=lambda: "step 7, rank 1"),
        ):
            raise MemoryError
    assert too_large(run) == [3, 1]
    again = pytest.raises(
        TooLargeError, match="the next execution of this run recomputes all blocks"
    )
    with again, recorded(run, [], 1, recomputes=False, where=str):
        raise MemoryError
    failed = pytest.raises(RuntimeError, match="closed")
    with failed, recorded(run, [], 3, recomputes=True, where=str):
        raise RuntimeError("closed")


@contextlib.contextmanager
def memory_for(samples, *, but_step=None):
    """Every forward pass of more samples, or only those of one step, finds no memory."""
    genuine = Objective.forward

    def forward(self, images, labels, now):
        if len(images) > samples and but_step in (None, now.step):
            raise RuntimeError(CPU_TEXT)
        return genuine(self, images, labels, now)

    with mock.patch.object(Objective, "forward", forward):
        yield


LITTLE = 1 << 20


@contextlib.contextmanager
def memory_on_a_device(free):
    """What a rank's device has left; where it is little, one block has to be recomputed."""

    def needed(config, *, ranks, micro_batch, device, room):
        assert (ranks, micro_batch) == (2, BATCH // 2)
        return int(room < LITTLE)

    with (
        mock.patch.object(activation_checkpointing, "free_memory", return_value=free),
        mock.patch.object(activation_checkpointing, "recomputed_blocks", needed),
    ):
        yield


def runs(rank, world_size, folder, shards):
    """By case: events, error, micro-batches that did not fit. All ranks fail at the same time."""
    cases = {"plain": memory_for(BATCH), "later": memory_for(6, but_step=4)}
    cases |= {"never": memory_for(0)} if world_size == 1 else {"first": memory_for(5)}
    if world_size == 2:
        cases |= {"auto": memory_on_a_device(LITTLE if rank else 1 << 40)}
    answers = {}
    with rank_world(rank, world_size):
        for name, memory in cases.items():
            asked = config()
            if name == "auto":
                train = dataclasses.replace(asked.train, activation_checkpointing="auto")
                asked = dataclasses.replace(asked, train=train)
            job = WorkerSpec(asked, f"{folder}/{name}-{world_size}", shards, {})
            events, error = [], ""

            def train(job=job, events=events):
                worker.run_rank(job, events.append, Undisturbed(), recomputing=decided)

            with memory:
                try:
                    fit_here(train, ranks=1)  # as if each could begin again
                except PipelineError as refusal:
                    error = str(refusal)
            answers[name] = events, error, too_large(Store(job.run_url))
    return answers


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oom")
    shards = small_shards(folder / "shards")
    return {n: run_ranks(runs, n, str(folder), shards, timeout=200)[0] for n in (1, 2)}


@pytest.mark.distributed
def test_the_device_with_the_least_memory_decides_what_is_recomputed(outcomes):
    """On all ranks alike, and no loss differs by a bit."""
    answers = outcomes[2]
    events, error, found = answers["auto"]
    assert (error, found) == ("", [])
    (started,) = (e for e in events if isinstance(e, Started))
    assert started.recomputed_blocks == 1
    assert started.facts["batch"].endswith("1 of 2 blocks recomputed")
    assert losses(events) == losses(answers["plain"][0])


def test_the_memory_of_a_cpu_is_not_asked():
    auto = dataclasses.replace(config().train, activation_checkpointing="auto")
    world = mock.Mock(device=torch.device("cpu"), gather=lambda value: [value])
    asked = dataclasses.replace(config(), train=auto)
    assert decided(asked, world) == auto
    assert auto.recomputed(8) == 0


def test_a_switch_of_an_earlier_version_is_understood():
    found = [TrainConfig(activation_checkpointing=value) for value in (True, False, "3", 0)]
    assert [train.activation_checkpointing for train in found] == ["all", "none", 3, 0]
    assert [train.recomputed(8) for train in found] == [8, 0, 3, 0]
    assert found[2].recomputed(2) == 2
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        TrainConfig(activation_checkpointing=-1)


def losses(events):
    return {e.step: e.values["train/loss"] for e in events if isinstance(e, Metrics)}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_run_goes_on_with_the_same_samples_and_losses(outcomes, ranks):
    answers = outcomes[ranks]
    plain = losses(answers["plain"][0])
    assert answers["plain"][2] == []
    share = BATCH // ranks
    tried = {1: {"later": [24, 24, 12]}, 2: {"later": [12, 12], "first": [12, 12, 6]}}[ranks]
    for name, sizes in tried.items():
        events, error, found = answers[name]
        assert (error, found) == ("", sizes), name
        started = [e for e in events if isinstance(e, Started)]
        assert [e.micro_batch for e in started] == [*sizes, sizes[-1] // 2]
        assert (
            started[-1]
            .facts["batch"]
            .endswith(f"{share // (sizes[-1] // 2)} x {sizes[-1] // 2}, 2 of 2 blocks recomputed")
        )
        assert str(sizes[-1]) in started[-1].facts["out of memory"]
        assert losses(events) == pytest.approx(plain, rel=2e-4)
    # Nothing had been kept, so the later one began again with step 1.
    steps = [e.step for e in answers["later"][0] if isinstance(e, Metrics)]
    assert steps[:5] == [1, 2, 3, 4, 1]


@pytest.mark.distributed
def test_down_to_one_then_refused_with_the_sizes_tried(outcomes):
    events, error, found = outcomes[1]["never"]
    assert found == [24, 24, 12, 6, 3, 1]
    assert "out of memory with 24, 24, 12, 6, 3, 1 samples per backward pass" in error
    assert losses(events) == {}


def test_several_ranks_without_ray_say_how_to_go_on():
    def fit():
        raise TooLargeError("step 1, rank 0: out of memory with 12 samples")

    with pytest.raises(PipelineError, match=r"12 samples: start it again with --start-or-resume"):
        fit_here(fit, ranks=2)


@pytest.mark.parametrize(
    ("allowed", "groups", "left"),
    [
        (0, ["m", "ok"], [0, 0]),
        (0, ["m", "m", "x"], [0, 0, 0]),
        (2, ["mxx", "ok"], [2, 0]),  # both failures are used up
        (2, ["mmx", "ok"], [2, 1]),
        (1, ["xx"], [1]),
        (-1, ["m", "ok"], [-1, -1]),
    ],
)
def test_lack_of_memory_is_not_a_failure(tmp_path, allowed, groups, left):
    """Ray gives up after `max_failures` + 1 failures: m for memory, x for any other."""
    job = WorkerSpec(
        dataclasses.replace(
            config(),
            cluster=dataclasses.replace(config().cluster, launcher="ray", max_failures=allowed),
        ),
        str(tmp_path),
        "",
        {},
    )
    seen = []

    def fit(job):
        failures = groups[len(seen)]
        seen.append(job.config.cluster.max_failures)
        if failures == "ok":
            return
        for _ in range(failures.count("m")):
            sizes = too_large(Store(tmp_path))
            found = recorded(Store(tmp_path), sizes, 9, recomputes=True, where=str)
            with contextlib.suppress(TooLargeError), found:
                raise MemoryError
        raise RuntimeError("the group failed")

    if groups[-1] == "ok":
        fit_in_memory(fit, job, Flag())
    else:
        with pytest.raises(RuntimeError, match="the group failed"):
            fit_in_memory(fit, job, Flag())
    assert seen == left
