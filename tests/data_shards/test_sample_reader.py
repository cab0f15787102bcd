import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.sources.digits import digits
from data_shards.streaming import sample_reader
from data_shards.streaming.sample_reader import fetch, read_shard
from data_shards.write import write_shard_set


def test_a_split_read_shard_by_shard_is_the_data(digits_set):
    index = load_index(str(digits_set))
    batches = [b for shard in index.shards_of("test") for b in read_shard(index, shard, 32)]
    assert [len(b.keys) for b in batches[:3]] == [32, 32, 26]
    keys = [key for batch in batches for key in batch.keys]
    assert keys == [key.decode() for key in index.rows.key[index.select("test")]]
    images = torch.cat([batch.images for batch in batches])
    data, numbers = load_digits(), [int(key) for key in keys]
    expected = np.rint(data.images[numbers] * 255 / 16).astype(np.uint8)[:, None]
    assert images.is_contiguous()
    assert images.numpy().tobytes() == expected.tobytes()
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == data.target[numbers].tolist()


def test_part_of_a_train_shard(digits_set):
    index = load_index(str(digits_set))
    counts = {"fit": 0, "validation": 0}
    for split in counts:
        for shard in index.shards_of(split):
            for batch in read_shard(index, shard, 100, split=split):
                counts[split] += len(batch.keys)
    assert counts == {"fit": 1149, "validation": 288}


def test_memory_store(memory_store):
    index = write_shard_set(digits(), memory_store.url)
    assert sum(len(b.keys) for b in read_shard(index, index.shards[0], 100)) == 360


def test_damaged_sample_is_an_error(digits_set, copy_of, damage):
    index = damage(copy_of(digits_set), [1500])
    shard = index.shards[index.rows.shard[1500]]
    key = index.rows.key[1500].decode()
    with pytest.raises(ShardError, match=f"sample '{key}' of shard .*{shard.file}.*xxh3_64"):
        list(read_shard(index, shard, 10))


def test_shard_gone_or_cut_after_loading(digits_set, copy_of):
    path = copy_of(digits_set)
    index = load_index(str(path))
    file = path / "test-00000.tar"
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(ShardError, match=r"test-00000\.tar: \d+ bytes .* the index states"):
        list(read_shard(index, index.shards_of("test")[0], 90))
    file.unlink()
    with pytest.raises(ShardError, match=r"cannot read file://.*test-00000\.tar"):
        list(read_shard(index, index.shards_of("test")[0], 90))


def test_batch_size(digits_set):
    index = load_index(str(digits_set))
    with pytest.raises(ShardError, match="batch size 0"):
        next(read_shard(index, index.shards[0], 0))


def requested(index, rows, monkeypatch):
    ranges = []
    original = type(index.store).read_ranges

    def spy(store, asked):
        ranges.extend(asked)
        return original(store, asked)

    monkeypatch.setattr(type(index.store), "read_ranges", spy)
    encoded = fetch(index, rows)
    for row in rows:
        start, size = int(index.rows.offset[row]), int(index.rows.size[row])
        file = index.store.local_path() / index.shards[index.rows.shard[row]].file
        assert encoded[row] == file.read_bytes()[start : start + size]
    return ranges


def test_neighbours_are_read_together(digits_set, monkeypatch):
    index = load_index(str(digits_set))
    assert len(requested(index, [3, 4, 5, 100, 350], monkeypatch)) == 1
    monkeypatch.setattr(sample_reader, "MAX_GAP", 3000)
    # Images of about 100 bytes: gaps of 2 KB are more than the images, so four gaps are read.
    assert len(requested(index, list(range(3, 23)), monkeypatch)) > 10


def test_gaps_and_lengths_are_limited(synthetic_set, monkeypatch):
    index = load_index(str(synthetic_set))
    rows = list(range(20))
    assert len(requested(index, rows, monkeypatch)) < 20
    monkeypatch.setattr(sample_reader, "MAX_GAP", 100)
    assert len(requested(index, rows, monkeypatch)) == 20
    total = sum(stop - start for _, start, stop in requested(index, rows, monkeypatch))
    assert total == index.rows.size[rows].sum()
