"""What comes from outside is held to its limit before it takes memory."""

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import exit_on_error
from data_shards.storage.store import Store
from data_shards.untrusted.json_input import parse_json, parse_object, read_object
from data_shards.untrusted.limits import (
    PREFIX,
    Limits,
    UntrustedError,
    limits,
    require,
    require_name,
)
from data_shards.untrusted.parquet import open_parquet, read_column, read_table

MIB = 1 << 20


def parquet(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return bytes(sink.getvalue())


def test_the_limits_are_those_that_are_promised():
    assert dataclasses.asdict(limits()) == {
        "name_bytes": 1024,
        "json_bytes": 16 * MIB,
        "json_depth": 64,
        "row_group_bytes": 64 * MIB,
        "table_bytes": 1024 * MIB,
        "image_bytes": 256 * MIB,
        "image_pixels": 200_000_000,
        "image_scanned_pixels": 1 << 29,
        "answer_bytes": 64 * MIB,
    }


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
def test_every_limit_is_raised_by_its_variable(monkeypatch, field):
    allowed = getattr(Limits(), field)
    require(allowed, field, "it has")
    with pytest.raises(UntrustedError, match=PREFIX + field.upper()):
        require(allowed + 1, field, "it has")
    monkeypatch.setenv(PREFIX + field.upper(), str(allowed + 1))
    require(allowed + 1, field, "it has")


@pytest.mark.parametrize("text", ["", "0x10", "-1", "1.5", "16M", "²"])
def test_a_limit_that_is_no_number_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv(f"{PREFIX}JSON_BYTES", text)
    with pytest.raises(UntrustedError, match=r"JSON_BYTES=.* is not a positive whole number"):
        parse_json("1", "x")


def test_an_entry_says_so_in_one_line(monkeypatch):
    monkeypatch.setenv(f"{PREFIX}IMAGE_BYTES", "256M")
    with (
        pytest.raises(SystemExit, match=r"^error: .*IMAGE_BYTES='256M' is not a positive whole"),
        exit_on_error(),
    ):
        require(1, "image_bytes", "it has")


def test_json_that_is_too_large_is_not_parsed(monkeypatch):
    monkeypatch.setattr("json.loads", lambda text: pytest.fail("it was parsed"))
    with pytest.raises(UntrustedError, match=r"f\.json has 16,777,217 bytes, the limit is 16,777"):
        parse_json(b" " * (16 * MIB + 1), "f.json")


def test_a_stream_without_an_end_is_read_to_the_limit_only(monkeypatch):
    monkeypatch.setenv(f"{PREFIX}JSON_BYTES", "1000")

    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size=-1):
            assert 0 <= size <= 1001
            self.taken += size
            return b" " * size

    stream = Endless()
    with pytest.raises(UntrustedError, match=r"has 1,001 bytes"):
        read_object(stream, "f.json")
    assert stream.taken == 1001


@pytest.mark.parametrize("make", ["[{}]", '{{"x": {}}}'])
def test_json_has_64_levels_at_most(make):
    text = "1"
    for _ in range(64):
        text = make.format(text)
    parse_json(text, "f.json")
    with pytest.raises(UntrustedError, match=r"f\.json has JSON of at least 65 levels"):
        parse_json(make.format(text), "f.json")
    # Deeper than the parser itself recurses.
    with pytest.raises(UntrustedError, match=r"f\.json is damaged: maximum recursion"):
        parse_json(b"[" * 100_000, "f.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\0" * 10, b'{"x": "\xff"}', "\ud800", b"9" * 5000])
def test_what_is_no_json_says_where_it_lies(data):
    with pytest.raises(UntrustedError, match=r"f\.json is damaged"):
        parse_json(data, "f.json")


@pytest.mark.parametrize("data", [b"[]", b"1", b'"x"', b"null"])
def test_another_value_than_an_object_is_named(data):
    with pytest.raises(UntrustedError, match=r"f\.json is damaged: \w+, not a JSON object"):
        parse_object(data, "f.json")


def test_a_large_file_of_a_store_is_refused_by_its_size(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(20 << 30)  # sparse: 20 GiB of nothing
    with pytest.raises(UntrustedError, match=r"x\.json has 21,474,836,480 bytes"):
        Store(tmp_path).read_object("x.json")


def test_names_are_counted_in_bytes():
    require_name("ä" * 512, "a tensor")
    with pytest.raises(UntrustedError, match=r"a tensor has a name of 1,026 bytes"):
        require_name("ä" * 513, "a tensor")


def test_a_text_that_a_few_bytes_repeat_is_refused_before_it_is_written_out():
    """Written out this column would take 20 GB."""
    keys = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, np.int32)), ["a" * 2 * MIB])
    data = parquet(pa.table({"key": keys}))
    assert len(data) < 10_000
    before = pa.total_allocated_bytes()
    file = open_parquet(data, "rows")
    with pytest.raises(UntrustedError, match=r"rows has in key a text of 2,097,152 bytes"):
        read_column(file, "key", "rows")
    with pytest.raises(UntrustedError, match="rows has in key a text"):
        read_table(data, "rows")
    assert pa.total_allocated_bytes() - before < 64 * MIB


def test_a_row_group_that_declares_more_than_its_limit_is_not_read(monkeypatch):
    data = parquet(pa.table({"x": np.zeros(1 << 20), "y": np.zeros(1 << 20)}))
    assert len(data) < 10_000
    assert read_table(data, "rows").num_rows == 1 << 20
    monkeypatch.setenv(f"{PREFIX}ROW_GROUP_BYTES", str(15 * MIB))
    with pytest.raises(UntrustedError, match=r"a row group of rows takes 16,777,216 bytes"):
        open_parquet(data, "rows")
    smaller = parquet(pa.table({"x": np.zeros(1 << 20)}), row_group_size=1 << 18)
    assert read_table(smaller, "rows").num_rows == 1 << 20


def test_many_row_groups_are_counted_together(monkeypatch):
    """Each within its limit, all of them beyond any memory."""
    data = parquet(pa.table({"x": np.zeros(1 << 20)}), row_group_size=1 << 14)
    monkeypatch.setenv(f"{PREFIX}TABLE_BYTES", str(8 * MIB))
    assert read_table(data, "rows").num_rows == 1 << 20
    monkeypatch.setenv(f"{PREFIX}TABLE_BYTES", str(8 * MIB - 1))
    with pytest.raises(UntrustedError, match=r"rows takes 8,388,608 bytes, the limit is 8,388,607"):
        read_table(data, "rows")
    # A short text of each row, which stands in the file once.
    keys = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), ["a" * 1000])
    with pytest.raises(UntrustedError, match="rows takes 100,4"):
        read_table(parquet(pa.table({"key": keys})), "rows")


def test_texts_come_back_as_they_were_written():
    table = pa.table({"key": ["a", "b", "a"], "value": [1, 2, 3]})
    assert read_table(parquet(table), "rows").equals(table)
    empty = pa.table({"key": pa.array([], pa.string())})
    assert read_table(parquet(empty), "rows").equals(empty)
    assert read_table(parquet(table), "rows", ["key"]).column_names == ["key"]
    with pytest.raises(UntrustedError, match="rows lacks the columns size"):
        read_table(parquet(table), "rows", ["key", "size"])
    for data in (b"", b"PAR1", b"x" * 100, parquet(table)[:-20]):
        with pytest.raises(UntrustedError, match="rows is damaged"):
            read_table(data, "rows")
