"""Files of the verifier, read as if an adversary had written them.

Nothing is written and nothing is extracted. Every size is checked before it is used, and whatever a
parser objects to becomes one line that names the file.
"""

import hashlib
import json
import math
from typing import Any, NoReturn

import fsspec
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from model.verifier.errors import DisagreementError, UnusableError, attempt, shown

Body = dict[str, Any]
Table = dict[str, npt.NDArray[Any]]

LARGEST_JSON = 1 << 26
LARGEST_TABLE = 1 << 32
_PIECE = 1 << 24
_ARROW = {
    "string": pa.types.is_string,
    "integer": pa.types.is_signed_integer,
    "number": pa.types.is_float64,
    "bool": pa.types.is_boolean,
}


def beside(folder: str, name: str) -> str:
    """URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def read_bytes(url: str, limit: int) -> bytes:
    """All bytes of a file that has no more than `limit`."""

    def read() -> bytes:
        data = bytearray()  # in pieces: a stream may reserve as much memory as it is asked for
        with fsspec.open(url, "rb") as stream:
            while piece := stream.read(min(_PIECE, limit + 1 - len(data))):
                data += piece
        return bytes(data)

    data = attempt(url, read)
    if len(data) > limit:
        raise UnusableError(f"{url} has more than {limit} bytes")
    return data


def sha256(data: bytes | memoryview) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def digest_of(body: Body, place: str) -> str:
    """sha256 of the canonical JSON text of all fields but `digest`."""
    content = {name: body[name] for name in body if name != "digest"}
    text = attempt(place, lambda: json.dumps(content, sort_keys=True, separators=(",", ":")))
    return sha256(text.encode())


def parse_object(data: bytes, place: str) -> dict[str, Any]:
    """A JSON object; doubled keys, NaN and infinities are refused: their meaning is not fixed."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        body = dict(items)
        if len(body) != len(items):
            raise ValueError("a key occurs twice")
        return body

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(text)

    body = attempt(
        place,
        lambda: json.loads(
            data, object_pairs_hook=pairs, parse_constant=constant, parse_float=number
        ),
    )
    if not isinstance(body, dict):
        raise UnusableError(f"{place} is not a JSON object")
    return body


def read_table(
    data: bytes, kinds: dict[str, str], place: str, *, surplus: bool = True
) -> dict[str, npt.NDArray[Any]]:
    """The named columns of a Parquet file, without empty cells.

    Args:
        data: the file.
        kinds: name to `string`, `integer` (signed), `number` (64 bit) or `bool`.
        place: for messages.
        surplus: whether there may be other columns.
    """
    # From a buffer and in one thread: Arrow's background clean-up can abort the interpreter's exit.
    file = attempt(place, lambda: pq.ParquetFile(pa.BufferReader(data), pre_buffer=False))
    groups = attempt(
        place, lambda: [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    )
    size = sum(group.total_byte_size for group in groups)
    if size > LARGEST_TABLE:
        raise UnusableError(f"{place} declares {size} bytes, more than {LARGEST_TABLE}")
    schema = attempt(place, lambda: file.schema_arrow)
    for name, kind in kinds.items():
        if schema.names.count(name) != 1:
            raise UnusableError(f"{place} has {schema.names.count(name)} columns {name}, not one")
        found = schema.field(name).type
        if not _ARROW[kind](found):
            raise UnusableError(f"{place}: column {name} is of type {found}, not {kind}")
    if not surplus and (unknown := sorted(set(schema.names) - kinds.keys())):
        raise DisagreementError(f"{place} has the unknown column {shown(unknown[0])}")
    table = attempt(place, lambda: file.read(columns=list(kinds), use_threads=False))
    for name in kinds:
        if empty := table.column(name).null_count:
            raise UnusableError(f"{place}: column {name} has {empty} empty cells")
    return {name: attempt(place, table.column(name).to_numpy) for name in kinds}
