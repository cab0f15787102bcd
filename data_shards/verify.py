"""Recount and re-hash a shard set: `python -m data_shards.verify URL`.

Lists every disagreement between index and shards; exit status 1 if there is one.
"""

import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import tyro
import xxhash

from data_shards.errors import ShardError
from data_shards.index import Shard, ShardIndex, load_index
from data_shards.reader import DamagedSampleError, decode


def verify(index: ShardIndex) -> Iterator[str]:
    """Read every shard whole and yield one line per disagreement with the index."""
    listed = {shard.file for shard in index.shards}
    for name in index.store.ls():
        if name.endswith(".tar") and name not in listed:
            yield f"{index.store}/{name}: not listed in the index"
    keys, counts = np.unique(index.rows.key, return_counts=True)
    for key in keys[counts > 1]:
        yield f"{index.store}: key {key.decode()!r} occurs more than once"
    for shard in index.shards:
        for problem in _verify_shard(index, shard):
            yield f"{index.store}/{shard.file}: {problem}"


def _verify_shard(index: ShardIndex, shard: Shard) -> Iterator[str]:
    data = index.store.read(shard.file)
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.sha256:
        yield f"sha256 {digest}, the index states {shard.sha256}"
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {member.name: member for member in tar}
    except tarfile.TarError as error:
        yield f"not a readable tar: {error}"
    rows = np.flatnonzero(index.rows.shard == shard.number)
    if len(members) != 2 * len(rows):
        yield f"{len(members)} members, the index states {2 * len(rows)}"
    for row in rows.tolist():
        key, label = index.rows.key[row].decode(), int(index.rows.label[row])
        start, size = int(index.rows.offset[row]), int(index.rows.size[row])
        image = members.get(f"{key}.{index.rows.extension[row].decode()}")
        if image is None or (image.offset_data, image.size) != (start, size):
            yield f"key {key!r}: no image of {size} bytes at offset {start}"
        try:
            _check_image(index, row, data[start : start + size])
        except DamagedSampleError as error:
            yield str(error)
        text = members.get(f"{key}.cls")
        found = data[text.offset_data : text.offset_data + text.size] if text else None
        if found != str(label).encode():
            yield f"key {key!r}: label {found!r} in the shard, {label} in the index"


def _check_image(index: ShardIndex, row: int, data: bytes) -> None:
    if index.header.image_shape is not None:
        decode(index, row, memoryview(data))
    elif xxhash.xxh3_64_intdigest(data) != int(index.rows.xxh3_64[row]):
        raise DamagedSampleError(f"{index.describe(row)}: another xxh3_64", "digest")


def _run(url: Annotated[str, tyro.conf.Positional]) -> None:
    """Recount and re-hash a shard set.

    Args:
        url: Directory of the set, any fsspec URL.
    """
    index = load_index(url)
    problems = 0
    for problem in verify(index):
        problems += 1
        sys.stdout.write(problem + "\n")
    if problems:
        sys.exit(f"error: {problems} disagreements in shard set {index.store}")
    sys.stdout.write(
        f"{index.store}: {len(index.rows)} samples in {len(index.shards)} shards agree, "
        f"digest {index.digest}\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the entry; exit status 1 on a disagreement or an unreadable set."""
    try:
        tyro.cli(_run, args=arguments, prog="data_shards.verify")
    except ShardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
