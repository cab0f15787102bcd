import gc
import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.sources.synthetic import synthetic
from data_shards.streaming import fetcher
from data_shards.streaming.sample_reader import read_shard
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from data_shards.write import write_shard_set

pytestmark = pytest.mark.integration

START = Cursor(seed=3)


@pytest.fixture(scope="session")
def small(synthetic_set):
    return load_index(str(synthetic_set))


@pytest.fixture(scope="session")
def pixels(small):
    """All images of the small set by row."""
    batches = [b for shard in small.shards for b in read_shard(small, shard, 50)]
    return torch.cat([b.images for b in batches])


def take(index, count, config=None, **fields):
    arguments = {"split": "train", "global_batch": 16, "cursor": START, **fields}
    with SampleStream(index, config or StreamConfig(), **arguments) as stream:
        return [next(stream) for _ in range(count)]


def same(left, right):
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and np.array_equal(a.rows, b.rows)
        and np.array_equal(a.positions, b.positions)
        and a.cursor_after == b.cursor_after
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_every_sample_once_per_epoch_with_its_pixels(small, pixels, cache):
    batches = take(small, 18, StreamConfig(cache_bytes=cache))
    rows = np.concatenate([batch.rows for batch in batches])
    train = small.select("train")
    assert len(train) == 96
    for epoch in range(3):
        assert np.array_equal(np.sort(rows[96 * epoch : 96 * (epoch + 1)]), train)
    assert not np.array_equal(rows[:96], rows[96:192])
    assert torch.equal(torch.cat([batch.images for batch in batches]), pixels[rows])
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == small.rows.label[rows].tolist()
    positions = np.concatenate([batch.positions for batch in batches])
    assert positions.tolist() == list(range(288))
    assert batches[-1].cursor_after == Cursor(seed=3, epoch=3)


@pytest.mark.parametrize(
    "config", [StreamConfig(), StreamConfig(cache_bytes=0, shift_pixels=2, flip=True, lanes=3)]
)
def test_the_same_batches_for_any_number_of_ranks(small, config):
    expected = take(small, 9, config)
    for world in (2, 4, 8):
        ranks = [take(small, 9, config, rank=rank, world_size=world) for rank in range(world)]
        for step, batch in enumerate(expected):
            parts = [rank[step] for rank in ranks]
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
            assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
            assert all(part.cursor_after == batch.cursor_after for part in parts)


@settings(max_examples=8)
@given(st.integers(0, 11), st.sampled_from([0, 1 << 20]), st.sampled_from([5, 16, 130]))
def test_resume_anywhere_is_exact(small, stop, cache, batch):
    config = StreamConfig(cache_bytes=cache, shift_pixels=1)
    whole = take(small, 14, config, global_batch=batch)
    cursor = whole[stop].cursor_after
    resumed = take(small, 13 - stop, config, global_batch=batch, cursor=cursor)
    assert same(resumed, whole[stop + 1 :])


@pytest.mark.parametrize(("began", "goes_on"), [(1 << 20, 0), (0, 1 << 20)])
def test_a_run_goes_on_in_the_order_it_began_with(small, began, goes_on):
    """What is cached whole is shuffled as a whole; the cache may change when a run is resumed."""
    configs = [StreamConfig(cache_bytes=c, lanes=2, window=8) for c in (began, goes_on)]
    whole = take(small, 9, configs[0])
    assert not same(take(small, 9, configs[1]), whole)
    cursor = whole[3].cursor_after
    assert same(take(small, 5, configs[1], cursor=cursor), whole[4:])
    of_lanes = Cursor(seed=3, order=2, lanes=2, window=8)
    assert same(take(small, 9, configs[0], cursor=of_lanes), whole) == (began == 0)


def test_cursor_counts_what_was_handed_out(small):
    with SampleStream(
        small, StreamConfig(), split="train", global_batch=10, cursor=START
    ) as stream:
        assert stream.cursor == START
        for step in range(1, 4):
            assert next(stream).cursor_after == stream.cursor
            assert stream.cursor == Cursor(seed=3, position=10 * step)


def test_read_ahead_does_not_change_the_order(small):
    # 16 x 3 x 16 x 16 bytes per batch: room for one or two.
    narrow = StreamConfig(cache_bytes=0, read_ahead_bytes=50_000)
    assert same(take(small, 12, narrow), take(small, 12))


def test_encoded_bytes_are_bounded(small, monkeypatch):
    fetched = []
    original = fetcher.fetch

    def spy(index, rows):
        fetched.append(int(index.rows.size[rows].sum()))
        return original(index, rows)

    monkeypatch.setattr(fetcher, "fetch", spy)
    take(small, 30, StreamConfig(cache_bytes=0, read_ahead_bytes=80_000))
    assert max(fetched) <= 80_000 // 16
    assert len(fetched) > 30  # smaller than a batch


@pytest.fixture
def rows_read(monkeypatch):
    """Every row that is read, in order."""
    rows = []
    original = fetcher.fetch

    def spy(index, wanted):
        rows.extend(wanted)
        return original(index, wanted)

    monkeypatch.setattr(fetcher, "fetch", spy)
    return rows


def test_cached_set_is_read_once(small, rows_read):
    take(small, 60)
    assert sorted(rows_read) == small.select("train").tolist()


def test_a_set_that_is_decoded_first_gives_the_same_batches(digits_set, copy_of, damage, rows_read):
    index = damage(copy_of(digits_set), [7])
    fields = {"split": "train", "global_batch": 479, "cursor": START}
    with SampleStream(index, StreamConfig(), **fields) as stream:
        batches = [next(stream) for _ in range(6)]
    rows_read.clear()
    with SampleStream(index, StreamConfig(workers=2), decode_first=True, **fields) as stream:
        train = index.select("train").tolist()
        assert rows_read[: len(train)] == train
        assert same(batches, [next(stream) for _ in range(6)])
        assert stream.damaged == {"digest": 2}
    assert set(rows_read[len(train) :]) == {7}  # the damaged image, once more


def test_a_set_that_is_not_kept_is_not_decoded_first(small):
    config = StreamConfig(cache_bytes=0)
    with SampleStream(
        small, config, split="train", global_batch=16, cursor=START, decode_first=True
    ) as stream:
        assert same([next(stream) for _ in range(6)], take(small, 6, config))


def test_batches_do_not_share_memory_with_the_cache(small, pixels):
    with SampleStream(small, StreamConfig(), split="test", global_batch=24, cursor=START) as stream:
        for _ in range(3):
            batch = next(stream)
            assert torch.equal(batch.images, pixels[batch.rows])
            batch.images.zero_()


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_damaged_sample_is_replaced_and_counted(digits_set, copy_of, damage, cache, caplog):
    index = damage(copy_of(digits_set), [7])
    config = StreamConfig(cache_bytes=cache)
    with (
        caplog.at_level(logging.WARNING, logger="data_shards"),
        SampleStream(index, config, split="train", global_batch=479, cursor=START) as stream,
    ):
        batches = [next(stream) for _ in range(6)]
        assert stream.damaged == {"digest": 2}
    rows = np.concatenate([batch.rows for batch in batches])
    assert 7 not in rows
    whole = take(load_index(str(digits_set)), 6, config, global_batch=479)
    expected = np.concatenate([batch.rows for batch in whole])
    assert (rows != expected).sum() == 2
    assert np.array_equal(expected[rows != expected], [7, 7])
    resumed = take(index, 2, config, global_batch=479, cursor=batches[3].cursor_after)
    assert same(resumed, batches[4:])
    messages = [r.getMessage() for r in caplog.records if "damaged sample" in r.getMessage()]
    assert f"sample '{index.rows.key[7].decode()}' of shard" in messages[0]
    assert "train-00000.tar" in messages[0]


def test_too_much_damage_stops_the_run(digits_set, copy_of, damage):
    index = damage(copy_of(digits_set), range(0, 60, 5))
    config = StreamConfig(damage_allowance=3, damage_fraction=0.0)
    with SampleStream(index, config, split="train", global_batch=9, cursor=START) as stream:
        batches = []
        with pytest.raises(ShardError, match=r"4 of \d+ samples .* budget of 3 .*'digest': 4"):
            batches.extend(stream)
        assert stream.damaged == {"digest": 3}


def test_a_set_of_nothing_but_damage_stops(synthetic_set, copy_of, damage):
    index = damage(copy_of(synthetic_set), range(120))
    config = StreamConfig(damage_allowance=10**6)
    with pytest.raises(ShardError, match="16 samples in a row are damaged"):
        take(index, 1, config)


def test_missing_shard_surfaces_in_the_consumer(synthetic_set, copy_of):
    path = copy_of(synthetic_set)
    index = load_index(str(path))
    (path / "train-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"cannot read file://.*train-00001\.tar"):
        take(index, 12)


def test_close(small):
    before = set(threading.enumerate())
    stream = SampleStream(small, StreamConfig(), split="fit", global_batch=4, cursor=START)
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    dropped = SampleStream(small, StreamConfig(), split="fit", global_batch=4, cursor=START)
    next(dropped)
    del dropped
    gc.collect()
    assert set(threading.enumerate()) <= before  # others may end meanwhile


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"world_size": 3}, "global batch 16 is not divisible by the world size 3"),
        ({"rank": 1}, r"rank 1 is not in \[0, 1\)"),
        ({"split": "val"}, "split 'val' is not one of"),
        ({"cursor": Cursor(seed=0, position=96)}, "cursor position 96 is not below the 96 samples"),
        ({"config": StreamConfig(read_ahead_bytes=20_000)}, "12288 bytes, more than a quarter"),
    ],
)
def test_wrong_requests_are_refused(small, fields, message):
    with pytest.raises(ShardError, match=message):
        take(small, 1, **fields)


def test_memory_store(memory_store):
    index = write_shard_set(synthetic(samples=40, size=8, classes=2), memory_store.url)
    batches = take(index, 2)
    assert np.array_equal(np.sort(np.concatenate([b.rows for b in batches])), np.arange(32))
