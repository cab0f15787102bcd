"""JSON from outside: the one place that parses it, and the text that its digests are of."""

import json
from typing import IO, Any

from data_shards.untrusted.limits import UntrustedError, limits, require

_PIECE = 1 << 20


def parse_json(data: bytes | str, place: object) -> Any:
    """The value of a JSON text.

    Args:
        data: the text, UTF-8.
        place: where it comes from, for messages.

    Raises:
        UntrustedError: larger or deeper than the limits, or no JSON.
    """
    size = len(data) if isinstance(data, bytes) else len(data.encode("utf-8", "surrogatepass"))
    require(size, "json_bytes", f"{place} has")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UntrustedError(f"{place} is damaged: {error}") from error
    _require_depth(value, place)
    return value


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no blanks: equal values have one text.

    Raises:
        ValueError: a number that JSON has no text for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_object(data: bytes | str, place: object) -> dict[str, Any]:
    """As `parse_json`, for a text that has to be an object.

    Raises:
        UntrustedError: see `parse_json`, or something else than an object.
    """
    value = parse_json(data, place)
    if not isinstance(value, dict):
        raise UntrustedError(f"{place} is damaged: {type(value).__name__}, not a JSON object")
    return value


def read_object(stream: IO[bytes], place: object) -> dict[str, Any]:
    """As `parse_object`, of all that a stream holds; no more than the limit is read.

    Raises:
        UntrustedError: see `parse_object`.
    """
    limit, data = limits().json_bytes, bytearray()
    # In pieces: a stream may reserve as much memory as it is asked for.
    while piece := stream.read(min(_PIECE, limit + 1 - len(data))):
        data += piece
    return parse_object(bytes(data), place)


def _require_depth(value: Any, place: object) -> None:
    """Refuse what is nested deeper than the limit: whoever walks it may recurse."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        require(depth, "json_depth", f"{place} has JSON of at least")
        level = [
            child for part in level for child in (part.values() if isinstance(part, dict) else part)
        ]
