import os
from collections import Counter

import numpy as np
import pytest

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from data_shards.streaming import block_cache as cache_module
from data_shards.streaming.block_cache import BlockCache
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from tests.harness import forking_context
from tests.object_store import s3_clients

BLOCK = 4096
EVERYTHING = 1 << 30


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK", BLOCK)


@pytest.fixture
def index(memory_store, synthetic_set):
    for path in synthetic_set.iterdir():
        memory_store.write(path.name, path.read_bytes())
    return load_index(memory_store)


@pytest.fixture
def asked(monkeypatch):
    """Every range asked of a store."""
    ranges = []
    original = Store.read_ranges

    def spy(store, wanted):
        ranges.extend(wanted)
        return original(store, wanted)

    monkeypatch.setattr(Store, "read_ranges", spy)
    return ranges


def wanted(index, rows=range(120)):
    files = [index.shards[index.rows.shard[row]].file for row in rows]
    starts, sizes = index.rows.offset[list(rows)].tolist(), index.rows.size[list(rows)].tolist()
    return [(f, s, s + n) for f, s, n in zip(files, starts, sizes, strict=True)]


def plain(index, ranges):
    return [index.store.read(file)[start:stop] for file, start, stop in ranges]


def blocks(folder):
    return sorted(path for path in folder.glob("*/*") if path.suffix != ".part")


def test_ranges_through_blocks(index, tmp_path, asked):
    ranges = wanted(index)
    expected = plain(index, ranges)
    asked.clear()
    cache = BlockCache(index, str(tmp_path), EVERYTHING)
    assert cache.read_ranges(ranges) == expected
    assert all(start % BLOCK == 0 for _, start, _ in asked)
    assert len(asked) == len(set(asked)) == len(blocks(tmp_path))
    asked.clear()
    assert BlockCache(index, str(tmp_path), EVERYTHING).read_ranges(ranges) == expected
    assert asked == []
    assert not list(tmp_path.glob("*/*.part"))


def test_without_filling_the_range_alone_is_read(index, tmp_path, asked):
    ranges = wanted(index, [3, 70])
    cache = BlockCache(index, str(tmp_path), EVERYTHING)
    assert cache.read_ranges(ranges, fill=False) == plain(index, ranges)
    assert asked[: len(ranges)] == ranges
    assert blocks(tmp_path) == []


def test_the_least_recently_used_blocks_go(index, tmp_path):
    limit = 20 * BLOCK
    cache = BlockCache(index, str(tmp_path), limit)
    first, rest = wanted(index, [0]), wanted(index, range(20, 120))
    cache.read_ranges(first)
    kept = blocks(tmp_path)
    for wish in rest:
        assert cache.read_ranges([wish]) == plain(index, [wish])
        cache.read_ranges(first)  # used all the time
        total = sum(path.stat().st_size for path in blocks(tmp_path))
        assert total <= limit * 65 / 64 + BLOCK
    assert set(kept) <= set(blocks(tmp_path))
    assert len(blocks(tmp_path)) >= 10


def test_the_bound_holds_for_all_sets_together(index, tmp_path):
    old = tmp_path / ("0" * 24)
    old.mkdir()
    (old / "000000-000000").write_bytes(bytes(50 * BLOCK))
    os.utime(old / "000000-000000", (1, 1))
    # A folder that holds other things too: nothing but blocks is ever removed.
    others = [tmp_path / "photos" / "000000-000000", old / "notes.txt", tmp_path / "list.txt"]
    others[0].parent.mkdir()
    for other in others:
        other.write_bytes(bytes(50 * BLOCK))
        os.utime(other, (1, 1))
    BlockCache(index, str(tmp_path), 20 * BLOCK).read_ranges(wanted(index, [0]))
    assert not (old / "000000-000000").exists()
    assert all(other.exists() for other in others)
    assert len(blocks(tmp_path)) >= 1


def test_a_block_of_a_wrong_size_is_fetched_again(index, tmp_path):
    ranges = wanted(index, [0, 1])
    BlockCache(index, str(tmp_path), EVERYTHING).read_ranges(ranges)
    for path in blocks(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    assert BlockCache(index, str(tmp_path), EVERYTHING).read_ranges(ranges) == plain(index, ranges)


def test_what_a_crash_left_is_not_trusted(index, tmp_path):
    ranges = wanted(index, [0, 1])
    cache = BlockCache(index, str(tmp_path), EVERYTHING)
    cache.read_ranges(ranges)
    for path in blocks(tmp_path):
        path.rename(path.with_suffix(".part"))
        path.with_suffix(".part").write_bytes(b"half a block")
    assert cache.read_ranges(ranges) == plain(index, ranges)
    assert cache.read_ranges(ranges, fill=False) == plain(index, ranges)
    assert len(blocks(tmp_path)) >= 1


def test_a_full_disk_stops_nothing(index, tmp_path, monkeypatch, caplog, asked):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    cache = BlockCache(index, str(tmp_path), EVERYTHING)
    ranges = wanted(index, [0, 50])
    assert cache.read_ranges(ranges) == plain(index, ranges)
    assert [r.getMessage() for r in caplog.records] == [
        f"disk cache {tmp_path} is not written any more: [Errno 28] No space left on device"
    ]
    asked.clear()
    assert cache.read_ranges(ranges) == plain(index, ranges)
    assert asked[:2] == ranges
    assert list(tmp_path.glob("*/*")) == []


def test_an_unwritable_directory_is_refused(index, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"disk_cache .*file.* cannot be written"):
        BlockCache(index, str(tmp_path / "file"), EVERYTHING)


def stream(index, folder, **fields):
    config = StreamConfig(disk_cache=str(folder), cache_bytes=0, **fields)
    return SampleStream(index, config, split="train", global_batch=16, cursor=Cursor(seed=3))


def test_damaged_blocks_do_no_damage(index, tmp_path):
    with stream(index, tmp_path) as batches:
        expected = [next(batches) for _ in range(12)]
    for path in blocks(tmp_path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    with stream(index, tmp_path) as batches:
        found = [next(batches) for _ in range(12)]
        assert batches.damaged == {}
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.rows, theirs.rows)


@pytest.mark.parametrize(("block", "whole"), [(EVERYTHING, True), (512, False)])
def test_a_first_batch_is_read_by_blocks_where_these_are_few(
    index, tmp_path, asked, monkeypatch, block, whole
):
    monkeypatch.setattr(cache_module, "BLOCK", block)
    with stream(index, tmp_path) as batches:
        first = wanted(index, next(batches).rows)
    assert len(set(first) & set(asked)) == (0 if whole else 16)


def test_a_cache_smaller_than_the_shuffle_is_refused(index, tmp_path):
    with pytest.raises(ShardError, match=r"disk_cache_bytes 1000 is less than the \d+ bytes"):
        stream(index, tmp_path, disk_cache_bytes=1000)


def test_local_sets_are_not_cached(synthetic_set, tmp_path):
    with stream(load_index(str(synthetic_set)), tmp_path / "cache") as batches:
        next(batches)
    assert not (tmp_path / "cache").exists()


def read_there(endpoint, url, folder, barrier, answers):
    cache_module.BLOCK = BLOCK
    with s3_clients(endpoint):
        index = load_index(url)
        ranges = wanted(index)
        cache = BlockCache(index, folder, EVERYTHING)
        asked = Counter()
        original = Store.read_ranges

        def spy(store, extents):
            asked.update(extents)
            return original(store, extents)

        Store.read_ranges = spy
        barrier.wait(60)
        found = cache.read_ranges(ranges)
        Store.read_ranges = original
        answers.put((asked, found == plain(index, ranges)))


@pytest.mark.slow
def test_processes_share_the_work(proxy, s3_set, tmp_path):
    context = forking_context()
    barrier, answers = context.Barrier(3), context.Queue()
    arguments = (proxy.url, s3_set, str(tmp_path), barrier, answers)
    processes = [context.Process(target=read_there, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert all(right for _, right in results)
    asked = sum((counts for counts, _ in results), Counter())
    assert len(asked) == len(blocks(tmp_path))
    assert max(asked.values()) == 1  # nobody fetched what another one fetched
    assert not list(tmp_path.glob("*/*.part"))
