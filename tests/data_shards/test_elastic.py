"""Exactly once per epoch, in one global order, whatever the ranks, workers and interruptions."""

import uuid

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.config import StreamConfig
from data_shards.format.shard_index import load_index
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.streaming.sampler import ORDER, Cursor
from data_shards.streaming.stream import SampleStream
from data_shards.write import write_shard_set
from tests.faulty_proxy import Weather
from tests.harness import run_ranks
from tests.object_store import s3_clients
from tests.repetitions import mostly_slow

pytestmark = pytest.mark.integration

BATCH = 96
WORLDS = (1, 2, 3, 4, 8)
WORKERS = (0, 1, 2, 3, 4)
SAMPLES = 250
STEPS = -(-5 * SAMPLES // (2 * BATCH))  # two and a half epochs
CONFIG = {"lanes": 3, "window": 32, "cache_bytes": 0, "shift_pixels": 1, "flip": True}


@pytest.fixture(scope="module")
def index():
    store = Store(f"memory://elastic-{uuid.uuid4().hex}")
    yield write_shard_set(
        synthetic(samples=313, size=8, classes=4), store.url, samples_per_shard=37
    )
    store.remove("", recursive=True)


def train(index, world, workers, cursor, steps, **fields):
    """What all ranks together see, by step: keys and a checksum of the pixels, cursor after it."""
    config = StreamConfig(**{**CONFIG, **fields}, workers=workers)
    streams = [
        SampleStream(
            index,
            config,
            split="train",
            global_batch=BATCH,
            cursor=cursor,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    try:
        seen, cursors = [], []
        for _ in range(steps):
            batches = [next(stream) for stream in streams]
            cursors += {batch.cursor_after for batch in batches}
            images = torch.cat([batch.images for batch in batches])
            rows = np.concatenate([batch.rows for batch in batches])
            seen.append((index.rows.key[rows].tolist(), hash(images.numpy().tobytes())))
        assert len(cursors) == steps  # all ranks agree
        return seen, cursors
    finally:
        for stream in streams:
            stream.close()


@pytest.fixture(scope="module")
def undisturbed(index):
    return train(index, 1, 0, Cursor(seed=5), STEPS)[0]


def test_every_sample_once_per_epoch(index, undisturbed):
    keys = [key for step, _ in undisturbed for key in step]
    train_keys = sorted(index.rows.key[index.select("train")].tolist())
    assert len(train_keys) == SAMPLES
    assert sorted(keys[:SAMPLES]) == sorted(keys[SAMPLES : 2 * SAMPLES]) == train_keys
    rest = keys[2 * SAMPLES :]
    assert len(rest) >= SAMPLES // 2 - BATCH
    assert len(set(rest)) == len(rest)


@pytest.mark.parametrize("world", mostly_slow(WORLDS, [1, 3]))
def test_every_stop_and_every_new_world_size_give_one_sequence(index, undisturbed, world):
    # What happens before a stop and after it are independent but for the cursor: all pairs of old
    # and new world sizes are covered by every prefix and every rest, and a stream, which does not
    # know how many steps will be taken, has every prefix of one run.
    seen, cursors = train(index, world, WORKERS[world % len(WORKERS)], Cursor(seed=5), STEPS)
    assert seen == undisturbed
    for stop, cursor in enumerate([Cursor(seed=5), *cursors]):
        assert cursor == Cursor(seed=5).advance(stop * BATCH, SAMPLES)
        workers = WORKERS[(stop + world) % len(WORKERS)]
        # Two steps say whether it goes on at the right place, and one run goes on to the end.
        steps = STEPS - stop if stop == 1 else min(2, STEPS - stop)
        assert train(index, world, workers, cursor, steps)[0] == undisturbed[stop : stop + steps]


any_history = given(
    st.integers(0, 2**64 - 1),
    st.lists(
        st.tuples(st.sampled_from(WORLDS), st.sampled_from(WORKERS), st.integers(1, 4)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([{}, {"cache_bytes": 1 << 20}, {"read_ahead_bytes": 150_000}]),
)


def goes_on(index, seed, history, fields):
    cursor = Cursor(seed=seed, epoch=1, position=17, order=ORDER, lanes=3, window=32)
    total = sum(steps for _, _, steps in history)
    expected, _ = train(index, 1, 0, cursor, total)
    seen = []
    for world, workers, steps in history:
        part, (*_, cursor) = train(index, world, workers, cursor, steps, **fields)
        seen += part
    assert seen == expected


@settings(max_examples=3)
@any_history
def test_any_history_of_interruptions_gives_one_sequence(index, seed, history, fields):
    goes_on(index, seed, history, fields)


@pytest.mark.slow
@settings(max_examples=100)
@any_history
def test_a_hundred_histories_of_interruptions_give_one_sequence(index, seed, history, fields):
    goes_on(index, seed, history, fields)


def read_on_s3(rank, world_size, endpoint, url, cursor, steps, folder):
    with s3_clients(endpoint):
        index = load_index(url)
        config = StreamConfig(cache_bytes=0, workers=rank % 3, disk_cache=folder)
        with SampleStream(
            index,
            config,
            split="train",
            global_batch=BATCH,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        ) as stream:
            rows = [next(stream).rows for _ in range(steps)]
            keys = [index.rows.key[part].tolist() for part in rows]
            return keys, stream.cursor, stream.retries


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_on_s3_in_bad_weather(proxy, s3_set, small_keys, tmp_path):
    proxy.weather = Weather(unavailable=0.1, reset=0.1, reset_at=500)
    cursor, seen, retries = Cursor(seed=5), [], 0
    for world, steps in ((3, 1), (2, 2)):  # three epochs of one batch
        place = str(tmp_path / "cache")
        ranks = run_ranks(read_on_s3, world, proxy.url, s3_set, cursor, steps, place)
        seen += [[key for keys, _, _ in ranks for key in keys[step]] for step in range(steps)]
        (cursor,) = {after for _, after, _ in ranks}
        retries += sum(count for _, _, count in ranks)
    assert seen == small_keys
    assert retries > 0


@pytest.fixture
def small_keys(synthetic_set):
    """Keys of the small set in the order of one undisturbed process."""
    index = load_index(str(synthetic_set))
    config = StreamConfig(cache_bytes=0)
    with SampleStream(
        index, config, split="train", global_batch=BATCH, cursor=Cursor(seed=5)
    ) as stream:
        return [index.rows.key[next(stream).rows].tolist() for _ in range(3)]
