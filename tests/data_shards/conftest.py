import shutil
import uuid
from pathlib import Path

import pytest

from data_shards.index import load_index
from data_shards.sources import digits, synthetic
from data_shards.store import Store
from data_shards.write import write_shard_set


@pytest.fixture(scope="session")
def digits_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    write_shard_set(digits(), str(path))
    return path


@pytest.fixture(scope="session")
def synthetic_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic")
    write_shard_set(synthetic(samples=120, size=16, classes=4), str(path), samples_per_shard=20)
    return path


@pytest.fixture
def copy_of(tmp_path):
    """Copy a shard set, to be damaged."""

    def copy(path):
        return Path(shutil.copytree(path, tmp_path / "copy"))

    return copy


@pytest.fixture
def memory_store():
    store = Store(f"memory://test-{uuid.uuid4().hex}")
    yield store
    store.remove("", recursive=True)


@pytest.fixture
def damage():
    """Flip one byte in the body of each image of the rows given."""

    def flip(path, rows):
        index = load_index(str(path))
        for row in rows:
            file = path / index.shards[index.rows.shard[row]].file
            data = bytearray(file.read_bytes())
            data[index.rows.offset[row] + index.rows.size[row] // 2] ^= 0xFF
            file.write_bytes(data)
        return load_index(str(path))

    return flip
