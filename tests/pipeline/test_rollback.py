"""Samples that break a run: back to the newest checkpoint, on with the samples after them."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest

from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from data_shards.untrusted.terminal import PlainConsole
from pipeline.checkpoint.commit_schema import commit_bytes
from pipeline.config import CheckpointConfig, TrainConfig
from pipeline.driver.console import RunConsole
from pipeline.driver.event_log import EventLog
from pipeline.driver.monitor import RunMonitor
from pipeline.resilience.rollback import Gap, past
from pipeline.run.events import Metrics, RolledBack, Skipped, Started
from pipeline.run.worker_spec import WorkerSpec
from tests.harness import run_ranks
from tests.pipeline.small_runs import (
    observed_run,
    rank_world,
    same_bits,
    small_run,
    small_shards,
    whole_state,
)
from tests.pipeline.test_monitor import Recorder, usage_of

STEPS, BATCH, EPOCH = 12, 24, 135
KEPT, BAD = 6, (8, 9)  # the checkpoint before, and the steps whose samples are bad


def cursor(epoch, position):
    return Cursor(seed=0, epoch=epoch, position=position)


GAPS = [
    Gap(4, 6, cursor(0, 96), cursor(1, 8)),
    Gap(4, 9, cursor(1, 8), cursor(1, 80)),
]


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ((0, 95), (0, 95)),
        ((0, 96), (1, 80)),  # the second gap begins where the first ends
        ((1, 7), (1, 80)),
        ((1, 79), (1, 80)),
        ((1, 80), (1, 80)),
    ],
)
def test_a_cursor_in_a_gap_moves_to_its_end(here, there):
    assert past(cursor(*here), GAPS) == cursor(*there)
    assert [gap.samples(EPOCH) for gap in GAPS] == [47, 72]


def config(**train):
    return small_run(
        train=TrainConfig(
            global_batch=BATCH,
            epochs=(STEPS - 0.5) * BATCH / EPOCH,
            warmup_epochs=0,
            max_skipped=1,
            rollbacks=1,
            **train,
        ),
        checkpoint=CheckpointConfig(every_steps=3),
    )


def nan_pixels(rank, steps):
    """Images of these global batches have NaN pixels on rank 1, as if their shard had them."""
    genuine = SampleStream.__next__

    def following(stream):
        batch = genuine(stream)
        if rank != 1 or int(batch.positions[0]) // BATCH + 1 not in steps:
            return batch
        return dataclasses.replace(batch, images=batch.images * math.nan)

    return mock.patch.object(SampleStream, "__next__", following)


def runs(rank, world_size, folder, shards):
    outcomes = {}
    with rank_world(rank, world_size) as world:

        def run(name, url, settings, bad):
            with nan_pixels(rank, bad):
                outcomes[name] = observed_run(WorkerSpec(settings, f"{folder}/{url}", shards, {}))

        run("back", "back", config(), BAD)
        run("stopped", "stopped", config(stop_after=KEPT), BAD)
        if rank == 0:
            for name in ("moved", "remembered"):
                shutil.copytree(f"{folder}/stopped", f"{folder}/{name}")
            step = Path(folder, "moved/checkpoints", f"step-{KEPT:08d}")
            commit = step / "writer-0000/commit.json"
            body = json.loads(commit.read_text())
            del body["digest"]
            epoch, position = divmod(BAD[-1] * BATCH, EPOCH)
            body["cursor"].update(epoch=epoch, position=position)
            commit.write_bytes(commit_bytes(body))
            shutil.copy(f"{folder}/back/rollbacks.json", f"{folder}/remembered")
        world.barrier()
        run("moved", "moved", config(), ())
        run("remembered", "remembered", config(), ())
        run("too often", "often", config(), range(BAD[0], 40))
        run("too early", "early", config(), (1, 2))
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollback")
    shards = small_shards(folder / "shards")
    ranks = run_ranks(runs, 2, str(folder), shards, timeout=250)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def end(outcomes, name):
    return whole_state([rank.end for rank in outcomes[name]])


@pytest.mark.distributed
def test_the_run_goes_on_as_if_the_samples_did_not_exist(outcomes):
    first = outcomes["back"][0]
    assert [rank.error for rank in outcomes["back"]] == ["", ""]
    assert [e.step for e in first.events if isinstance(e, Skipped)] == list(BAD)
    (told,) = [e for e in first.events if isinstance(e, RolledBack)]
    assert (told.step, told.given_up, told.rollbacks) == (KEPT, BAD[-1], 1)
    assert told.samples == told.samples_left_out == (BAD[-1] - KEPT) * BATCH
    assert told.first == divmod(KEPT * BATCH, EPOCH)
    assert told.next == divmod(BAD[-1] * BATCH, EPOCH)
    # The same as a run whose checkpoint had been made after the bad samples.
    assert same_bits(end(outcomes, "back"), end(outcomes, "moved"))
    again = outcomes["moved"][0].losses
    assert list(again) == list(range(KEPT + 1, STEPS + 1))
    assert {step: first.losses[step] for step in again} == again


@pytest.mark.distributed
def test_a_later_execution_leaves_out_the_same_samples(outcomes):
    assert same_bits(end(outcomes, "back"), end(outcomes, "remembered"))
    assert outcomes["remembered"][0].losses == outcomes["moved"][0].losses


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too often", ["step 8:", "the 2. time in a row", "train.rollbacks=1 none is left"]),
        ("too early", ["step 2: there is no checkpoint to go back to"]),
    ],
)
def test_all_ranks_stop_when_no_way_back_is_left(outcomes, name, words):
    for rank in outcomes[name]:
        assert all(word in rank.error for word in words), rank.error
    backs = [e for e in outcomes[name][0].events if isinstance(e, RolledBack)]
    assert len(backs) == (name == "too often")


def test_the_person_the_tracker_and_the_event_log_are_told(tmp_path):
    console = PlainConsole(record=True, width=200, file=(tmp_path / "console").open("w"))
    recorder = Recorder()
    monitor = RunMonitor(
        RunConsole(console),
        recorder,
        None,
        lambda: None,
        usage_of(recorder),
        EventLog(tmp_path, Store(tmp_path)),
        Store(tmp_path),
    )
    values = dict.fromkeys(
        ("train/loss", "train/clean", "train/certified", "train/images_per_s"), 1.0
    )
    values |= {"train/lr": 1.0, "train/eps": 1.0, "train/skipped": 2.0}
    audit = {"orthogonality/residual_max": 0.09, "orthogonality/reprojections": 1.0}
    for event in (
        Started({}, 0, 12),
        Skipped(8),
        RolledBack(6, 9, 72, (1, 8), (1, 80), rollbacks=1, samples_left_out=72),
        Metrics(10, {**values, **audit}, 1),
        Metrics(12, {**values, **audit}, 2),
    ):
        monitor.handle(event)
    console.file.close()
    text = console.export_text()
    assert "skipped step 8" in text
    assert "rolled back from step 9 to 6: 72 samples are left out" in text
    assert text.count("re-projected step 10: 1 matrices were off") == text.count("re-proj") == 1
    metrics = {name: value for _, values, _ in recorder.metrics for name, value in values.items()}
    assert metrics["train/rollbacks"] == 1
    assert metrics["train/samples_left_out"] == 72
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["Started", "Skipped", "RolledBack", "Reprojected"]
    assert (lines[2]["step"], lines[2]["given_up"], lines[2]["samples"]) == (6, 9, 72)
    assert lines[3]["residual"] == 0.09
