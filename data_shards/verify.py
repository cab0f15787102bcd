"""Recount and re-hash a shard set: `python -m data_shards.verify URL`.

Lists every disagreement between index and shards; exit status 1 if there is one. With `--repair`
the index is made anew from the shards, if those are intact.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import tyro
import xxhash

from data_shards.command_line.parsing import parse_words
from data_shards.command_line.progress import ImageProgress
from data_shards.errors import ShardError, exit_on_error
from data_shards.format.external_scan import read_indexed
from data_shards.format.image_pixels import decoded_shape
from data_shards.format.shard_index import Rows, Shard, ShardIndex, load_index, split_counts
from data_shards.format.shard_scan import HashedFile, StoredSample, read_shard_file
from data_shards.storage.store import Store
from data_shards.writing.process_pool import Advance, run_tasks, usable_cpus
from data_shards.writing.rebuild_index import repair

_LISTED = 20  # disagreements of one shard
_SMALL_SET = 20_000  # images; one process is done before others have started


def verify(
    index: ShardIndex, *, decode: bool = True, workers: int = 1, progress: bool = False
) -> Iterator[str]:
    """Read every shard whole, in blocks, and yield one line per disagreement with the index.

    Args:
        index: The set; files may be missing.
        decode: Decode every image too. Without it an image is what was written, which the writer
            decoded.
        workers: Processes; 1 = this one.
        progress: Show a bar on standard error.
    """
    sizes, strays = index.files.survey()
    for name in strays:
        yield f"{index.store}/{name}: not listed in the index"
    for shard in sorted(index.shards, key=lambda shard: shard.file):
        if shard.file not in sizes:
            yield f"{index.files.describe(shard.file)}: listed in the index and absent"
    keys, counts = np.unique(index.rows.key, return_counts=True)
    for key in keys[counts > 1]:
        yield f"{index.store}: key {key.decode()!r} occurs more than once in the index"
    present = [shard for shard in index.shards if shard.file in sizes]
    first, end = (
        np.searchsorted(index.rows.shard, [shard.number for shard in present], side=side)
        for side in ("left", "right")
    )
    tasks = [
        (index.rows.take(slice(*extent)), shard, sizes[shard.file])
        for *extent, shard in zip(first, end, present, strict=True)
    ]
    total = sum(shard.samples for shard in present)
    # Sent once to each process: it lists all shards.
    without_rows = dataclasses.replace(index, rows=index.rows.take(slice(0)))
    task = functools.partial(_verify_shard, without_rows, decode)
    with ImageProgress("verifying", total, shown=progress) as bar:
        for place, problems in run_tasks(task, tasks, workers, bar):
            name = index.files.describe(present[place].file)
            yield from (f"{name}: {problem}" for problem in problems[:_LISTED])
            if len(problems) > _LISTED:
                yield f"{name}: and {len(problems) - _LISTED} more"


def _verify_shard(
    whole: ShardIndex, decode: bool, task: tuple[Rows, Shard, int], advance: Advance
) -> list[str]:
    """Compare one shard with its rows."""
    rows, shard, size = task
    index = dataclasses.replace(whole, rows=rows)
    problems = []
    if size != shard.size:
        problems.append(f"{size} bytes, the index states {shard.size}")
    file = HashedFile(*whole.files.locate(shard.file), size)
    missing = {key.decode(): row for row, key in enumerate(index.rows.key)}
    try:
        for found in _samples(index, shard, file, size):
            if isinstance(found, str):
                problems.append(found)
                continue
            row = missing.pop(found.key, None)
            problems += _compare(index, row, found, decode)
            advance(1, len(found.data))
        digest = file.hexdigest()
    except ShardError as error:
        problems.append(str(error))
        digest = _digest_of_rest(file)
    if missing:
        problems.append(
            f"{len(missing)} of the {len(index.rows)} samples of the index are not there, the "
            f"first is {min(missing, key=lambda key: missing[key])!r}"
        )
    if digest != shard.sha256:
        problems.insert(0, f"sha256 {digest}, the index states {shard.sha256}")
        others = [other.file for other in index.shards if other.sha256 == digest]
        if others:
            problems.insert(1, f"these are the bytes of {others[0]}: shards were swapped or copied")
    return problems


def _samples(
    index: ShardIndex, shard: Shard, file: HashedFile, size: int
) -> Iterator[StoredSample | str]:
    if shard.source is None:
        return read_shard_file(file, size, shard.file)
    return read_indexed(index, shard, file, size)


def _digest_of_rest(file: HashedFile) -> str:
    try:
        return file.hexdigest()
    except ShardError:
        return "unknown"


def _compare(
    index: ShardIndex, row: int | None, found: StoredSample, decode: bool
) -> Iterator[str]:
    key = f"key {found.key!r}"
    if row is None:
        yield f"{key} is not in the index, or occurs more than once"
        return
    rows = index.rows
    checks = (
        ("offset", found.offset, int(rows.offset[row])),
        ("size", len(found.data), int(rows.size[row])),
        ("extension", found.extension, rows.extension[row].decode()),
        ("label", found.label, int(rows.label[row])),
        ("xxh3_64", xxhash.xxh3_64_intdigest(found.data), int(rows.xxh3_64[row])),
    )
    differing = [check for check in checks if check[1] != check[2]]
    for name, value, stated in differing:
        yield f"{key}: {name} {value!r} in the shard, {stated!r} in the index"
    if decode and not differing:
        try:
            shape = decoded_shape(found.data, found.extension)
        except ShardError as error:
            yield f"{key}: {error}"
            return
        stated_shape = index.stored_shape(index.shards[rows.shard[row]].split)
        if stated_shape is not None and shape != stated_shape:
            yield f"{key}: shape {shape}, the set has {stated_shape}"


def _run(
    url: Annotated[str, tyro.conf.Positional],
    decode: bool = True,
    repair: bool = False,
    workers: int | None = None,
) -> None:
    """Recount and re-hash a shard set.

    Args:
        url: Directory of the set, any fsspec URL.
        decode: Decode every image too.
        repair: Write the index anew from the shards; refused if one of them is damaged.
        workers: Processes; None = one per usable CPU, one for small sets.
    """
    if repair:
        _repair(url, workers or usable_cpus())
        return
    index = load_index(url, check_files=False)
    if workers is None:
        workers = usable_cpus() if len(index.rows) > _SMALL_SET else 1
    problems = 0
    for problem in verify(index, decode=decode, workers=workers, progress=True):
        problems += 1
        sys.stdout.write(problem + "\n")
    if problems:
        sys.exit(f"error: {problems} disagreements in shard set {index.store}")
    sys.stdout.write(
        f"{index.store}: {len(index.rows)} samples in {len(index.shards)} shards agree, "
        f"digest {index.digest}\n"
    )


def _repair(url: str, workers: int) -> None:
    store = Store(url)
    result = repair(store, workers=workers, progress=True)
    for line in (*result.notes, *result.problems):
        sys.stdout.write(f"{store}{line}\n")
    if result.index is None:
        sys.exit(
            f"error: {len(result.problems)} faults in the shards of {store}; the index was not "
            "touched. Restore or remove these shards and repair again"
        )
    sys.stdout.write(
        f"{store}: index written: {split_counts(result.index.header)} samples in "
        f"{len(result.index.shards)} shards, digest {result.index.digest}\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the entry; exit status 1 on a disagreement or an unreadable set."""
    with exit_on_error():
        parse_words(_run, arguments, prog="python -m data_shards.verify")


if __name__ == "__main__":
    main()
