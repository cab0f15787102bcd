import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index


def rewrite_rows(path, **columns):
    """Change columns of index.parquet and make the header agree with its new bytes."""
    table = pq.ParquetFile(path / "index.parquet").read()
    for name, change in columns.items():
        at = table.column_names.index(name)
        values = pa.array(change(table.column(name).to_pylist()), table.schema.field(name).type)
        table = table.set_column(at, name, values)
    pq.write_table(table, path / "index.parquet")
    digest = hashlib.sha256((path / "index.parquet").read_bytes()).hexdigest()
    rewrite_header(path, rows_sha256=digest)


def rewrite_header(path, **fields):
    header = json.loads((path / "index.json").read_text())
    header.update(fields)
    del header["digest"]
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    header["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "index.json").write_text(json.dumps(header))


def first(value):
    return lambda values: [value, *values[1:]]


def test_splits(digits_set):
    index = load_index(str(digits_set))
    train, fit, validation = (index.select(name) for name in ("train", "fit", "validation"))
    assert np.array_equal(np.union1d(fit, validation), train)
    assert not np.intersect1d(fit, validation).size
    assert np.array_equal(np.union1d(train, index.select("test")), np.arange(1797))
    assert {shard.split for shard in index.shards_of("validation")} == {"train"}
    with pytest.raises(ShardError, match="split 'val' is not one of train, test, fit, validation"):
        index.select("val")


def test_require(digits_set):
    index = load_index(str(digits_set))
    index.require((1, 8, 8), 10)
    with pytest.raises(
        ShardError, match=r"images 1x8x8 .* in 10 classes, the network takes 3x32x32"
    ):
        index.require((3, 32, 32), 10)
    with pytest.raises(ShardError, match="in 100 classes"):
        index.require((1, 8, 8), 100)


def test_missing_set(tmp_path, memory_store):
    with pytest.raises(ShardError, match=f"no shard set at file://{tmp_path}"):
        load_index(str(tmp_path))
    with pytest.raises(ShardError, match="no shard set at memory://"):
        load_index(memory_store)


def test_truncated_shard(digits_set, copy_of):
    path = copy_of(digits_set)
    file = path / "train-00002.tar"
    file.write_bytes(file.read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"train-00002\.tar has 736768 bytes.* states 737280"):
        load_index(str(path))
    file.unlink()
    with pytest.raises(ShardError, match=r"train-00002\.tar is listed in the index and absent"):
        load_index(str(path))


def test_changed_header(digits_set, copy_of):
    path = copy_of(digits_set)
    text = (path / "index.json").read_text()
    (path / "index.json").write_text(text.replace('"num_classes": 10', '"num_classes": 11'))
    with pytest.raises(ShardError, match=r"index\.json was changed"):
        load_index(str(path))
    for broken in (text[:-20], "[]", "{}", '{"digest": 1}'):
        (path / "index.json").write_text(broken)
        with pytest.raises(ShardError, match="not a shard set header"):
            load_index(str(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 9}, "schema version 9, this program reads 2"),
        ({"shards": []}, "is empty"),
        ({"surprise": 1}, "not a shard set header"),
        ({"name": "x" * 1025}, "has a name of 1,025 bytes, the limit is 1,024"),
        ({"num_classes": 5}, r"sample '\d+' of shard .*/train-\d+\.tar has label [5-9], which is "
                             r"not in \[0, 5\)"),
        ({"splits": {"train": 1}}, "the header states {'train': 1}"),
    ],
)  # fmt: skip
def test_wrong_headers(digits_set, copy_of, fields, message):
    path = copy_of(digits_set)
    rewrite_header(path, **fields)
    with pytest.raises(ShardError, match=message):
        load_index(str(path))


def test_shard_names_cannot_leave_the_set(digits_set, copy_of):
    path = copy_of(digits_set)
    shards = json.loads((path / "index.json").read_text())["shards"]
    shards[0]["file"] = "../train-00000.tar"
    rewrite_header(path, shards=shards)
    with pytest.raises(ShardError, match="not a shard set header"):
        load_index(str(path))


def test_changed_rows(digits_set, copy_of):
    path = copy_of(digits_set)
    data = bytearray((path / "index.parquet").read_bytes())
    data[100] ^= 1
    (path / "index.parquet").write_bytes(data)
    with pytest.raises(ShardError, match=r"index\.parquet has sha256 .* the header states"):
        load_index(str(path))
    (path / "index.parquet").unlink()
    with pytest.raises(ShardError, match=r"has no index\.parquet"):
        load_index(str(path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": first(-1)}, r"label -1, which is not in \[0, 10\)"),
        ({"offset": first(10**9)}, "size .* which is not inside its shard"),
        ({"offset": first(-4)}, "offset -4"),
        ({"extension": first("pkl")}, "extension b'pkl', which is not one of png"),
        ({"split": first("test")}, "not the split of its shard"),
        ({"shard": first(5)}, "out of order"),
        ({"shard": lambda values: [0 if v == 1 else v for v in values]}, "719 rows"),
    ],
)
def test_wrong_rows(digits_set, copy_of, columns, message):
    path = copy_of(digits_set)
    rewrite_rows(path, **columns)
    with pytest.raises(ShardError, match=message):
        load_index(str(path))


def test_a_key_of_megabytes_is_refused_before_the_columns_are_made(digits_set, copy_of):
    path = copy_of(digits_set)
    rewrite_rows(path, key=first("a" * (20 << 20)))
    with pytest.raises(ShardError, match=r"index\.parquet has in key a text of 20,971,520 bytes"):
        load_index(str(path))


def test_a_key_may_have_a_thousand_bytes(digits_set, copy_of):
    path = copy_of(digits_set)
    rewrite_rows(path, key=first("a" * 1024))
    assert load_index(str(path)).rows.key[0] == b"a" * 1024


def test_more_rows_than_the_header_states_are_not_read(digits_set, copy_of):
    """Repeated values take no room in a file: rows are counted before they are."""
    path = copy_of(digits_set)
    table = pq.ParquetFile(path / "index.parquet").read()
    many = pa.concat_tables([table.slice(0, 1)] * 10_000).combine_chunks()
    pq.write_table(many, path / "index.parquet")
    digest = hashlib.sha256((path / "index.parquet").read_bytes()).hexdigest()
    rewrite_header(path, rows_sha256=digest)
    with pytest.raises(ShardError, match="has 10000 rows, the header states 1797 samples"):
        load_index(str(path))


def test_more_samples_than_a_shard_has_room_for_are_refused(digits_set, copy_of):
    path = copy_of(digits_set)
    shards = json.loads((path / "index.json").read_text())["shards"]
    shards[0]["samples"] = 10**9
    rewrite_header(path, shards=shards)
    with pytest.raises(ShardError, match=r"train-00000\.tar of \d+ bytes cannot hold 1000000000"):
        load_index(str(path))


def test_an_image_of_a_row_is_held_to_its_limit(digits_set, monkeypatch):
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_IMAGE_BYTES", "90")
    with pytest.raises(ShardError, match="which is not within the 90 bytes that an image may have"):
        load_index(str(digits_set))


def test_an_index_of_more_bytes_than_its_rows_can_take_is_not_read(digits_set, copy_of):
    path = copy_of(digits_set)
    with (path / "index.parquet").open("ab") as file:
        file.truncate(20 << 30)  # sparse: 20 GiB of nothing
    with pytest.raises(ShardError, match=r"21,474,836,480 bytes; 1,797 rows take at most"):
        load_index(str(path))
