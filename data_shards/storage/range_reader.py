"""Byte ranges of objects, many in flight, each resumed where its connection broke."""

import asyncio
import itertools
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from data_shards.storage.http_objects import check_range, http_chunks
from data_shards.storage.retry import Describe, RangeRefusedError, RetryBudget, RetryCount

IN_FLIGHT = 32
"""Requests under way at the same time, per process."""
_CHUNK = 1 << 18
# A connection slower than this is dropped: another one may lead to a healthy server.
_SLOWEST = 1 << 18  # bytes per second

Chunks = Callable[[str, int, int], AsyncIterator[bytes]]
"""(path, start, stop) -> the bytes [start, stop) of an object in pieces, fewer at its end."""


def read_local_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Return bytes [start, stop) of each (path, start, stop) of local files; fewer at their end.

    A file is opened once for all ranges that follow each other: images of a small set are read one
    by one, and opening takes longer than reading.

    Raises:
        FileNotFoundError: a file does not exist.
        OSError: it cannot be read, or is a device or a pipe.
    """
    found = []
    for path, wanted in itertools.groupby(ranges, key=lambda part: part[0]):
        # Without waiting: a pipe that nobody writes into would never open.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            kind = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise OSError(f"{path} is a device or a pipe, not a file")
            found += [_read_local(descriptor, start, stop) for _, start, stop in wanted]
        finally:
            os.close(descriptor)
    return found


def _read_local(descriptor: int, start: int, stop: int) -> bytes:
    parts: list[bytes] = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)  # one call reads 2 GiB at most
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def read_ranges(
    chunks: Chunks,
    ranges: Sequence[tuple[str, int, int]],
    *,
    describe: Describe,
    count: RetryCount,
    stall_s: float,
) -> list[bytes]:
    """Return bytes [start, stop) of each (path, start, stop); fewer where an object ends.

    Args:
        chunks: How a store delivers one range.
        ranges: What to read.
        describe: Returns an error as a text for the log.
        count: Where repetitions are counted.
        stall_s: Seconds that a connection may take beyond the slowest rate.

    Raises:
        Exception: the last error of a range that could not be read.
    """
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def read(path: str, start: int, stop: int) -> bytes:
        async with slots:
            patience = RetryBudget(describe, count)
            return await _read_range(chunks, path, start, stop, patience, count, stall_s)

    tasks = [asyncio.ensure_future(read(*wanted)) for wanted in ranges]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _read_range(
    chunks: Chunks,
    path: str,
    start: int,
    stop: int,
    patience: RetryBudget,
    count: RetryCount,
    stall_s: float,
) -> bytes:
    """Read one range; what arrived before a fault is kept, the rest is asked for again."""
    parts: list[bytes] = []
    begin = start
    while begin < stop:
        seen = len(parts)
        try:
            limit = stall_s + (stop - begin) / _SLOWEST
            pieces = chunks(path, begin, stop)
            await asyncio.wait_for(_collect(pieces, stop - begin, parts), limit)
            if len(parts) == seen:
                break  # the object ends here
        except Exception as error:
            failure: Exception | None = error
        else:
            failure = None
        arrived = sum(map(len, parts[seen:]))
        begin += arrived
        if arrived:
            patience.progress()
        if failure is not None:
            await asyncio.sleep(patience.pause(failure))
        elif begin < stop:
            count.add()  # a body that ended early without an error
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _collect(pieces: AsyncIterator[bytes], most: int, parts: list[bytes]) -> None:
    """Append what arrives, one by one: an error loses nothing that came."""
    left = most
    async for piece in pieces:
        left -= len(piece)
        if left < 0:  # a body may have no end
            raise RangeRefusedError(f"the server sends more than the {most} bytes asked for")
        if piece:
            parts.append(piece)


def chunks_of(filesystem: Any) -> Chunks:
    """Return how an asynchronous fsspec filesystem delivers a range."""

    async def from_s3(path: str, start: int, stop: int) -> AsyncIterator[bytes]:
        bucket, key, version = filesystem.split_path(path)
        options = {"VersionId": version} if version else {}
        try:
            response = await filesystem._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **options
            )
        except OSError as error:
            if _status(error) == 416:
                return
            raise
        body = response["Body"]
        try:
            status = response["ResponseMetadata"]["HTTPStatusCode"]
            length = response.get("ContentLength")
            check_range(status, response.get("ContentRange", ""), length, start, stop)
            while piece := await body.read(_CHUNK):
                yield piece
        finally:
            body.close()

    async def from_http(path: str, start: int, stop: int) -> AsyncIterator[bytes]:
        async for piece in http_chunks(filesystem, path, start, stop):
            yield piece

    async def from_any(path: str, start: int, stop: int) -> AsyncIterator[bytes]:
        yield await filesystem._cat_file(path, start=start, end=stop)

    if hasattr(filesystem, "_call_s3"):
        return from_s3
    return from_http if hasattr(filesystem, "encode_url") else from_any


def _status(error: OSError) -> int:
    response = getattr(error.__cause__, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
