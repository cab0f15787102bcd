"""Make the index of shards that another program wrote, which stay as they are.

Every shard is read once: members, digests, labels, shapes. Train images are indexed where they lie.
Test images are copied into shards of our own beside the index, at the network's size and without
loss, because a certificate speaks of stored pixels. What was read of a shard is kept under
`.progress/`, so a run that was stopped goes on from there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from data_shards.command_line.progress import ImageProgress
from data_shards.errors import ShardError
from data_shards.format.external_scan import Layout, Unusable, is_number, read_external, row_key
from data_shards.format.image_pixels import decoded_shape, probe_shape
from data_shards.format.shard_index import (
    HEADER_FILE,
    SCHEMA_VERSION,
    Shard,
    ShardIndex,
    load_index,
)
from data_shards.format.shard_scan import HashedFile
from data_shards.sources.archive import Members
from data_shards.sources.base import VALIDATION, Source, hold_out, hold_out_test, printable
from data_shards.sources.transcode import Recipe
from data_shards.storage.store import Store
from data_shards.writing.index_files import MAX_CLASSES, write_index
from data_shards.writing.process_pool import Advance, run_tasks
from data_shards.writing.shard_patterns import ExternalShard
from data_shards.writing.shard_plan import ShardPlan, StoredSplit, WriteOptions, plan_split
from data_shards.writing.shard_record import ShardRecord
from data_shards.writing.unfinished import PROGRESS, claim, or_finished_elsewhere, refuse_other_set
from data_shards.writing.write_report import (
    duplicates_of,
    refuse_leaks,
    refuse_reported_leaks,
)
from data_shards.writing.writer import write_shard

_logger = logging.getLogger(__name__)

_VERSION = 1  # of the rules that turn shards into an index
_FIRST_COPY = "test-00000.tar"
_LISTED = 5
_SORTED = 0.5  # of the changes of class between neighbours that a shuffled order has

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How external shards are read.

    Args:
        layout: Where images and labels are.
        test_size: Height and width of the network's images; None = the size that all images of the
            test split have (without one: of the train split).
        hold_out: Without test shards: the part of the images that becomes the test split.
        decode: Decode every image, not its header alone.
        drop_duplicates: Leave out images whose bytes occurred before; of a test and a train image
            the train image.
        no_leaks: Refuse a set whose train and test images share bytes.
        name: Name of the set; None = that of its folder.
    """

    layout: Layout
    test_size: int | None = None
    hold_out: float | None = None
    decode: bool = False
    drop_duplicates: bool = False
    no_leaks: bool = False
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Indexed:
    """The new index, and what is to be said of it, one line each."""

    index: ShardIndex
    notes: list[str]
    written: bool = True
    """False: it was there already."""


@dataclasses.dataclass(frozen=True)
class _Scans:
    """What was found in all shards together, in stored order."""

    rows: pa.Table
    shard: npt.NDArray[np.int64]
    test: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    labels_are: str
    """"numbers" or "names"."""

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        return cast(npt.NDArray[np.uint64], self.rows["xxh3_64"].to_numpy())

    def shapes(self, chosen: npt.NDArray[np.bool_]) -> Counter[Shape]:
        columns = (self.rows[name].to_numpy()[chosen].tolist() for name in ("c", "h", "w"))
        return Counter(zip(*columns, strict=True))


def index_external_set(
    root: Store,
    shards: Sequence[ExternalShard],
    out: Store,
    options: IndexOptions,
    *,
    workers: int = 1,
    progress: bool = False,
) -> Indexed:
    """Index shards of another program; the header is written last.

    Args:
        root: Where they lie.
        shards: The shards, train first.
        out: Where index and test shards are written.
        options: How they are read.
        workers: Processes; 1 = this one.
        progress: Show a bar on standard error.

    Raises:
        ShardError: a shard cannot be read, too little can be used, or something else is there.
    """
    run = _Run(root, tuple(shards), out, options, workers, progress)
    if out.exists(HEADER_FILE):
        refuse_other_set(run.out, run.identity)
        if options.no_leaks:
            refuse_reported_leaks(out)
        return Indexed(load_index(out), [], written=False)
    notes: list[str] = []
    with or_finished_elsewhere(out):
        run.write(notes)
    with contextlib.suppress(OSError):
        out.remove(PROGRESS, recursive=True)
    return Indexed(load_index(out), notes)


@dataclasses.dataclass(frozen=True)
class _Run:
    root: Store
    shards: tuple[ExternalShard, ...]
    out: Store
    options: IndexOptions
    workers: int
    shown: bool

    @functools.cached_property
    def identity(self) -> str:
        """A digest of all that determines the index."""
        fields = {
            "version": [SCHEMA_VERSION, _VERSION],
            "root": str(self.root),
            "shards": [dataclasses.astuple(shard) for shard in self.shards],
            "options": dataclasses.asdict(self.options),
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def folder(self) -> str:
        return f"{PROGRESS}/{self.identity[:32]}"

    def write(self, notes: list[str]) -> None:
        self._refuse_to_overwrite()
        with claim(self.out, self.folder):
            if self.out.exists(HEADER_FILE):  # another process was faster
                refuse_other_set(self.out, self.identity)
            else:
                self._write(notes)

    def _write(self, notes: list[str]) -> None:
        parts = self._scan()
        not_taken = [(name, cause) for part in parts for _, name, cause in part.left_out]
        scans = self._join(parts, notes)
        test = scans.test
        if self.options.hold_out is not None:
            test = hold_out_test(scans.labels, _first_of(scans.hashes), self.options.hold_out)
        duplicates = duplicates_of(scans.hashes, np.arange(len(test)), test)
        kept = np.ones(len(test), dtype=bool)
        if self.options.drop_duplicates:
            kept[duplicates[0]] = False
        source = self._source(scans, test, not_taken)
        if self.options.no_leaks and not self.options.drop_duplicates:
            refuse_leaks(source, duplicates)
        copies = self._copy_test(source, kept)
        taken = kept & ~test
        if not taken.any():
            raise ShardError(f"{self.root}: no image is left for the train split")
        notes += _notes(scans, taken, source, self.root)
        self._finish(source, parts, taken, copies, duplicates)

    def _refuse_to_overwrite(self) -> None:
        """Refuse a folder with shards of another program named as our copies will be."""
        copied = self.options.hold_out is not None or any(s.split == "test" for s in self.shards)
        if not self.out.ls(PROGRESS):
            present = [n for n in self.out.ls() if n.startswith("test-") and n.endswith(".tar")]
            if copied and present:
                raise ShardError(
                    f"test images are copied into {_FIRST_COPY} and so on beside the index, and "
                    f"{self.out} holds {present[0]} already: give --out with another URL"
                )

    def _scan(self) -> list[ShardRecord]:
        """Read the shards that earlier runs did not; return what is known of all."""
        found: dict[int, ShardRecord] = {}
        for place in range(len(self.shards)):
            with contextlib.suppress(FileNotFoundError, ShardError):
                found[place] = ShardRecord.from_bytes(self.out.read(self._record(place)))
        missing = [place for place in range(len(self.shards)) if place not in found]
        task = functools.partial(_scan_shard, self.root, self.options)
        tasks = [self.shards[place] for place in missing]
        with ImageProgress("reading shards", 0, shown=self.shown) as bar:
            for number, data in run_tasks(task, tasks, self.workers, bar):
                self.out.write(self._record(missing[number]), data)
                found[missing[number]] = ShardRecord.from_bytes(data)
        return [found[place] for place in range(len(self.shards))]

    def _record(self, place: int) -> str:
        return f"{self.folder}/scan-{place:05d}.parquet"

    def _join(self, parts: list[ShardRecord], notes: list[str]) -> _Scans:
        for split in sorted({shard.split for shard in self.shards}, reverse=True):
            found = [p for s, p in zip(self.shards, parts, strict=True) if s.split == split]
            if not sum(len(part.rows) for part in found):
                causes = Counter(cause for part in found for _, _, cause in part.left_out)
                why = "; ".join(f"{n} x {cause}" for cause, n in causes.most_common(_LISTED))
                raise ShardError(
                    f"{self.root}: no sample of split {split!r} can be used: {why or 'none there'}"
                )
        rows = pa.concat_tables([part.rows for part in parts])
        counts = [len(part.rows) for part in parts]
        labels, names, labels_are = _classes(self.root, rows["label"].to_pylist())
        for shard, part in zip(self.shards, parts, strict=True):
            if not len(part.rows):
                notes.append(f"{self.root}/{shard.name}: left out: no sample can be used")
        return _Scans(
            rows,
            np.repeat(np.arange(len(parts)), counts),
            np.repeat([shard.split == "test" for shard in self.shards], counts),
            labels,
            names,
            labels_are,
        )

    def _source(
        self, scans: _Scans, test: npt.NDArray[np.bool_], not_taken: Sequence[tuple[str, str]]
    ) -> Source:
        channels, size, uniform = self._test_shape(scans, test)
        recipe = Recipe(channels=channels, size=size, uniform=uniform)
        names = [os.fsencode(shard.name) for shard in self.shards]
        members = zip(scans.shard.tolist(), scans.rows["member"].to_pylist(), strict=True)
        train_shapes = scans.shapes(~test)
        return Source(
            name=self.options.name or str(self.out).rpartition("/")[2],
            image_shape=(channels, size, size),
            class_names=scans.class_names,
            labels=scans.labels,
            test=test,
            validation=hold_out(scans.labels, ~test, VALIDATION),
            load=Members(
                self.root,
                tuple(shard.name for shard in self.shards),
                scans.shard,
                scans.rows["offset"].to_numpy(),
                scans.rows["size"].to_numpy(),
            ),
            convert=recipe,
            uniform=set(train_shapes) == {(channels, size, size)},
            parameters={
                "source": "shards of another program",
                "label": self.options.layout.label,
                "image": self.options.layout.image,
                "labels_are": scans.labels_are,
                "test_route": recipe.parameters()["test_route"],
            },
            names=np.array([names[shard] + b"/" + name for shard, name in members]),
            other_files=len(not_taken),
            not_taken=tuple(not_taken),
        )

    def _test_shape(self, scans: _Scans, test: npt.NDArray[np.bool_]) -> tuple[int, int, bool]:
        """Return channels and size of the network's images, and whether test images have it."""
        shapes = scans.shapes(test) if test.any() else scans.shapes(~test)
        channels = max(shape[0] for shape in scans.shapes(np.ones(len(test), dtype=bool)))
        extents = {shape[1:] for shape in shapes}
        (height, width), size = next(iter(extents)), self.options.test_size
        if len(extents) == 1 and height == width and size in (None, height):
            return channels, height, True
        if size is None:
            odd = ", ".join(f"{w} x {h}" for h, w in sorted(extents)[:_LISTED])
            raise ShardError(
                f"{self.root}: {'test' if test.any() else 'train'} images have {len(extents)} "
                f"sizes ({odd}), not one square: --test-size states the network's"
            )
        return channels, size, False

    def _copy_test(
        self, source: Source, kept: npt.NDArray[np.bool_]
    ) -> list[tuple[ShardPlan, ShardRecord]]:
        if not source.test.any():
            return []
        plans = list(plan_split(source, WriteOptions(), kept, "test"))
        found: dict[str, ShardRecord] = {}
        sizes = self.out.sizes()
        for plan in plans:
            with contextlib.suppress(FileNotFoundError, ShardError):
                part = ShardRecord.from_bytes(self.out.read(f"{self.folder}/{plan.file}.parquet"))
                if sizes.get(plan.file) == part.size:
                    found[plan.file] = part
        missing = [plan for plan in plans if plan.file not in found]
        task = functools.partial(write_shard, source, self.out, self.folder)
        total = sum(len(plan.members) for plan in missing)
        with ImageProgress("copying test images", total, shown=self.shown) as bar:
            for place, data in run_tasks(task, missing, self.workers, bar):
                found[missing[place].file] = ShardRecord.from_bytes(data)
        return [(plan, found[plan.file]) for plan in plans]

    def _finish(
        self,
        source: Source,
        parts: Sequence[ShardRecord],
        taken: npt.NDArray[np.bool_],
        copies: Sequence[tuple[ShardPlan, ShardRecord]],
        duplicates: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    ) -> None:
        tables: list[pa.Table] = []
        shards: list[Shard] = []
        start = 0  # of a shard's rows among those of all: looking for them would be quadratic
        for external, part in zip(self.shards, parts, strict=True):
            chosen = np.flatnonzero(taken[start : start + len(part.rows)])
            if len(chosen):
                file = f"train-{len(shards):05d}.tar"
                at = external.name if self.root == self.out else f"{self.root}/{external.name}"
                shards.append(_shard(len(shards), file, "train", len(chosen), part, at))
                rows = part.rows.take(pa.array(chosen))
                tables.append(_rows(rows, source, start + chosen, shards[-1]))
            start += len(part.rows)
        for plan, part in copies:
            shards.append(_shard(len(shards), plan.file, "test", len(part.rows), part, None))
            number = pa.array(np.full(len(part.rows), shards[-1].number, dtype=np.int32))
            tables.append(part.rows.append_column("shard", number).select(tables[0].column_names))
        write_index(
            self.out,
            source,
            tables,
            shards,
            generator={**source.parameters, "plan": self.identity},
            left_out=[entry for _, part in copies for entry in part.left_out],
            duplicates=duplicates,
            dropped=self.options.drop_duplicates,
        )


def _scan_shard(
    root: Store, options: IndexOptions, shard: ExternalShard, advance: Advance
) -> bytes:
    """Read one shard whole; return its rows and what cannot be used."""
    file = HashedFile(root, shard.name, shard.size)
    rows: list[tuple[Any, ...]] = []
    unusable: list[tuple[int, str, str]] = []
    for found in read_external(file, shard.size, f"{root}/{shard.name}", options.layout):
        if isinstance(found, Unusable):
            unusable.append((len(rows), f"{shard.name}/{found.name}", found.cause))
            continue
        try:
            look = decoded_shape if options.decode else probe_shape
            shape = look(found.data, found.extension)
        except ShardError as error:
            cause = "an image that cannot be decoded" if found.data else "an empty image"
            unusable.append((len(rows), f"{shard.name}/{found.member}", cause))
            _logger.warning("%s/%s/%s: %s", root, shard.name, printable(found.member), error)
            continue
        digest = xxhash.xxh3_64_intdigest(found.data)
        key, member = printable(found.key), os.fsencode(found.member)
        size = len(found.data)
        rows.append((key, member, found.offset, size, found.extension, digest, found.label, *shape))
        advance(1, size)
    columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
    kinds = _SCHEMA.items()
    table = pa.table(
        {name: pa.array(column, kind) for (name, kind), column in zip(kinds, columns, strict=True)}
    )
    return ShardRecord(table, shard.size, file.hexdigest(), unusable).to_bytes()


_SCHEMA = {
    "key": pa.string(), "member": pa.binary(), "offset": pa.int64(), "size": pa.int64(),
    "extension": pa.string(), "xxh3_64": pa.uint64(), "label": pa.string(),
    "c": pa.int32(), "h": pa.int32(), "w": pa.int32(),
}  # fmt: skip


def _classes(root: Store, texts: list[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...], str]:
    """Return label numbers, class names, and whether labels are numbers or names in the shards."""
    different = sorted(set(texts))
    if all(is_number(text) for text in different):
        labels = np.array([int(text) for text in texts], dtype=np.int64)
        count = int(labels.max()) + 1
        if count > MAX_CLASSES:
            raise ShardError(
                f"{root}: {len(different)} different labels, the largest is {count - 1}: these are "
                "no numbers of classes"
            )
        return labels, tuple(f"class {number}" for number in range(count)), "numbers"
    numbers = {text: number for number, text in enumerate(different)}
    return np.array([numbers[text] for text in texts]), tuple(different), "names"


def _first_of(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the number of the first image with the same bytes, of every image."""
    _, first, kind = np.unique(hashes, return_index=True, return_inverse=True)
    return first[kind]


def _shard(
    number: int, file: str, split: StoredSplit, samples: int, part: ShardRecord, at: str | None
) -> Shard:
    return Shard(
        number=number, file=file, split=split, samples=samples, size=part.size,
        sha256=part.sha256, source=at,
    )  # fmt: skip


def _rows(part: pa.Table, source: Source, members: npt.NDArray[np.int64], shard: Shard) -> pa.Table:
    """Return the rows of a train shard, in the columns of the index."""
    return pa.table(
        {
            "split": pa.array(["train"] * len(members)),
            "validation": pa.array(source.validation[members]),
            "key": pa.array([row_key(shard.file, key) for key in part["key"].to_pylist()]),
            "offset": part["offset"],
            "size": part["size"],
            "extension": part["extension"],
            "xxh3_64": part["xxh3_64"],
            "label": pa.array(source.labels[members], pa.int32()),
            "shard": pa.array(np.full(len(members), shard.number, dtype=np.int32)),
        }
    )


def _notes(scans: _Scans, taken: npt.NDArray[np.bool_], source: Source, root: Store) -> list[str]:
    """Return what a user should know of the set before training on it."""
    notes = []
    labels = source.labels[taken]
    shares = np.bincount(labels) / len(labels)
    expected = 1 - float((shares**2).sum())
    changes = float((np.diff(labels) != 0).mean()) if len(labels) > 1 else 0.0
    if changes < _SORTED * expected:
        notes.append(
            f"warning: {root}: train shards are sorted by class: neighbours differ in "
            f"{changes:.1%} of all cases, in a shuffled order in {expected:.1%}. Samples are mixed "
            "over lanes x window only: raise --data.stream.lanes and --data.stream.window, or "
            "write the shards anew in a shuffled order"
        )
    absent = np.setdiff1d(np.unique(source.labels[source.test]), np.unique(labels))
    if len(absent):
        names = ", ".join(source.class_names[label] for label in absent[:_LISTED])
        notes.append(f"warning: {len(absent)} classes of test have no train image: {names}")
    shapes = scans.shapes(taken)
    if set(shapes) != {source.image_shape}:
        other = sum(count for shape, count in shapes.items() if shape != source.image_shape)
        notes.append(
            f"{other} train images are not of shape {source.image_shape}: a stream crops them "
            "(--data.stream.crop random-resized)"
        )
    return notes
