import asyncio
import errno

import aiohttp
import pytest
from botocore.exceptions import (
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
)

from data_shards.errors import ShardError
from data_shards.storage import retry
from data_shards.storage.range_reader import read_ranges
from data_shards.storage.retry import RetryBudget, RetryCount, is_transient, with_retries

URL = {"endpoint_url": "http://127.0.0.1"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBUSY, "SlowDown"),
        OSError(errno.EIO, "InternalError"),
        ConnectionResetError("reset"),
        TimeoutError("stalled"),
        asyncio.TimeoutError(),
        aiohttp.ClientPayloadError("short"),
        aiohttp.ServerDisconnectedError(),
        ReadTimeoutError(**URL),
        EndpointConnectionError(**URL),
        asyncio.IncompleteReadError(b"", 5),
    ],
)
def test_faults_that_pass(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("denied"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EINVAL, "InvalidRequest"),
        NoCredentialsError(),
        ShardError("wrong"),
        TypeError("bug"),
    ],
)
def test_faults_that_stay(error):
    assert not is_transient(error)
    count = RetryCount()
    with pytest.raises(type(error)):
        RetryBudget(str, count).pause(error)
    assert count.value == 0


def test_pauses_grow_up_to_a_limit_and_differ():
    patience, count = RetryBudget(str, RetryCount()), 12
    pauses = [patience.pause(OSError("x")) for _ in range(count)]
    for attempt, pause in enumerate(pauses):
        longest = min(0.1 * 2**attempt, 10)
        assert longest / 2 <= pause <= longest
    others = RetryBudget(str, RetryCount())
    assert [others.pause(OSError("x")) for _ in range(count)] != pauses
    patience.progress()
    assert patience.pause(OSError("x")) <= 0.1


def test_patience_ends(monkeypatch, caplog):
    monkeypatch.setattr(retry, "PATIENCE_S", 0.3)
    count, tries = RetryCount(), []

    def broken():
        tries.append(1)
        raise OSError(errno.EBUSY, "busy")

    with pytest.raises(OSError, match="busy"):
        with_retries(broken, lambda error: f"a store: {error}", count)
    assert count.value == len(tries) - 1 >= 2
    assert [r.getMessage() for r in caplog.records] == ["a store: [Errno 16] busy; trying again"]


def deliver(pieces):
    """Chunks of b"0123456789" that break after each of the given numbers of bytes."""
    asked = []
    pieces = iter(pieces)

    async def chunks(path, start, stop):
        asked.append((start, stop))
        size = next(pieces)
        yield b"0123456789"[start : min(stop, start + abs(size))]
        if size <= 0:
            raise ConnectionResetError("reset")

    return chunks, asked


def read(chunks, stop):
    count = RetryCount()
    done = read_ranges(chunks, [("x", 1, stop)], describe=str, count=count, stall_s=5)
    return asyncio.run(done)[0], count.value


def test_a_range_goes_on_where_it_broke(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    chunks, asked = deliver([-3, 0, -2, 9])
    assert read(chunks, 9) == (b"12345678", 3)
    assert asked == [(1, 9), (4, 9), (4, 9), (6, 9)]


def test_a_short_body_without_an_error_is_asked_for_the_rest():
    chunks, asked = deliver([4, 4, 4])
    assert read(chunks, 9) == (b"12345678", 1)
    assert asked == [(1, 9), (5, 9)]


def test_a_range_over_the_end_of_an_object():
    chunks, asked = deliver([20, 20])
    assert read(chunks, 15)[0] == b"123456789"
    assert asked == [(1, 15), (10, 15)]
