"""What is known of one written shard; kept beside the set until the whole is finished.

A record is written after its shard, so one that is there stands for a shard that is there.
"""

import dataclasses
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import ShardError
from data_shards.untrusted.json_input import parse_object

_KEY = b"shard"
SOURCE_HASH = "source_xxh3_64"  # a column beside those of the index: digest of the archive's bytes


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """Rows and digest of a written shard."""

    rows: pa.Table
    """The columns of the index and `source_xxh3_64`, a row per stored image."""
    size: int
    """Bytes of the tar."""
    sha256: str
    left_out: list[tuple[int, str, str]]
    """(number, cause, message) of every image that cannot be stored."""

    def to_bytes(self) -> bytes:
        """Return one object that holds all of it."""
        fields = {"size": self.size, "sha256": self.sha256, "left_out": self.left_out}
        table = self.rows.replace_schema_metadata({_KEY: json.dumps(fields).encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardRecord":
        """Read what `to_bytes` returned.

        Raises:
            ShardError: something else.
        """
        try:
            file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
            table = file.read(use_threads=False)
            fields: dict[str, Any] = parse_object(
                table.schema.metadata[_KEY], "a record of a shard"
            )
            left_out = [(int(n), str(cause), str(text)) for n, cause, text in fields["left_out"]]
            return cls(table, int(fields["size"]), str(fields["sha256"]), left_out)
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"not a record of a written shard: {error}") from error
