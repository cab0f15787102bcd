"""Write a shard set: `python -m data_shards.write digits --out URL`.

The bytes depend on the source alone, so two processes that write the same set to one place at the
same time replace files by identical ones, and whoever writes the header last changes nothing.
"""

import hashlib
import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tyro
import xxhash
from rich.console import Console
from rich.progress import track

from data_shards.errors import ShardError
from data_shards.index import (
    HEADER_FILE,
    ROWS_FILE,
    SCHEMA_VERSION,
    STORED_SPLITS,
    Header,
    Shard,
    ShardIndex,
    count_splits,
    header_to_json,
    load_header,
    load_index,
    rows_to_parquet,
)
from data_shards.philox import philox_words
from data_shards.sources import Source, digits, synthetic
from data_shards.store import Store

MIN_SHARDS = 4  # an evaluation has at least four parts to run side by side
_SHUFFLE = 100  # purpose of the words that shuffle the stored order
_BLOCK = tarfile.BLOCKSIZE
_Columns = dict[str, list[Any]]


def write_shard_set(
    source: Source,
    out_url: str,
    *,
    samples_per_shard: int = 1000,
    progress: bool = False,
) -> ShardIndex:
    """Write all images of a source as tar shards with an index, the header last.

    Each split has at least four shards, of sizes that differ by at most one sample, in an order
    shuffled once for all.

    Args:
        source: The images.
        out_url: Directory of the set.
        samples_per_shard: Most samples in one shard.
        progress: Show a bar on standard error.

    Returns:
        The index, loaded from what was written. If the same set is there already, nothing is
        written.

    Raises:
        ShardError: a different set is there, or a split has fewer samples than shards.
    """
    store = Store(out_url)
    present = load_header(store) if store.exists(HEADER_FILE) else None
    plan = list(_plan_shards(source, samples_per_shard))
    columns: _Columns = {}
    shards = []
    console = Console(stderr=True)
    bar = track(plan, f"writing {source.name}", console=console, disable=not progress)
    for number, (file, split, members) in enumerate(bar):
        data = _build_tar(source, members, number, split, columns)
        sizes = {"samples": len(members), "size": len(data)}
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(number=number, file=file, split=split, sha256=digest, **sizes))
        if present is None:
            store.write(file, data)
    rows = rows_to_parquet(columns)
    header = _header(source, tuple(shards), rows, samples_per_shard)
    if present is None:
        store.write(ROWS_FILE, rows)
        store.write(HEADER_FILE, header_to_json(header))
    elif present.digest() != header.digest():
        raise ShardError(
            f"{store} already holds another shard set, {present.name!r} with digest "
            f"{present.digest()}; the new one, {header.name!r}, has {header.digest()}. "
            "Choose another URL or remove it first"
        )
    return load_index(store)


def _plan_shards(
    source: Source, samples_per_shard: int
) -> Iterator[tuple[str, Any, npt.NDArray[np.int64]]]:
    if samples_per_shard < 1:
        raise ShardError(f"samples per shard {samples_per_shard} is not at least 1")
    for split in STORED_SPLITS:
        members = np.flatnonzero(source.test == (split == "test"))
        if len(members) < MIN_SHARDS:
            raise ShardError(
                f"split {split!r} of {source.name!r} has {len(members)} samples, fewer than the "
                f"{MIN_SHARDS} shards of a split"
            )
        words = philox_words(0, 0, purpose=_SHUFFLE, count=len(source.labels))[members, 0]
        members = members[np.argsort(words, kind="stable")]
        count = max(MIN_SHARDS, -(-len(members) // samples_per_shard))
        for number, part in enumerate(np.array_split(members, count)):
            yield f"{split}-{number:05d}.tar", split, part


def _build_tar(
    source: Source, members: npt.NDArray[np.int64], number: int, split: str, columns: _Columns
) -> bytes:
    """Return the bytes of one tar and append the rows of its samples."""
    tar = io.BytesIO()
    for i in members.tolist():
        image = source.encode(i)
        key = f"{i:08d}"
        row = {
            "split": split,
            "validation": bool(source.validation[i]),
            "shard": number,
            "key": key,
            "offset": _add_member(tar, f"{key}.{source.extension}", image),
            "size": len(image),
            "extension": source.extension,
            "xxh3_64": xxhash.xxh3_64_intdigest(image),
            "label": int(source.labels[i]),
        }
        _add_member(tar, f"{key}.cls", str(row["label"]).encode())
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    tar.write(bytes(2 * _BLOCK))
    tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
    return tar.getvalue()


def _add_member(tar: io.BytesIO, name: str, body: bytes) -> int:
    """Append one tar member with fixed owner and time; return the offset of its body."""
    info = tarfile.TarInfo(name)
    info.size = len(body)
    info.mode = 0o444
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(body)
    tar.write(bytes(-len(body) % _BLOCK))
    return offset


def _header(
    source: Source, shards: tuple[Shard, ...], rows: bytes, samples_per_shard: int
) -> Header:
    return Header(
        schema_version=SCHEMA_VERSION,
        name=source.name,
        image_shape=source.image_shape,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        splits=count_splits(~source.test, source.validation),
        shards=shards,
        rows_sha256=hashlib.sha256(rows).hexdigest(),
        generator={**source.parameters, "samples_per_shard": samples_per_shard},
    )


def _write(source: Source, out: str, samples_per_shard: int) -> None:
    store = Store(out)
    there = store.exists(HEADER_FILE)
    index = write_shard_set(source, out, samples_per_shard=samples_per_shard, progress=True)
    counts = ", ".join(f"{count} {split}" for split, count in index.header.splits.items())
    what = "already there, unchanged" if there else "written"
    sys.stdout.write(
        f"{store}: {what}: {counts} samples in {len(index.shards)} shards, digest {index.digest}\n"
    )


def _write_digits(out: str, samples_per_shard: int = 1000) -> None:
    """Write the 1,797 handwritten digits of scikit-learn, 1x8x8, 10 classes.

    Args:
        out: Directory of the set, any fsspec URL.
        samples_per_shard: Most samples in one shard.
    """
    _write(digits(), out, samples_per_shard)


def _write_synthetic(
    out: str,
    classes: int = 10,
    size: int = 32,
    samples: int = 2000,
    seed: int = 0,
    samples_per_shard: int = 1000,
) -> None:
    """Write procedural RGB images.

    Args:
        out: Directory of the set, any fsspec URL.
        classes: Number of classes.
        size: Height and width in pixels.
        samples: Number of images, train and test together.
        seed: Key of all images.
        samples_per_shard: Most samples in one shard.
    """
    source = synthetic(classes=classes, size=size, samples=samples, seed=seed)
    _write(source, out, samples_per_shard)


def main(arguments: list[str] | None = None) -> None:
    """Run the entry; one line on standard error and exit status 1 on a refused request."""
    entries: dict[str, Callable[..., Any]] = {
        "digits": _write_digits,
        "synthetic": _write_synthetic,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(entries, args=arguments, prog="data_shards.write")
    except ShardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
