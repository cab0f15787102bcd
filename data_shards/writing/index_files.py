"""The files of a finished index: rows, report and, as the last one, the header."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_shards.errors import ShardError
from data_shards.format.shard_index import (
    HEADER_FILE,
    ROWS_FILE,
    SCHEMA_VERSION,
    Header,
    Shard,
    count_splits,
    header_to_json,
    rows_to_parquet,
)
from data_shards.sources.base import Source
from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError, require, require_name
from data_shards.writing.write_report import REPORT_FILE, report, report_to_json

MAX_CLASSES = 1 << 20
"""Most classes of a set whose labels are numbers, of which the largest says how many there are."""


def write_index(
    store: Store,
    source: Source,
    tables: Sequence[pa.Table],
    shards: Sequence[Shard],
    *,
    generator: Mapping[str, Any],
    left_out: Sequence[tuple[int, str, str]],
    duplicates: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    dropped: bool,
) -> None:
    """Write the index of a set whose shards lie there already.

    Args:
        store: Where the index lies.
        source: The images.
        tables: Rows of every shard, with the same columns.
        shards: The shards, in the order of `tables`.
        generator: Settings that made the set.
        left_out: See `report`.
        duplicates: See `report`.
        dropped: See `report`.

    Raises:
        ShardError: header or report hold more than a reader takes; nothing is written then.
    """
    table = pa.concat_tables(tables)
    rows = rows_to_parquet({name: table[name] for name in table.column_names})
    header = Header(
        schema_version=SCHEMA_VERSION,
        name=source.name,
        image_shape=source.image_shape,
        train_shape=source.image_shape if source.uniform else None,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        splits=count_splits(
            np.asarray(table["split"].to_numpy() == "train"), table["validation"].to_numpy()
        ),
        shards=tuple(shards),
        rows_sha256=hashlib.sha256(rows).hexdigest(),
        generator=dict(generator),
    )
    content = report_to_json(report(source, len(table), left_out, duplicates, dropped))
    last = header_to_json(header)
    try:  # before a reader refuses what took hours
        for name in (header.name, *header.class_names):
            require_name(name, f"{store}/{HEADER_FILE}")
        for file, data in ((REPORT_FILE, content), (HEADER_FILE, last)):
            require(len(data), "json_bytes", f"{store}/{file} would have")
    except UntrustedError as error:
        raise ShardError(str(error)) from error
    store.write(ROWS_FILE, rows)
    store.write(REPORT_FILE, content)
    store.write(HEADER_FILE, last)
