"""The store against a real S3-compatible server, in all weathers."""

import logging
import os
import uuid

import fsspec
import numpy as np
import pytest

from data_shards.config import MIB
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.storage import multipart, range_reader, retry
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import fetch
from tests.faulty_proxy import FaultyProxy, Weather
from tests.object_store import BUCKET, KEY, SECRET, s3_clients
from tests.repetitions import mostly_slow


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 0.2)


def configure(monkeypatch, **options):
    monkeypatch.setitem(fsspec.config.conf, "s3", options)


@pytest.fixture
def large(proxy):
    """An object of 300 KB and its bytes."""
    store = Store(f"s3://{BUCKET}/large")
    data = np.random.Generator(np.random.Philox(0)).bytes(300_000)
    store.write("object", data)
    proxy.seen.clear()
    return store, data


def test_round_trip(proxy):
    store = Store(f"s3://{BUCKET}/round/trip")
    store.write("a/one", b"0123456789")
    store.write("two", b"xyz")
    assert store.read("a/one") == b"0123456789"
    assert store.ls() == ["a", "two"]
    assert store.sizes("a") == {"a/one": 10}
    assert store.read_ranges([("two", 1, 3), ("a/one", 8, 99), ("two", 3, 5)]) == [
        b"yz",
        b"89",
        b"",
    ]
    assert not store.exists("three")
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/round/trip: .*three"):
        store.read("three")
    store.remove("a", recursive=True)
    assert store.ls() == ["two"]


WEATHERS = {
    "a storm of 503": Weather(unavailable=0.4),
    "resets": Weather(reset=0.5, reset_at=2000),
    "short bodies": Weather(short=0.5),
    "stalls": Weather(stall=0.3, stall_s=30),
    "a trickle": Weather(trickle=0.3, trickle_rate=500),
}


@pytest.mark.parametrize("name", mostly_slow(WEATHERS, ["a storm of 503", "short bodies"]))
def test_every_byte_arrives_in_bad_weather(name, proxy, s3_set, small_rows, monkeypatch):
    configure(monkeypatch, config_kwargs={"read_timeout": 0.3})
    monkeypatch.setattr(range_reader, "_SLOWEST", 1 << 16)
    proxy.weather = WEATHERS[name]
    index = load_index(s3_set)
    assert index.digest == small_rows[0]
    for rows in np.array_split(np.arange(60), 3):
        encoded = fetch(index, rows, max_gap=0)
        assert {row: bytes(encoded[row]) for row in rows} == {r: small_rows[1][r] for r in rows}
    faults = sum(
        proxy.seen[fault] for fault in ("unavailable", "reset", "stall", "trickle", "short")
    )
    assert faults > 5
    # On a busy machine an answer that is late for its own reasons is asked for again, too.
    assert 0 < index.store.retries <= proxy.seen["requests"]


@pytest.fixture(scope="session")
def small_rows(synthetic_set):
    """Digest of the small set, and the encoded bytes of all its rows."""
    index = load_index(str(synthetic_set))
    encoded = fetch(index, np.arange(120))
    return index.digest, {row: bytes(data) for row, data in encoded.items()}


def test_every_connection_is_reset_after_k_bytes(proxy, large):
    # Without going on in the middle this would never end.
    store, data = large
    proxy.weather = Weather(reset=1.0, reset_at=40_000)
    assert store.read_range("object", 0, len(data)) == data
    assert store.retries == 7
    assert proxy.seen["requests"] == 8


def test_many_requests_are_under_way_together(proxy, large):
    store, data = large
    proxy.weather = Weather(latency_s=0.1)
    wanted = [("object", 1000 * i, 1000 * i + 500) for i in range(100)]
    assert store.read_ranges(wanted) == [data[start:stop] for _, start, stop in wanted]
    assert 16 <= proxy.most_at_once <= range_reader.IN_FLIGHT


def test_patience_ends_with_a_clear_error(proxy, s3_set, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_S", 0.5)
    proxy.weather = Weather(unavailable=1.0)
    with pytest.raises(ShardError, match=r"index of a shard set: s3://bucket/\w+: OSError: .*S"):
        load_index(s3_set)
    proxy.weather = Weather()
    index = load_index(s3_set)
    proxy.weather = Weather(unavailable=1.0)
    with pytest.raises(ShardError, match=r"cannot read s3://bucket/\w+ \(test-00000.tar\)"):
        fetch(index, index.select("test")[:3])


def test_a_write_that_fails_leaves_what_was_there(proxy):
    """Closing the client's file would send the part that was written."""

    def failing():
        yield b"part"
        raise ZeroDivisionError

    store = Store(f"s3://bucket/{uuid.uuid4().hex}")
    store.write("whole", b"before")
    for name in ("whole", "new"):
        with pytest.raises(ZeroDivisionError), store.durable(name) as stream:
            stream.writelines(failing())
    assert store.read("whole") == b"before"
    assert store.ls() == ["whole"]


@pytest.fixture
def in_parts(proxy, monkeypatch):
    """A store whose objects go in parts of 5 MiB, and a function that lists unfinished uploads."""
    configure(monkeypatch, default_block_size=5 * MIB)
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")

    def unfinished():
        client = store._fs(streams=True)
        prefix = store.url.removeprefix(f"s3://{BUCKET}/")
        found = client.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=prefix)
        return [upload["Key"].removeprefix(f"{prefix}/") for upload in found.get("Uploads", [])]

    return store, unfinished


def parts_of(store, name):
    tag = store._fs().info(store._path(name))["ETag"].strip('"')
    return int(tag.partition("-")[2] or 1)


def test_an_object_of_more_parts_than_allowed_goes_in_larger_ones(in_parts, monkeypatch):
    monkeypatch.setattr(multipart, "MOST_PARTS", 2)
    monkeypatch.setattr(multipart, "LARGEST_PART", 12 * MIB)
    store, unfinished = in_parts
    piece = bytes(range(256)) * 4096
    with store.durable("known", size=11 * MIB) as stream:
        for _ in range(11):
            stream.write(piece)
    assert store.read("known") == 11 * piece
    store.write("at-once", 11 * piece)
    assert store.read("at-once") == 11 * piece
    assert (parts_of(store, "known"), parts_of(store, "at-once")) == (1, 1)
    with store.durable("unknown") as stream:
        for _ in range(11):
            stream.write(piece)
    assert parts_of(store, "unknown") == 3
    refused = pytest.raises(ShardError, match=r"s3://bucket/\w+/large would have 13000000 bytes")
    with refused, store.durable("large", size=13_000_000):
        pytest.fail("bytes would have been written")
    assert not store.exists("large")
    assert unfinished() == []


@pytest.mark.parametrize("size", [MIB, 6 << 30])
def test_parts_that_s3_does_not_allow_are_refused_before_a_byte_is_sent(proxy, monkeypatch, size):
    configure(monkeypatch, default_block_size=size)
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    refused = pytest.raises(ShardError, match=f"/object: parts of {size} bytes .default_block_size")
    with refused:
        store.write("object", b"x")
    with refused, store.durable("object"):
        pytest.fail("bytes would have been written")
    assert proxy.seen["requests"] == 0


def test_an_upload_that_ends_in_its_last_part_leaves_no_parts(in_parts, monkeypatch):
    store, unfinished = in_parts
    store.write("object", b"before")

    def no_answer(_):
        assert unfinished() == ["object"]
        raise OSError("no answer")

    monkeypatch.setattr("s3fs.core.S3File.commit", no_answer)
    with pytest.raises(OSError, match="no answer"), store.durable("object") as stream:
        stream.write(bytes(6 * MIB))
    assert unfinished() == []
    assert store.read("object") == b"before"


def test_parts_of_a_writer_that_was_killed_go_with_the_drafts(in_parts):
    store, unfinished = in_parts
    for folder in ("one", "one-more"):
        stream = store.child(folder).open("object", "wb")
        stream.write(bytes(6 * MIB))
        stream.closed = True  # its process is gone
    assert sorted(unfinished()) == ["one-more/object", "one/object"]
    store.child("one").remove_drafts()
    assert unfinished() == ["one-more/object"]
    assert store.ls() == []


def test_what_stays_is_not_asked_again(proxy):
    store = Store("s3://no-such-bucket/set")
    with pytest.raises(ShardError, match=r"no-such-bucket/set: .*there is no such bucket"):
        load_index(store)
    assert store.retries == 0


def test_settings_come_from_the_standard_places(s3_address, proxy, s3_set, monkeypatch, tmp_path):
    url = proxy.url
    profiles = tmp_path / "credentials"
    profiles.write_text(f"[team]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    configure(monkeypatch, endpoint_url=url)
    with pytest.raises(ShardError, match="Unable to locate credentials"):
        load_index(s3_set)
    configure(monkeypatch, endpoint_url=url, anon=True)
    assert load_index(s3_set).digest
    # A host name: the bucket must stay in the path.
    configure(monkeypatch, endpoint_url=url.replace("127.0.0.1", "localhost"), profile="team")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    assert load_index(s3_set).digest


def test_credentials_are_never_seen(proxy, s3_set, caplog, monkeypatch):
    proxy.weather = Weather(unavailable=0.5)
    with caplog.at_level(logging.DEBUG, logger="data_shards"):
        index = load_index(s3_set)
        monkeypatch.setattr(retry, "PATIENCE_S", 0.3)
        proxy.weather = Weather(unavailable=1.0)
        with pytest.raises(ShardError) as failure:
            fetch(index, [0, 1])
    assert "trying again" in caplog.text
    seen = f"{caplog.text}{failure.value}{index!r}{index.store!r}"
    for secret in (KEY, SECRET):
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
        assert secret not in seen


def test_what_a_url_hides_is_not_shown(s3_address):
    with FaultyProxy(s3_address) as proxy:
        store = Store(f"{proxy.url}/{BUCKET}/absent?token=hidden-word")
        with pytest.raises(OSError, match=r"/bucket/absent") as failure:
            store.read("index.json")
        assert "hidden-word" not in str(failure.value)


def test_two_servers_in_one_process(s3_address, proxy, s3_set):
    with FaultyProxy(s3_address) as other, s3_clients(other.url):
        assert load_index(s3_set).digest
        assert other.seen["requests"] > 3
