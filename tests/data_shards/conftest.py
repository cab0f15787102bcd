import shutil
import uuid
from pathlib import Path

import pytest

from data_shards.format.shard_index import load_index
from data_shards.sources.digits import digits
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from tests.faulty_proxy import FaultyProxy
from tests.object_store import s3_clients, s3_server, upload


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
def folder(synthetic_set, copy_of):
    """A small shard set, to be damaged."""
    return copy_of(synthetic_set)


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


@pytest.fixture(scope="session")
def s3_address():
    """host:port of an S3-compatible server with one bucket."""
    with s3_server() as address:
        yield address


@pytest.fixture
def proxy(s3_address):
    """A proxy before the server, to which the S3 clients of this process are led."""
    with FaultyProxy(s3_address) as proxy, s3_clients(proxy.url):
        yield proxy


@pytest.fixture
def s3_set(proxy, synthetic_set):
    """URL of the small synthetic set on S3."""
    return upload(synthetic_set)
