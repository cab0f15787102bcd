"""Parquet from outside: what a file declares is held to the limits before its columns are read."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.untrusted.limits import UntrustedError, limits, require

_LEAST, _PER_ROW = 1 << 20, 1 << 9
"""Bytes of a file's own description, and of the numbers and digests of a row."""


def require_rows(size: int, rows: int, place: object) -> None:
    """Refuse a file of more bytes than so many rows with one text each can take.

    Args:
        size: bytes of the file.
        rows: how many it has to have.
        place: where it lies, for messages.

    Raises:
        UntrustedError: it is larger; it need not be read.
    """
    most = _LEAST + rows * (limits().name_bytes + _PER_ROW)
    if size > most:
        raise UntrustedError(f"{place} has {size:,} bytes; {rows:,} rows take at most {most:,}")


def open_parquet(data: bytes, place: object) -> pq.ParquetFile:
    """A Parquet file of which no row group takes more than its limit.

    Texts are read as dictionaries: a file of a few bytes may repeat one text for ever.

    Args:
        data: the file.
        place: where it comes from, for messages.

    Raises:
        UntrustedError: no Parquet file, or a row group over the limit.
    """
    buffer = pa.BufferReader(data)
    try:
        schema = pq.read_schema(buffer)
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        buffer.seek(0)
        # Not `read_table` of a Python file: its background clean-up can abort the interpreter's
        # exit (apache/arrow 34314, 33975).
        file = pq.ParquetFile(buffer, pre_buffer=False, read_dictionary=texts)
        sizes = _sizes(file)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UntrustedError(f"{place} is damaged: {error}") from error
    require(max(sizes, default=0), "row_group_bytes", f"a row group of {place} takes")
    return file


def _sizes(file: pq.ParquetFile) -> list[int]:
    """Bytes of every row group, uncompressed; a text is an entry of a dictionary."""
    bits = sum(field.type.bit_width for field in file.schema_arrow)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    return [max(group.total_byte_size, group.num_rows * bits // 8) for group in groups]


def read_column(file: pq.ParquetFile, name: str, place: object) -> pa.ChunkedArray:
    """One column; a text in it is at most as long as a name, and stands in a dictionary.

    Raises:
        UntrustedError: damaged, or a text over the limit.
    """
    try:
        column = file.read(columns=[name], use_threads=False).column(0)
        texts = column.chunks if pa.types.is_dictionary(column.type) else []
        lengths = [pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in texts]
    except (pa.ArrowException, OSError) as error:
        raise UntrustedError(f"{place} is damaged: {error}") from error
    require(max(lengths, default=0), "name_bytes", f"{place} has in {name} a text of")
    return column


def read_table(data: bytes, place: object, names: Sequence[str] | None = None) -> pa.Table:
    """All columns of a Parquet file, or those of the names, texts as plain texts.

    Raises:
        UntrustedError: see `open_parquet` and `read_column`, a name that it lacks, or more of all
            than a table may take.
    """
    file = open_parquet(data, place)
    taken = sum(_sizes(file))
    require(taken, "table_bytes", f"{place} takes")
    wanted = file.schema_arrow.names if names is None else names
    if lacking := sorted(set(wanted) - set(file.schema_arrow.names)):
        raise UntrustedError(f"{place} lacks the columns {', '.join(lacking)}")
    columns = {}
    for name in wanted:
        column = read_column(file, name, place)
        if pa.types.is_dictionary(column.type):
            taken += sum(_written_out(chunk) for chunk in column.chunks)
            require(taken, "table_bytes", f"{place} takes")
            column = column.cast(pa.string())
        columns[name] = column
    return pa.table(columns)


def _written_out(texts: pa.DictionaryArray) -> int:
    lengths = pc.binary_length(texts.dictionary)
    return int(pc.sum(lengths.take(texts.indices)).as_py() or 0)
