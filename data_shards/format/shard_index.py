"""The index of a shard set: what is in it, where every image lies, and what each must hash to.

A set is a directory of tar shards (`train-00000.tar`, `test-00000.tar`, ...) with two more files:
`index.parquet` has one row per sample in stored order, `index.json` is the header. The header is
written last: a directory without one is not a shard set.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic import ConfigDict, Field

from data_shards.errors import ShardError
from data_shards.format.image_pixels import EXTENSIONS
from data_shards.format.shard_files import ShardFiles
from data_shards.format.tar import BLOCK
from data_shards.storage.store import Store
from data_shards.untrusted.json_input import canonical_json
from data_shards.untrusted.limits import UntrustedError, limits, require_name

_logger = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 2
HEADER_FILE = "index.json"
ROWS_FILE = "index.parquet"
STORED_SPLITS = ("train", "test")
SPLITS = (*STORED_SPLITS, "fit", "validation")

SplitName = Literal["train", "test", "fit", "validation"]

_COLUMNS = {
    "split": "string",
    "validation": "bool",
    "shard": "int32",
    "key": "string",
    "offset": "int64",
    "size": "int64",
    "extension": "string",
    "xxh3_64": "uint64",
    "label": "int32",
}
"""Arrow types of the columns of a row."""
_ROWS_PER_GROUP = 1 << 15  # with keys as long as they may be, half of the limit of a row group
_SMALLEST_SAMPLE = 2 * BLOCK  # its header and its body in a tar
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: multiplication spreads the bits
_STRICT = ConfigDict(extra="forbid")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)
class Shard:
    """One tar file of a set."""

    number: int = Field(ge=0)
    """Place in the header's list; the `shard` column of the rows."""
    file: str = Field(pattern=r"^(train|test)-[0-9]{5,}\.tar$")
    split: Literal["train", "test"]
    samples: int = Field(ge=1)
    size: int = Field(ge=1)
    """Bytes of the tar file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    source: str | None = Field(default=None, pattern=r"^[^/].*\.tar$")
    """Where a shard lies that another program wrote: a name relative to the set, or a URL. Such a
    shard is read, never written; None = `file`, beside the index."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)
class Header:
    """The content of `index.json`, apart from its digest."""

    schema_version: Literal[2]
    name: str
    image_shape: tuple[int, int, int]
    """(C, H, W) that a network sees, and of every stored image of the test split."""
    train_shape: tuple[int, int, int] | None
    """(C, H, W) of every stored image of the train split: `image_shape`, or None where they differ
    in shape and the stream crops them to `image_shape`."""
    num_classes: int = Field(ge=1)
    class_names: tuple[str, ...]
    splits: dict[SplitName, int]
    shards: tuple[Shard, ...]
    rows_sha256: str
    """sha256 of `index.parquet`."""
    generator: dict[str, Any]
    """Name and parameters of the source."""

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON text; it covers every byte of the set."""
        return hashlib.sha256(canonical_json(_header_dict(self))).hexdigest()


@dataclasses.dataclass(frozen=True)
class Rows:
    """One array per column, one entry per sample in stored order (shard, offset)."""

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    xxh3_64: npt.NDArray[np.uint64]
    label: npt.NDArray[np.int32]
    validation: npt.NDArray[np.bool_]
    extension: npt.NDArray[np.bytes_]
    key: npt.NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, chosen: slice | npt.NDArray[np.int64]) -> "Rows":
        """Return some of the rows."""
        columns = dataclasses.fields(self)
        return Rows(**{column.name: getattr(self, column.name)[chosen] for column in columns})


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """A checked shard set: header, rows and the store that holds its files."""

    store: Store
    header: Header
    rows: Rows
    digest: str

    @functools.cached_property
    def files(self) -> ShardFiles:
        """The shards' files, by the name that the header gives them."""
        return shard_files(self.store, self.header)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) that a network sees, and of every stored image of the test split."""
        return self.header.image_shape

    @property
    def train_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of every stored image of the train split; None if they differ in shape."""
        return self.header.train_shape

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are below it."""
        return self.header.num_classes

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, in stored order."""
        return self.header.shards

    def select(self, split: str) -> npt.NDArray[np.int64]:
        """Return the row numbers of a split, in stored order.

        "fit" and "validation" partition "train".

        Raises:
            ShardError: unknown or empty split.
        """
        if split not in SPLITS:
            raise ShardError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        stored = "test" if split == "test" else "train"
        chosen = np.array([shard.split == stored for shard in self.shards])[self.rows.shard]
        if split in ("fit", "validation"):
            chosen &= self.rows.validation == (split == "validation")
        if not chosen.any():
            raise ShardError(f"split {split!r} of shard set {self.store} has no samples")
        return np.flatnonzero(chosen)

    def stored_shape(self, split: str) -> tuple[int, int, int] | None:
        """Return (C, H, W) of every stored image of a split; None if they differ in shape."""
        return self.image_shape if split == "test" else self.train_shape

    def shards_of(self, split: str) -> list[Shard]:
        """Return the shards that hold samples of a split, in stored order."""
        return [self.shards[number] for number in np.unique(self.rows.shard[self.select(split)])]

    def rows_of(self, shard: Shard, split: str | None = None) -> npt.NDArray[np.int64]:
        """Return the row numbers of one shard, in stored order.

        Args:
            shard: One of the set's.
            split: Only those of this split; None = all.

        Raises:
            ShardError: unknown split, or a shard of another set.
        """
        if split not in (None, *SPLITS):
            raise ShardError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        if self.shards[shard.number : shard.number + 1] != (shard,):
            raise ShardError(f"{shard.file} is not number {shard.number} of shard set {self.store}")
        # The rows are in the order of their shards: nothing is looked for among those of others.
        rows = np.arange(*np.searchsorted(self.rows.shard, (shard.number, shard.number + 1)))
        if split in ("fit", "validation") and shard.split == "train":
            return rows[self.rows.validation[rows] == (split == "validation")]
        return rows if split in (None, shard.split) else rows[:0]

    def part(self, split: str, shard: Shard) -> "ShardIndex":
        """Return the set with the samples of a split in one shard alone: small enough to send.

        That shard becomes its only one, number 0.

        Raises:
            ShardError: unknown split, or a shard of another set.
        """
        rows = self.rows.take(self.rows_of(shard, split))
        rows = dataclasses.replace(rows, shard=np.zeros_like(rows.shard))
        header = dataclasses.replace(self.header, shards=(dataclasses.replace(shard, number=0),))
        return dataclasses.replace(self, header=header, rows=rows)

    def require(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        """Check that a network of this input and output fits the set.

        Raises:
            ShardError: it does not; the message has both.
        """
        if self.image_shape != tuple(input_shape) or self.num_classes != num_classes:
            ours, theirs = ("x".join(map(str, s)) for s in (self.image_shape, input_shape))
            raise ShardError(
                f"shard set {self.store} has images {ours} (channels x height x width) in "
                f"{self.num_classes} classes, the network takes {theirs} in {num_classes} classes"
            )

    def describe(self, row: int) -> str:
        """Return where a sample lies, for messages."""
        file = self.files.describe(self.shards[self.rows.shard[row]].file)
        return f"sample {self.rows.key[row].decode()!r} of shard {file}"


def named_classes(header: Header) -> tuple[str, ...]:
    """Return the names of all classes; empty where they have none, or not one each."""
    names = header.class_names
    return names if len(names) == header.num_classes else ()


def split_counts(header: Header) -> str:
    """Return the number of samples of every split as a text: "240 train, 60 test"."""
    return ", ".join(f"{count} {split}" for split, count in header.splits.items())


def shard_files(store: Store, header: Header) -> ShardFiles:
    """Return the files of the shards that a header lists."""
    return ShardFiles(store, {shard.file: shard.source for shard in header.shards})


def rows_to_parquet(columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]]) -> bytes:
    """Return the bytes of `index.parquet`.

    Args:
        columns: The columns of a row (split, validation, shard, key, offset, size, extension,
            xxh3_64, label), all of one length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(columns[name], kind) for name, kind in _COLUMNS.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    return bytes(sink.getvalue())


def header_to_json(header: Header) -> bytes:
    """Return the bytes of `index.json`: the header and its digest."""
    fields = {**_header_dict(header), "digest": header.digest()}
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def load_header(store: Store) -> Header:
    """Read and check `index.json`.

    Raises:
        ShardError: no shard set there, or a header that is malformed or was changed.
    """
    try:
        fields = store.read_object(HEADER_FILE)
        stated = fields.pop("digest")
        version = fields["schema_version"]
    except FileNotFoundError as error:
        raise ShardError(
            f"no shard set at {store}: there is no {HEADER_FILE}; python -m data_shards.write "
            "makes one, of a folder of images as well"
        ) from error
    except OSError as error:
        raise ShardError(f"cannot read the index of a shard set: {error}") from error
    except UntrustedError as error:
        raise ShardError(f"not a shard set header: {error}") from error
    except KeyError as error:
        raise ShardError(f"{store}/{HEADER_FILE} is not a shard set header: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{store}/{HEADER_FILE} has schema version {version!r}, this program reads "
            f"{SCHEMA_VERSION}"
        )
    try:
        header = pydantic.TypeAdapter(Header).validate_python(fields)
        for name in (header.name, *header.class_names):
            require_name(name, f"{store}/{HEADER_FILE}")
    except UntrustedError as error:
        raise ShardError(str(error)) from error
    except pydantic.ValidationError as error:
        raise ShardError(f"{store}/{HEADER_FILE} is not a shard set header: {error}") from error
    if header.digest() != stated:
        raise ShardError(
            f"{store}/{HEADER_FILE} was changed: it states digest {stated}, its content has "
            f"{header.digest()}"
        )
    return header


def load_index(url: str | Store, *, check_files: bool = True) -> ShardIndex:
    """Read the index of a shard set and check it against the files' sizes.

    Contents of shards are not read here: every sample is checked when it is.

    Args:
        url: Directory of the set.
        check_files: Compare the sizes of the files; without it the index alone is checked.

    Raises:
        ShardError: missing, empty, changed or inconsistent set; the message has the URL, the
            shard, the value and what it should be.
    """
    parquet = _parquet_reader()
    store = url if isinstance(url, Store) else Store(url)
    header = load_header(store)
    if not header.shards:
        raise ShardError(f"shard set {store} is empty: its header lists no shards")
    shape = header.train_shape
    if shape is not None and shape != header.image_shape:
        raise ShardError(
            f"{store}/{HEADER_FILE} has train_shape {shape}, which is neither its image_shape "
            f"{header.image_shape} nor null"
        )
    try:
        if check_files:
            _check_files(store, header)
        samples = sum(shard.samples for shard in header.shards)
        parquet.require_rows(store.size(ROWS_FILE), samples, f"{store}/{ROWS_FILE}")
        data = store.read(ROWS_FILE)
    except FileNotFoundError as error:
        raise ShardError(f"shard set {store} has no {ROWS_FILE}") from error
    except UntrustedError as error:
        raise ShardError(str(error)) from error
    except OSError as error:
        raise ShardError(f"cannot read the index of a shard set: {error}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != header.rows_sha256:
        raise ShardError(
            f"{store}/{ROWS_FILE} has sha256 {found}, the header states {header.rows_sha256}"
        )
    try:
        rows, splits = _read_rows(parquet, store, data, samples)
    except UntrustedError as error:
        raise ShardError(str(error)) from error
    _check_rows(store, header, rows, splits)
    return ShardIndex(store, header, rows, header.digest())


def _parquet_reader() -> ModuleType:
    """Import what reads Parquet: late, because pyarrow is larger than all that streaming needs.

    Raises:
        ShardError: it is not installed.
    """
    try:
        from data_shards.untrusted import parquet
    except ImportError as error:
        raise ShardError(
            f"the index of a shard set is a Parquet file, and {error.name} is not installed; only "
            "a training that reads tars without an index (data.unindexed_samples) does without it"
        ) from error
    return parquet


def _header_dict(header: Header) -> dict[str, Any]:
    fields: dict[str, Any] = pydantic.TypeAdapter(Header).dump_python(header, mode="json")
    for shard in fields["shards"]:
        if shard["source"] is None:  # as in sets that were written before there was one
            del shard["source"]
    return fields


def _read_rows(
    parquet: ModuleType, store: Store, data: bytes, samples: int
) -> tuple[Rows, npt.NDArray[np.bytes_]]:
    import pyarrow as pa

    place = f"{store}/{ROWS_FILE}"
    file = parquet.open_parquet(data, place)
    missing = set(_COLUMNS) - set(file.schema_arrow.names)
    if missing:
        raise ShardError(f"{store}/{ROWS_FILE} lacks the columns {', '.join(sorted(missing))}")
    if file.metadata.num_rows != samples or not samples:
        raise ShardError(
            f"{place} has {file.metadata.num_rows} rows, the header states {samples} samples"
        )

    def read(name: str) -> npt.NDArray[Any]:  # one by one: Arrow's copy is gone before the next
        column = parquet.read_column(file, name, place)
        if column.null_count:
            raise ShardError(f"{place} has {column.null_count} empty cells in {name}")
        if pa.types.is_dictionary(column.type):
            return np.concatenate([_fixed_width(chunk) for chunk in column.chunks])
        return np.array(column.to_numpy())  # a copy: the pool below can let go of its own

    columns = {field.name: read(field.name) for field in dataclasses.fields(Rows)}
    splits = read("split")
    pa.default_memory_pool().release_unused()  # it would keep twice the size of the columns
    return Rows(**columns), splits


def _fixed_width(column: Any) -> npt.NDArray[np.bytes_]:
    """Return a dictionary of texts as NumPy bytes; a Python object per key would cost ten times."""
    texts = column.dictionary
    first, count = texts.offset, len(texts)
    ends = np.frombuffer(texts.buffers()[1], dtype=np.int32)[first : first + count + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", dtype=np.uint8)
    lengths = np.diff(ends)
    width = max(1, int(lengths.max(initial=1)))
    if (lengths == width).all():
        whole = data[ends[0] : ends[-1]].copy()
    else:
        whole = np.zeros(count * width, dtype=np.uint8)
        # Byte j of the data goes to its text's place plus its distance from the text's beginning.
        shift = np.repeat(np.arange(count, dtype=np.int64) * width - ends[:-1], lengths)
        whole[np.arange(ends[0], ends[-1]) + shift] = data[ends[0] : ends[-1]]
    return whole.view(f"S{width}")[column.indices.to_numpy()]


def _check_files(store: Store, header: Header) -> None:
    files = shard_files(store, header)
    sizes, extra = files.survey()
    if extra:
        _logger.warning("%s: %s not listed in the index, not read", store, ", ".join(extra))
    for number, shard in enumerate(header.shards):
        where = files.describe(shard.file)
        if shard.number != number:
            raise ShardError(f"{where} is number {shard.number} at place {number}")
        if shard.samples * _SMALLEST_SAMPLE > shard.size:
            raise ShardError(
                f"shard {where} of {shard.size} bytes cannot hold {shard.samples} samples"
            )
        if shard.file not in sizes:
            raise ShardError(f"shard {where} is listed in the index and absent")
        if sizes[shard.file] != shard.size:
            raise ShardError(
                f"shard {where} has {sizes[shard.file]} bytes, the index states {shard.size}"
            )


def _check_rows(store: Store, header: Header, rows: Rows, splits: npt.NDArray[np.bytes_]) -> None:
    numbers = np.arange(len(header.shards))
    if not np.isin(rows.shard, numbers).all() or (np.diff(rows.shard) < 0).any():
        raise ShardError(f"{store}/{ROWS_FILE} has shard numbers out of order")
    if (key := _repeated(rows.key)) is not None:
        raise ShardError(f"{store}/{ROWS_FILE} has the key {key.decode()!r} more than once")
    counts = np.bincount(rows.shard, minlength=len(numbers))
    for shard, count in zip(header.shards, counts, strict=True):
        if count != shard.samples:
            raise ShardError(
                f"shard {store}/{shard.file} has {count} rows in {ROWS_FILE}, the header states "
                f"{shard.samples} samples"
            )
    shard_sizes = np.array([shard.size for shard in header.shards])[rows.shard]
    shard_splits = np.array([shard.split for shard in header.shards], dtype=np.bytes_)
    allowed = np.array(EXTENSIONS, dtype=np.bytes_)
    ends = np.zeros(len(rows), dtype=np.int64)  # of the sample before, in the same shard
    ends[1:] = np.where(np.diff(rows.shard) == 0, (rows.offset + rows.size)[:-1], 0)
    checks = (
        ("label", rows.label, (rows.label < 0) | (rows.label >= header.num_classes),
         f"in [0, {header.num_classes})"),
        ("size", rows.size, (rows.size < 0) | (rows.offset + rows.size > shard_sizes),
         "inside its shard"),
        ("size", rows.size, rows.size > limits().image_bytes,
         f"within the {limits().image_bytes} bytes that an image may have"),
        ("offset", rows.offset, rows.offset < ends, "behind the sample before it"),
        ("extension", rows.extension, ~np.isin(rows.extension, allowed),
         f"one of {', '.join(EXTENSIONS)}"),
        ("split", splits, splits != shard_splits[rows.shard], "the split of its shard"),
        ("validation", rows.validation, rows.validation & (splits == b"test"), "off in test"),
    )  # fmt: skip
    for column, values, bad, limit in checks:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ShardError(
                f"sample {rows.key[row].decode()!r} of shard "
                f"{store}/{header.shards[rows.shard[row]].file} has {column} {values[row]}, "
                f"which is not {limit}"
            )
    found = count_splits(splits == b"train", rows.validation)
    if found != header.splits:
        raise ShardError(f"shard set {store} has splits {found}, the header states {header.splits}")


def _repeated(keys: npt.NDArray[np.bytes_]) -> bytes | None:
    """Return a key that occurs more than once."""
    # Sorting 64-bit hashes takes a tenth of the time that sorting the keys would.
    width = keys.itemsize
    words = np.zeros((len(keys), -(-width // 8) * 8), dtype=np.uint8)
    words[:, :width] = keys.view(np.uint8).reshape(len(keys), width)
    hashes = np.zeros(len(keys), dtype=np.uint64)
    for column in words.view(np.uint64).T:
        hashes = (hashes ^ column) * _ODD
        hashes ^= hashes >> np.uint64(29)
    hashes.sort()
    if (hashes[1:] != hashes[:-1]).all():
        return None
    found, counts = np.unique(keys, return_counts=True)
    return bytes(found[counts > 1][0]) if (counts > 1).any() else None


def count_splits(
    train: npt.NDArray[np.bool_], validation: npt.NDArray[np.bool_]
) -> dict[SplitName, int]:
    """Return the number of samples of every split from two flags per sample."""
    return {
        "train": int(train.sum()),
        "test": int((~train).sum()),
        "fit": int((train & ~validation).sum()),
        "validation": int((train & validation).sum()),
    }
