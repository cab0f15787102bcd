"""Make the index of a shard set anew from its shards, when all of those are intact.

Labels come from the `.cls` members. What shards do not tell (names of the set and its classes, the
shape that a network sees, which train images are validation) is taken from the old index where
that can be read; otherwise the defaults below are used, and every one of them is stated.
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pydantic
import xxhash

from data_shards.command_line.progress import ImageProgress
from data_shards.errors import ShardError
from data_shards.format.image_pixels import decoded_shape
from data_shards.format.shard_index import (
    HEADER_FILE,
    ROWS_FILE,
    SCHEMA_VERSION,
    Header,
    Shard,
    ShardIndex,
    count_splits,
    header_to_json,
    load_header,
    load_index,
    rows_to_parquet,
)
from data_shards.format.shard_scan import HashedFile, read_shard_file
from data_shards.sources.base import VALIDATION, hold_out
from data_shards.storage.store import Store
from data_shards.writing.index_files import MAX_CLASSES
from data_shards.writing.process_pool import Advance, run_tasks

Shape = tuple[int, ...]

_FILE = re.compile(r"(train|test)-[0-9]{5,}\.tar")
_LISTED = 20  # faults of one shard
_MAX_KEY = 1 << 31  # keys of our writer are numbers below this


@dataclasses.dataclass(frozen=True)
class Repaired:
    """What a repair did."""

    index: ShardIndex | None
    """The new index; None if shards are damaged: nothing was written then."""
    notes: list[str]
    """What was assumed or left out, one line each."""
    problems: list[str]
    """What is wrong with the shards, one line each."""


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What was found in one shard."""

    file: str
    split: str
    size: int
    sha256: str
    rows: pa.Table
    shapes: Counter[Shape]
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class _Old:
    """What is left of the old index."""

    header: Header | None
    validation: dict[str, bool] | None
    """Key -> flag, where the old rows can be read."""


def repair(store: Store, *, workers: int = 1, progress: bool = False) -> Repaired:
    """Read all shards and write `index.parquet` and `index.json` anew, the header last.

    Args:
        store: Directory of the set.
        workers: Processes; 1 = this one.
        progress: Show a bar on standard error.

    Raises:
        ShardError: no shards, or they cannot be read.
    """
    notes: list[str] = []
    old = _old(store, notes)
    if old.header is not None and any(shard.source for shard in old.header.shards):
        raise ShardError(
            f"{store} has shards of another program: `python -m data_shards.index` makes its index"
        )
    sizes = store.sizes()
    tars = [name for name in sizes if name.endswith(".tar")]
    names = sorted((n for n in tars if _FILE.fullmatch(n)), key=lambda n: (n.startswith("test"), n))
    if not names:
        raise ShardError(f"{store} has no shards (train-NNNNN.tar, test-NNNNN.tar)")
    notes += [f"/{n}: left out: not named like a shard" for n in sorted(set(tars) - set(names))]
    total = sum(shard.samples for shard in old.header.shards) if old.header else 0
    task = functools.partial(_survey, store)
    with ImageProgress("reading shards", total, shown=progress) as bar:
        surveys = dict(run_tasks(task, [(n, sizes[n]) for n in names], workers, bar))
    found = [surveys[place] for place in range(len(names))]
    problems = _problems(found, old, notes)
    if problems:
        return Repaired(None, notes, problems)
    header, rows = _index(store, found, old, notes)
    store.write(ROWS_FILE, rows)
    store.write(HEADER_FILE, header_to_json(header))
    return Repaired(load_index(store), notes, [])


def _old(store: Store, notes: list[str]) -> _Old:
    try:
        header = load_header(store)
    except ShardError as error:
        notes.append(f": the old header cannot be used: {error}")
        return _Old(None, None)
    try:
        index = load_index(store, check_files=False)
    except ShardError as error:
        notes.append(f": the old rows cannot be used: {error}")
        return _Old(header, None)
    keys = [key.decode() for key in index.rows.key]
    return _Old(header, dict(zip(keys, index.rows.validation.tolist(), strict=True)))


def _survey(store: Store, task: tuple[str, int], advance: Advance) -> _Survey:
    """Read one shard: its rows, and everything that is wrong with it."""
    name, size = task
    file = HashedFile(store, name, size)
    rows: list[dict[str, Any]] = []
    shapes: Counter[Shape] = Counter()
    problems: list[str] = []
    digest = ""
    try:
        for found in read_shard_file(file, size, name):
            if isinstance(found, str):
                problems.append(found)
                continue
            advance(1, len(found.data))
            shape, problem = _shape(found.data, found.extension)
            if problem:
                problems.append(f"key {found.key!r}: {problem}")
            shapes[shape] += 1
            rows.append(
                {
                    "key": found.key,
                    "offset": found.offset,
                    "size": len(found.data),
                    "extension": found.extension,
                    "xxh3_64": xxhash.xxh3_64_intdigest(found.data),
                    "label": found.label,
                }
            )
        digest = file.hexdigest()
    except ShardError as error:
        problems.append(str(error))
    if not rows:
        problems.append("no samples")
    kinds = {"xxh3_64": pa.uint64()}
    names = list(rows[0]) if rows else ["key"]
    table = pa.table({n: pa.array([row[n] for row in rows], kinds.get(n)) for n in names})
    return _Survey(name, name.partition("-")[0], size, digest, table, shapes, problems)


def _shape(data: bytes, extension: str) -> tuple[Shape, str]:
    try:
        return decoded_shape(data, extension), ""
    except ShardError as error:
        return (), str(error)


def _problems(surveys: list[_Survey], old: _Old, notes: list[str]) -> list[str]:
    """Return what is wrong with the shards; the faults of one are listed up to a limit."""
    lines = []
    for survey in surveys:
        lines += [f"/{survey.file}: {problem}" for problem in survey.problems[:_LISTED]]
        if len(survey.problems) > _LISTED:
            lines.append(f"/{survey.file}: and {len(survey.problems) - _LISTED} more")
    if old.header is not None:
        lines += _against_header(surveys, old.header, notes)
    places: dict[str, str] = {}
    for survey in surveys:
        for key in survey.rows["key"].to_pylist():
            if places.setdefault(key, survey.file) != survey.file:
                lines.append(f"/{survey.file}: key {key!r} is in {places[key]} too")
    return lines


def _against_header(surveys: list[_Survey], header: Header, notes: list[str]) -> list[str]:
    lines = []
    stated = {shard.file: shard.sha256 for shard in header.shards}
    owner = {shard.sha256: shard.file for shard in header.shards}
    for survey in surveys:
        if survey.file not in stated:
            notes.append(f"/{survey.file}: taken in; the old header does not list it")
        elif survey.sha256 != stated[survey.file]:
            of = owner.get(survey.sha256)
            hint = f"; these are the bytes of {of}" if of else ""
            lines.append(
                f"/{survey.file}: sha256 {survey.sha256 or 'unknown'}, the old header states "
                f"{stated[survey.file]}{hint}"
            )
        labels = survey.rows["label"].to_numpy() if len(survey.rows) else np.zeros(0)
        if (labels >= header.num_classes).any():
            lines.append(f"/{survey.file}: labels that are not in [0, {header.num_classes})")
    absent = sorted(set(stated) - {survey.file for survey in surveys})
    notes += [f"/{name}: absent; the new index does not have its samples" for name in absent]
    return lines


def _index(
    store: Store, surveys: list[_Survey], old: _Old, notes: list[str]
) -> tuple[Header, bytes]:
    """Return header and rows; a header that agrees with the old one is the old one."""
    shards = tuple(
        pydantic.TypeAdapter(Shard).validate_python(
            {
                "number": number,
                "file": survey.file,
                "split": survey.split,
                "samples": len(survey.rows),
                "size": survey.size,
                "sha256": survey.sha256,
            }
        )
        for number, survey in enumerate(surveys)
    )
    columns = _columns(surveys)
    known = old.header or _default_header(store, surveys, columns["label"], notes)
    test = columns["split"] == "test"
    columns["validation"] = _validation(columns, ~test, old, notes)
    rows = rows_to_parquet(columns)
    _check_shapes(surveys, known)
    header = dataclasses.replace(
        known,
        splits=count_splits(~test, columns["validation"]),
        shards=shards,
        rows_sha256=hashlib.sha256(rows).hexdigest(),
    )
    if header != known:
        # It is no longer what a writer would make of its source.
        parts = {name: value for name, value in known.generator.items() if name != "plan"}
        header = dataclasses.replace(header, generator={**parts, "repaired": True})
    return header, rows


def _columns(surveys: list[_Survey]) -> dict[str, Any]:
    table = pa.concat_tables([survey.rows for survey in surveys])
    counts = [len(survey.rows) for survey in surveys]
    columns: dict[str, Any] = {name: table[name] for name in table.column_names}
    columns["shard"] = np.repeat(np.arange(len(surveys), dtype=np.int32), counts)
    columns["split"] = np.repeat([survey.split for survey in surveys], counts).astype(object)
    columns["label"] = table["label"].to_numpy().astype(np.int32)
    return columns


def _validation(
    columns: dict[str, Any], train: npt.NDArray[np.bool_], old: _Old, notes: list[str]
) -> npt.NDArray[np.bool_]:
    """Return the old flags, or a choice made anew as a writer makes it: by number and label.

    A writer chooses before it leaves out images, so the new choice is the old one where none was.
    """
    keys = columns["key"].to_pylist()
    if old.validation is not None and all(key in old.validation for key in keys):
        return np.array([old.validation[key] for key in keys])
    numbers = np.array([int(k) if k.isdigit() and len(k) < 11 else -1 for k in keys])
    if (numbers < 0).any() or numbers.max() >= min(_MAX_KEY, 4 * len(keys)):
        numbers = np.argsort(np.argsort(np.array(keys), kind="stable"), kind="stable")
    notes.append(": validation is chosen anew: a fifth of train, at most 10,000, by number of key")
    labels = np.zeros(numbers.max() + 1, dtype=np.int64)
    among = np.zeros(len(labels), dtype=bool)
    labels[numbers], among[numbers] = columns["label"], train
    return hold_out(labels, among, VALIDATION)[numbers]


def _default_header(
    store: Store, surveys: list[_Survey], labels: npt.NDArray[np.int32], notes: list[str]
) -> Header:
    """Return what is assumed of a set without a readable header; shards and rows are filled in."""
    shapes = {split: _shapes(surveys, split) for split in ("train", "test")}
    if len(shapes["test"]) != 1:
        raise ShardError(
            f"{store}: test images have {len(shapes['test'])} shapes; an index needs exactly one"
        )
    (image_shape,) = shapes["test"]
    name, count = str(store).rpartition("/")[2], int(labels.max()) + 1
    if count > MAX_CLASSES:
        raise ShardError(
            f"{store}: the largest label is {count - 1}: without a header that says otherwise this "
            "is no number of a class"
        )
    notes.append(
        f": assumed: name {name!r}, {count} classes with names 'class 0' and so on, images "
        f"{image_shape}, no generator"
    )
    return Header(
        schema_version=SCHEMA_VERSION,
        name=name,
        image_shape=image_shape,
        train_shape=image_shape if set(shapes["train"]) == {image_shape} else None,
        num_classes=count,
        class_names=tuple(f"class {label}" for label in range(count)),
        splits={},
        shards=(),
        rows_sha256="",
        generator={"source": "unknown"},
    )


def _check_shapes(surveys: list[_Survey], known: Header) -> None:
    for split, shape in (("train", known.train_shape), ("test", known.image_shape)):
        others = {s: n for s, n in _shapes(surveys, split).items() if s != shape}
        if shape is not None and others:
            raise ShardError(
                f"{sum(others.values())} {split} images have other shapes than {shape}, such as "
                f"{next(iter(others))}"
            )


def _shapes(surveys: list[_Survey], split: str) -> Any:
    return sum((survey.shapes for survey in surveys if survey.split == split), Counter())
