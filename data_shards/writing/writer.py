"""Write a source as a shard set: in parallel, resumable, with the same bytes every time.

The bytes depend on the source and the options alone, so two processes that write the same set to
one place at the same time replace files by identical ones, and whoever writes the header last
changes nothing. The order of writing is shard, its record under `.progress/`, and when all are
there the rows, the report and the header; a run that was killed goes on from the records.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from data_shards.command_line.progress import ImageProgress
from data_shards.errors import ShardError
from data_shards.format.shard_index import (
    HEADER_FILE,
    Shard,
    ShardIndex,
    load_index,
)
from data_shards.format.tar import add_end, add_member
from data_shards.sources.base import Source
from data_shards.sources.transcode import UndecodableError, image_extension
from data_shards.storage.store import Store
from data_shards.writing.index_files import write_index
from data_shards.writing.process_pool import Advance, run_tasks
from data_shards.writing.shard_plan import (
    ShardPlan,
    WriteOptions,
    identity,
    plan_shards,
    progress_key,
)
from data_shards.writing.shard_record import SOURCE_HASH, ShardRecord
from data_shards.writing.unfinished import PROGRESS, claim, or_finished_elsewhere, refuse_other_set
from data_shards.writing.write_report import (
    duplicates_of,
    refuse_leaks,
    refuse_reported_leaks,
)

_logger = logging.getLogger(__name__)

_AT_ONCE = 64  # images loaded together: enough to overlap requests, some megabytes
_HASHED_AT_ONCE = 1 << 14  # images per task of the search for duplicates
_UNDECODABLE_SHARE = 0.1  # of a shard; more is not damage of single files
_UNDECODABLE_ALLOWANCE = 10


def write_shard_set(
    source: Source,
    out_url: str,
    *,
    samples_per_shard: int | None = None,
    options: WriteOptions | None = None,
    no_leaks: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> ShardIndex:
    """Write all images of a source as tar shards with an index, the header last.

    Args:
        source: The images.
        out_url: Directory of the set.
        samples_per_shard: Short for options with this field.
        options: How to cut the set; None = defaults.
        no_leaks: Refuse a source whose train and test images share bytes (reads it twice).
        workers: Processes; 1 = this one.
        progress: Show a bar on standard error.

    Returns:
        The index, loaded from what was written. If the same set is there already, nothing is
        written.

    Raises:
        ShardError: a different set is there, a split has fewer samples than shards, or images
            cannot be read.
    """
    store = Store(out_url)
    options = options or WriteOptions(samples_per_shard=samples_per_shard)
    run = _Run(source, store, options, workers, progress, no_leaks)
    if not store.exists(HEADER_FILE):
        with or_finished_elsewhere(store):
            run.write()
    refuse_other_set(run.store, run.identity)
    if no_leaks:
        refuse_reported_leaks(store)
    # Another process that writes the same set may be at work in there; what it leaves is harmless.
    with contextlib.suppress(OSError):
        store.remove(PROGRESS, recursive=True)
    return load_index(store)


@dataclasses.dataclass(frozen=True)
class _Run:
    """One call of the writer."""

    source: Source
    store: Store
    options: WriteOptions
    workers: int
    shown: bool
    no_leaks: bool

    @functools.cached_property
    def identity(self) -> str:
        return identity(self.source, self.options)

    @functools.cached_property
    def folder(self) -> str:
        return f"{PROGRESS}/{progress_key(self.identity)}"

    def write(self) -> None:
        with claim(self.store, self.folder):
            if self.store.exists(HEADER_FILE):  # another process was faster
                refuse_other_set(self.store, self.identity)
            else:
                self._write()

    def _write(self) -> None:
        kept = np.ones(len(self.source.labels), dtype=bool)
        duplicates = (np.zeros(0, dtype=np.int64),) * 2
        if self.no_leaks and not self.options.drop_duplicates:
            refuse_leaks(self.source, self._find_duplicates())
        if self.options.drop_duplicates:
            duplicates = self._find_duplicates()
            kept[duplicates[0]] = False
        plans = list(plan_shards(self.source, self.options, kept))
        self._refuse_strays(plans)
        records = self._write_shards(plans)
        if not self.options.drop_duplicates:
            columns = pa.concat_tables([f.rows.select(["key", SOURCE_HASH]) for f in records])
            numbers = np.array([int(key) for key in columns["key"].to_pylist()], dtype=np.int64)
            hashes = columns[SOURCE_HASH].to_numpy()
            duplicates = duplicates_of(hashes, numbers, self.source.test[numbers])
        self._finish(plans, records, duplicates)

    def _refuse_strays(self, plans: Sequence[ShardPlan]) -> None:
        tars = {name for name in self.store.ls() if name.endswith(".tar")}
        strays = sorted(tars - {plan.file for plan in plans})
        if strays:
            raise ShardError(
                f"{self.store} holds {len(strays)} tar files that are not of this set, the first "
                f"is {strays[0]}. Choose another URL or remove them first"
            )

    def _write_shards(self, plans: Sequence[ShardPlan]) -> list[ShardRecord]:
        """Write the shards that are missing; return the records of all, in order."""
        found = self._records(plans)
        missing = [plan for plan in plans if plan.file not in found]
        done = sum(len(plan.members) for plan in plans if plan.file in found)
        total = sum(len(plan.members) for plan in plans)
        task = functools.partial(write_shard, self.source, self.store, self.folder)
        with ImageProgress(
            f"writing {self.source.name}", total, shown=self.shown, done=done
        ) as bar:
            for place, data in run_tasks(task, missing, self.workers, bar):
                found[missing[place].file] = ShardRecord.from_bytes(data)
        return [found[plan.file] for plan in plans]

    def _records(self, plans: Sequence[ShardPlan]) -> dict[str, ShardRecord]:
        """Return what earlier runs finished: records whose shard is there."""
        names = set(self.store.ls(self.folder))
        sizes = self.store.sizes()
        found = {}
        for plan in plans:
            name = f"{self.folder}/{plan.file}.parquet"
            if name not in names:
                continue
            # Another process that writes the same set may have finished and tidied up, and not
            # every store writes an object in one go: a record that is not there is made again.
            with contextlib.suppress(FileNotFoundError, ShardError):
                record = ShardRecord.from_bytes(self.store.read(name))
                if sizes.get(plan.file) == record.size:
                    found[plan.file] = record
        return found

    def _find_duplicates(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        numbers = np.arange(len(self.source.labels))
        parts = np.array_split(numbers, -(-len(numbers) // _HASHED_AT_ONCE))
        task = functools.partial(_hash_images, self.source, self.store, self.folder)
        hashes = np.zeros(len(numbers), dtype=np.uint64)
        with ImageProgress("looking for duplicates", len(numbers), shown=self.shown) as bar:
            for place, found in run_tasks(task, parts, self.workers, bar):
                hashes[parts[place]] = found
        return duplicates_of(hashes, numbers, self.source.test)

    def _finish(
        self,
        plans: Sequence[ShardPlan],
        records: Sequence[ShardRecord],
        duplicates: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    ) -> None:
        tables, shards = [], []
        for number, (plan, record) in enumerate(zip(plans, records, strict=True)):
            count = len(record.rows)
            shard_column = pa.array(np.full(count, number, dtype=np.int32))
            tables.append(record.rows.append_column("shard", shard_column))
            shards.append(
                Shard(
                    number=number,
                    file=plan.file,
                    split=plan.split,
                    sha256=record.sha256,
                    samples=count,
                    size=record.size,
                )
            )
        write_index(
            self.store,
            self.source,
            tables,
            shards,
            generator={
                **self.source.parameters,
                **dataclasses.asdict(self.options),
                "plan": self.identity,
            },
            left_out=[entry for record in records for entry in record.left_out],
            duplicates=duplicates,
            dropped=self.options.drop_duplicates,
        )


def write_shard(
    source: Source, store: Store, folder: str, plan: ShardPlan, advance: Advance
) -> bytes:
    """Build one tar, write it and its record; return the record."""
    tar = io.BytesIO()
    rows: list[dict[str, Any]] = []
    left_out: list[tuple[int, str, str]] = []
    for numbers in _batches(plan.members):
        for number, data in zip(numbers, source.load(numbers), strict=True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    rows.append(_add_sample(tar, source, plan.split, number, data))
                except UndecodableError as error:
                    left_out.append((number, error.cause, str(error)))
            for warning in caught:  # of Pillow, which does not know the name
                _logger.warning("%s: %s", source.describe(number), warning.message)
            advance(1, len(data))
        _check_left_out(source, plan, left_out, final=False)
    _check_left_out(source, plan, left_out, final=not rows)
    add_end(tar)
    body = tar.getvalue()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    kinds = {"label": pa.int32(), "xxh3_64": pa.uint64(), SOURCE_HASH: pa.uint64()}
    arrays = {name: pa.array(values, kinds.get(name)) for name, values in columns.items()}
    digest = hashlib.sha256(body).hexdigest()
    record = ShardRecord(pa.table(arrays), len(body), digest, left_out).to_bytes()
    store.write(plan.file, body)
    store.write(f"{folder}/{plan.file}.parquet", record)
    return record


def _add_sample(
    tar: io.BytesIO, source: Source, split: str, number: int, data: bytes
) -> dict[str, Any]:
    """Append image and label to a tar; return the row of the sample."""
    image = source.convert(data, bool(source.test[number]))
    key, extension, label = f"{number:08d}", image_extension(image), int(source.labels[number])
    offset = add_member(tar, f"{key}.{extension}", image)
    add_member(tar, f"{key}.cls", str(label).encode())
    return {
        "split": split,
        "validation": bool(source.validation[number]),
        "key": key,
        "offset": offset,
        "size": len(image),
        "extension": extension,
        "xxh3_64": xxhash.xxh3_64_intdigest(image),
        "label": label,
        SOURCE_HASH: xxhash.xxh3_64_intdigest(data),
    }


def _check_left_out(
    source: Source, plan: ShardPlan, left_out: list[tuple[int, str, str]], *, final: bool
) -> None:
    """Stop early where most images cannot be stored; `final`: the shard has none at all."""
    limit = _UNDECODABLE_ALLOWANCE + _UNDECODABLE_SHARE * len(plan.members)
    if final or len(left_out) > limit:
        number, _, message = left_out[0]
        raise ShardError(
            f"{len(left_out)} of {len(plan.members)} images of {plan.file} cannot be stored, more "
            f"than damage of single files explains; the first is {source.describe(number)}: "
            f"{message}"
        )


def _hash_images(
    source: Source, store: Store, folder: str, numbers: npt.NDArray[np.int64], advance: Advance
) -> npt.NDArray[np.uint64]:
    """Return xxh3_64 of the bytes of some images in the archive; kept for a run that goes on."""
    name = f"{folder}/hashes-{numbers[0]:08d}.bin"
    with contextlib.suppress(FileNotFoundError):
        kept = store.read(name)
        if len(kept) == 8 * len(numbers):
            advance(len(numbers), 0)
            return np.frombuffer(kept, dtype="<u8").astype(np.uint64)
    hashes = []
    for batch in _batches(numbers):
        for data in source.load(batch):
            hashes.append(xxhash.xxh3_64_intdigest(data))
            advance(1, len(data))
    found = np.array(hashes, dtype=np.uint64)
    store.write(name, found.astype("<u8").tobytes())
    return found


def _batches(numbers: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    for begin in range(0, len(numbers), _AT_ONCE):
        yield numbers[begin : begin + _AT_ONCE].tolist()
