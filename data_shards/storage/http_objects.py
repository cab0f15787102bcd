"""Objects of an HTTP server: sizes without a listing, and ranges that are what they say.

A server may answer a request for a range with the whole file (status 200), with another range or
with packed bytes (RFC 9110, sections 14 and 8.4). None of these is damage of the data.
"""

import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from data_shards.storage.retry import RangeRefusedError

_CHUNK = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_NO_HEAD = (400, 403, 405, 501)  # some servers know GET alone, or sign for it alone


def check_range(status: int, content_range: str, length: int | None, start: int, stop: int) -> None:
    """Check that an answer to a request for bytes [start, stop) has them from `start` on.

    Args:
        status: HTTP status, 200 or 206.
        content_range: That header, "" where it is missing.
        length: Bytes of the body as announced, None if unknown.
        start: First byte asked for.
        stop: One past the last.

    Raises:
        RangeRefusedError: it has other bytes, or more.
    """
    asked = f"bytes {start} to {stop - 1}"
    if status == 200 and not content_range:
        if start == 0 and length is not None and length <= stop:
            return  # the whole object, which was asked for
        raise RangeRefusedError(
            f"the server ignores Range: asked for {asked} it sent the whole object; shards are "
            "read by ranges, which this server must allow"
        )
    found = _CONTENT_RANGE.fullmatch(content_range)
    if not found or int(found[1]) != start or int(found[2]) >= stop:
        raise RangeRefusedError(
            f"the server sent another range: asked for {asked}, Content-Range is {content_range!r}"
        )


async def http_chunks(filesystem: Any, url: str, start: int, stop: int) -> AsyncIterator[bytes]:
    """Yield bytes [start, stop) of an object in pieces, fewer at its end.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: it may not be read.
        RangeRefusedError: the server sends other bytes than it was asked for.
        OSError: an answer without a body.
    """
    async with await _request(filesystem, "GET", url, {"Range": f"bytes={start}-{stop - 1}"}) as r:
        if r.status == 416:
            return
        _raise_for_status(r, url)
        if r.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise RangeRefusedError(
                f"the server sends the bytes packed ({r.headers['Content-Encoding']}), though "
                "asked for them as they are"
            )
        check_range(r.status, r.headers.get("Content-Range", ""), r.content_length, start, stop)
        empty = True
        async for piece in r.content.iter_chunked(_CHUNK):
            empty = False
            yield piece
        if empty and r.status == 206:
            raise OSError(f"an empty body for bytes {start} to {stop - 1}")


async def http_size(filesystem: Any, url: str) -> int:
    """Return the size of an object by HEAD, or by a request for its first byte.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: it may not be read.
        RangeRefusedError: the server does not tell.
    """
    async with await _request(filesystem, "HEAD", url, {}) as r:
        if r.status not in _NO_HEAD:
            _raise_for_status(r, url)
            packed = r.headers.get("Content-Encoding", "identity") not in ("", "identity")
            if "Content-Length" in r.headers and not packed:
                return int(r.headers["Content-Length"])
    async with await _request(filesystem, "GET", url, {"Range": "bytes=0-0"}) as r:
        if r.status == 416:
            return 0
        _raise_for_status(r, url)
        found = _CONTENT_RANGE.fullmatch(r.headers.get("Content-Range", ""))
        if not found or found[3] == "*":
            raise RangeRefusedError(
                "the server tells no size: HEAD has no Content-Length, and a range no total"
            )
        return int(found[3])


async def _request(filesystem: Any, method: str, url: str, headers: Mapping[str, str]) -> Any:
    options = dict(filesystem.kwargs)
    sent = {**options.pop("headers", {}), **headers, "Accept-Encoding": "identity"}
    session = await filesystem.set_session()
    options.setdefault("allow_redirects", True)
    return session.request(method, filesystem.encode_url(url), headers=sent, **options)


def _raise_for_status(response: Any, url: str) -> None:
    if response.status in (404, 410):
        raise FileNotFoundError(url)
    if response.status in (401, 403, 407):
        raise PermissionError(f"{response.status} {response.reason}")
    response.raise_for_status()
