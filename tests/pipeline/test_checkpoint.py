"""Checkpoints through the real worker: stop and go on, other numbers of ranks, damage."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import pytest

from data_shards.storage.store import Store
from optim.config import OptimConfig
from pipeline.checkpoint.reader import committed, load_checkpoint
from pipeline.config import CheckpointConfig, TrainConfig, ZeroConfig
from pipeline.errors import PipelineError
from pipeline.run.events import Started
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training.worker import build_engine
from tests.harness import run_ranks
from tests.pipeline.small_runs import (
    local_state,
    observed_run,
    rank_world,
    same_bits,
    small_model,
    small_run,
    small_shards,
    whole_state,
)

pytestmark = pytest.mark.distributed

STEPS = 14
# Between the Lookahead synchronisations at 6 and 12 and the polar projections at 5 and 10.
STOP = 8
EARLIER = 4
BATCH = 24
FILES = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]


def config(stop_after=0, precision="fp32", **parts):
    """14 steps on 136 samples; 21 x 21 elements leave padding on two ranks, and none on three."""
    return small_run(
        model=small_model(width=21),
        optim=OptimConfig(lr=1e-2, eps=1e-5, lookahead_steps=6, polar_every=5),
        train=TrainConfig(
            global_batch=BATCH,
            epochs=(STEPS - 0.5) * BATCH / 136,
            warmup_epochs=0,
            precision=precision,
            stop_after=stop_after,
        ),
        **{"checkpoint": CheckpointConfig(every_steps=EARLIER), **parts},
    )


# -- two ranks: run, stop, go on -------------------------------------------------------------------


def stop_and_go_on(rank, world_size, folder, shards):
    """Whole runs, stopped ones, and what becomes of them."""
    outcomes = {}
    with rank_world(rank, world_size) as world:

        def run(name, url, settings):
            outcomes[name] = observed_run(WorkerSpec(settings, f"{folder}/{url}", shards, {}))

        def copy(url):
            if rank == 0:
                shutil.copytree(f"{folder}/stopped-fp32", f"{folder}/{url}")
                if url == "uncommitted":
                    step = Path(folder, url, f"checkpoints/step-{STOP:08d}")
                    (step / "writer-0000/commit.json").unlink()
            world.barrier()

        for precision in ("fp32", "bf16"):
            url = f"stopped-{precision}"
            run(f"whole {precision}", f"whole-{precision}", config(precision=precision))
            run(f"stopped {precision}", url, config(STOP, precision))
            if precision == "fp32":
                for copied in ("pristine", "regrouped", "uncommitted"):
                    copy(copied)
            run(f"resumed {precision}", url, config(precision=precision))
        run("regrouped", "regrouped", config(zero=ZeroConfig(sub_group_size=300)))
        run("uncommitted", "uncommitted", config())
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def shards(folder):
    return small_shards(folder / "shards")


@pytest.fixture(scope="module")
def outcomes(folder, shards):
    """By case, the outcomes of the two ranks."""
    ranks = run_ranks(stop_and_go_on, 2, str(folder), shards, timeout=200)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def ends_equal(outcomes, name, other):
    return same_bits(*(whole_state([rank.end for rank in outcomes[n]]) for n in (name, other)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopping_and_going_on_changes_no_bit(outcomes, precision):
    whole, stopped, resumed = (
        outcomes[f"{what} {precision}"][0] for what in ("whole", "stopped", "resumed")
    )
    assert list(whole.losses) == list(range(1, STEPS + 1))
    assert list(stopped.losses) == list(range(1, STOP + 1))
    assert list(resumed.losses) == list(range(STOP + 1, STEPS + 1))
    assert {**stopped.losses, **resumed.losses} == whole.losses
    assert list(stopped.kept) == [EARLIER, STOP]
    assert list(resumed.kept) == [12, STEPS]
    for step, kept in {**stopped.kept, **resumed.kept}.items():
        assert kept.digest == whole.kept[step].digest, step
    assert ends_equal(outcomes, f"whole {precision}", f"resumed {precision}")
    started = resumed.events[0]
    assert isinstance(started, Started)
    assert started.step == STOP
    assert started.facts["resumed"] == f"after step {STOP}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_holds_the_whole_state(outcomes, precision):
    """Between two synchronisations every tensor says something, and every one comes back."""
    saved, loaded = (
        whole_state([getattr(rank, when) for rank in outcomes[f"{what} {precision}"]])
        for what, when in (("stopped", "end"), ("resumed", "start"))
    )
    assert saved["scalar/step"] == STOP
    assert saved["scalar/reprojections"] == 0
    assert all((values != 0).any() for k, values in saved.items() if k != "scalar/reprojections")
    for name in ("stem.weight", "blocks.1.M"):
        assert (saved[f"slow/{name}"] != saved[f"master/{name}"]).any()
    assert same_bits(saved, loaded)


def test_other_sub_groups_change_no_bit(outcomes):
    """The cut of the partitions is not in the checkpoint."""
    whole, regrouped = outcomes["whole fp32"][0], outcomes["regrouped"][0]
    assert regrouped.losses == {s: v for s, v in whole.losses.items() if s > STOP}
    assert regrouped.kept[STEPS].digest == whole.kept[STEPS].digest
    assert ends_equal(outcomes, "whole fp32", "regrouped")


def test_without_commit_a_checkpoint_does_not_exist(outcomes):
    """The one before is used, and the folder of the torn one is written anew."""
    whole, again = outcomes["whole fp32"][0], outcomes["uncommitted"][0]
    assert again.events[0].step == EARLIER
    assert again.losses == {s: v for s, v in whole.losses.items() if s > EARLIER}
    assert list(again.kept) == [STOP, 12, STEPS]
    assert again.kept[STOP].digest == whole.kept[STOP].digest
    assert Store(again.kept[STOP].checkpoint_url).exists("commit.json")


def test_newest_is_the_highest_committed_step(tmp_path):
    store = Store(tmp_path)
    assert committed(store) == {}
    assert committed(store.child("nothing")) == {}
    for step in (900, 1000, 11000, 100_000_000):  # as a text the last one is the lowest
        store.write(f"checkpoints/step-{step:08d}/writer-0001/rank-00000-of-00001.safetensors", b"")
        if step != 11000:
            store.write(f"checkpoints/step-{step:08d}/writer-0001/commit.json", b"{}")
    assert list(committed(store)) == [100_000_000, 1000, 900]


# -- other numbers of ranks, and damage ------------------------------------------------------------


def go_on_elsewhere(rank, world_size, url, shards, damaged):
    """Go on from the checkpoint of two ranks; with `damaged`, see first what is refused."""
    with rank_world(rank, world_size) as world:
        refused = refusals(world, damaged) if damaged else {}
        broken = damaged.get("cut short")
        if broken:
            run = Path(broken.rpartition("/c")[0])
            refused["worker"] = observed_run(WorkerSpec(config(), str(run), shards, {}))
            if rank == 0:
                for name in Path(run, "checkpoints").glob("*/*/rank-00000-*"):
                    name.write_bytes(b"")
            world.barrier()
            refused["none sound"] = observed_run(WorkerSpec(config(), str(run), shards, {}))
        return observed_run(WorkerSpec(config(), url, shards, {})), refused


def refusals(world, damaged):
    """By damage: the message, and whether the state stayed as it was."""
    answers = {}
    for model in (small_model(width=21, depth=3), small_model(width=21)):
        settings = dataclasses.replace(config(), model=model)
        engine = build_engine(settings, world=world, micro_batch=BATCH // world.size)
        engine.initialise(seed=5)
        state = local_state(engine)
        for name, folder in damaged.items():
            if (name == "another network") != (model.depth == 3):
                continue
            answers[name] = "", False
            try:
                load_checkpoint(Store(folder), world=world, engine=engine)
            except PipelineError as error:
                answers[name] = str(error), same_bits(state, local_state(engine))
    return answers


@contextlib.contextmanager
def rewritten(path):
    data = bytearray(path.read_bytes())
    yield data
    path.write_bytes(data)


def damaged_runs(folder):
    """Runs with a bad checkpoint of the last step: URL of the checkpoint by damage."""
    urls = {}
    for name in ("missing", "cut short", "flipped", "commit cut short", "another network", "sound"):
        run = folder / f"damaged-{name.replace(' ', '-')}"
        shutil.copytree(folder / "pristine", run)
        step = run / f"checkpoints/step-{STOP:08d}/writer-0000"
        urls[name] = str(step)
        if name == "missing":
            (step / FILES[1]).unlink()
        elif name == "cut short":
            with rewritten(step / FILES[0]) as data:
                del data[-4:]
        elif name == "flipped":
            with rewritten(step / FILES[1]) as data:
                data[len(data) // 2] ^= 1
        elif name == "commit cut short":
            with rewritten(step / "commit.json") as data:
                del data[len(data) // 2 :]
    return urls


@pytest.fixture(scope="module")
def elsewhere(folder, shards, outcomes):
    """By number of ranks: the outcomes, and the refusals by rank."""
    results = {}
    for world_size in (1, 3):
        url = folder / f"on-{world_size}"
        shutil.copytree(folder / "pristine", url)
        # Left behind by a writing that was never committed: no commit lists it.
        stray = url / f"checkpoints/step-{STOP:08d}/writer-0000/rank-00002-of-00003.safetensors"
        stray.write_bytes(b"stray")
        damaged = damaged_runs(folder) if world_size == 3 else {}
        ranks = run_ranks(go_on_elsewhere, world_size, str(url), shards, damaged, timeout=200)
        results[world_size] = [rank[0] for rank in ranks], [rank[1] for rank in ranks]
    return results


@pytest.mark.parametrize("world_size", [1, 3])
def test_two_ranks_save_and_others_load_every_bit(outcomes, elsewhere, world_size):
    saved = whole_state([rank.end for rank in outcomes["stopped fp32"]])
    runs, _ = elsewhere[world_size]
    loaded = whole_state([rank.start for rank in runs])
    assert len(saved) == 5 * 5 + 6 * 4 + 11 + 3
    for key, values in saved.items():
        assert loaded[key].dtype == values.dtype, key
        assert loaded[key].tobytes() == values.tobytes(), key
    assert loaded.keys() == saved.keys()


@pytest.mark.parametrize("world_size", [1, 3])
def test_training_goes_on_with_the_same_samples(outcomes, elsewhere, world_size):
    """The gradient is summed in another order; other samples would differ in the first digits."""
    whole = outcomes["whole fp32"][0]
    resumed = elsewhere[world_size][0][0]
    assert resumed.error == ""
    assert list(resumed.losses) == list(range(STOP + 1, STEPS + 1))
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=1e-3), step
    assert list(resumed.kept) == [12, STEPS]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", [FILES[1], "is missing"]),
        ("cut short", [FILES[0], "bytes, committed were"]),
        ("flipped", [FILES[1], "sha256"]),
        ("commit cut short", ["commit.json"]),
        ("another network", ["does not fit the network", "blocks.2.", "stored None"]),
    ],
)
def test_damage_is_named_on_all_ranks_before_the_state_is_touched(elsewhere, damage, words):
    answers = [refused[damage] for refused in elsewhere[3][1]]
    message, _ = answers[0]
    assert all(answer == (message, True) for answer in answers)
    assert f"damaged-{damage.replace(' ', '-')}/checkpoints/step-{STOP:08d}" in message
    for word in words:
        assert word in message


def test_the_engine_that_refused_still_loads(elsewhere):
    assert all(refused["sound"] == ("", False) for refused in elsewhere[3][1])


def test_a_damaged_checkpoint_is_passed_over_aloud(outcomes, elsewhere):
    """The one before is sound: the run goes on there and says what is wrong with the newest."""
    whole = outcomes["whole fp32"][0]
    again = elsewhere[3][1][0]["worker"]
    assert again.error == ""
    assert again.events[0].step == EARLIER
    passed_over = again.events[0].facts["damaged checkpoints passed over"]
    assert FILES[0] in passed_over
    assert "bytes, committed were" in passed_over
    for step, loss in again.losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=1e-3), step


def test_without_any_sound_checkpoint_the_worker_stops(elsewhere):
    for refused in elsewhere[3][1]:
        assert "no checkpoint can be loaded" in refused["none sound"].error
        assert f"step-{STOP:08d}" in refused["none sound"].error
        assert f"step-{EARLIER:08d}" in refused["none sound"].error
        assert refused["none sound"].events == []
        assert refused["none sound"].start == {}
