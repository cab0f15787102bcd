"""Limits of what comes from outside: one table, each raised by an environment variable.

Whoever reads a file, an answer of a server or an archive compares its size with these before it
takes the memory. The verifier (`model/verifier/`) shares no code with the rest and has its own.
"""

import dataclasses
import os

PREFIX = "CERTIFIED_PRETRAIN_LIMIT_"
"""A limit `json_bytes` is raised by the variable CERTIFIED_PRETRAIN_LIMIT_JSON_BYTES."""


class UntrustedError(ValueError):
    """What came from outside is larger than its limit, or is not what it has to be."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Largest sizes that are taken from outside."""

    name_bytes: int = 1 << 10
    """A key, a name of a tensor, or of a member of an archive, in UTF-8."""
    json_bytes: int = 16 << 20
    """A JSON file, a line of JSON, or the header of a safetensors file."""
    json_depth: int = 64
    """Levels of a JSON text."""
    row_group_bytes: int = 64 << 20
    """A row group of a Parquet file, uncompressed."""
    table_bytes: int = 1 << 30
    """The samples of an evaluation: their Parquet file, and all of its row groups, uncompressed."""
    image_bytes: int = 256 << 20
    """An encoded image."""
    image_pixels: int = 200_000_000
    """Height times width of an image."""
    image_scanned_pixels: int = 1 << 29
    """Pixels times scans of a JPEG: a decoder goes through all pixels once per scan, in some
    seconds. Usual progressive files have ten scans; a small file may state thousands."""
    answer_bytes: int = 64 << 20
    """An answer of the tracking server, or a file that it holds, uncompressed."""


def limits() -> Limits:
    """The limits, as the environment of this process has them.

    Raises:
        UntrustedError: a variable that is no positive whole number.
    """
    return Limits(**{field.name: _allowed(field.name) for field in dataclasses.fields(Limits)})


def require(value: int, limit: str, what: str) -> None:
    """Refuse a size that is over its limit.

    Args:
        value: the size.
        limit: name of a field of `Limits`.
        what: of which it is the size, for the message: "DIR/index.json has".

    Raises:
        UntrustedError: it is larger; the message has both and says what raises the limit.
    """
    allowed = _allowed(limit)
    if value > allowed:
        unit = {"depth": "levels"}.get(unit := limit.rpartition("_")[2], unit)
        raise UntrustedError(
            f"{what} {value:,} {unit}, the limit is {allowed:,} ({PREFIX}{limit.upper()} raises it)"
        )


def _allowed(limit: str) -> int:
    variable = PREFIX + limit.upper()
    text = os.environ.get(variable)
    if text is None:
        return int(getattr(Limits, limit))
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UntrustedError(f"{variable}={text!r} is not a positive whole number")
    return int(text)


def require_name(name: str | bytes, what: str) -> None:
    """Refuse a key or name that is too long, which would else be repeated in every message.

    Args:
        name: the name.
        what: what it names and where, for the message.

    Raises:
        UntrustedError: it is over the limit.
    """
    size = len(name if isinstance(name, bytes) else name.encode("utf-8", "surrogatepass"))
    require(size, "name_bytes", f"{what} has a name of")
