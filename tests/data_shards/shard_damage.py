"""Rewrite shards member by member, to damage them; and index them again, to hide that."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import xxhash

from data_shards.format.shard_index import header_to_json, load_header, rows_to_parquet
from data_shards.storage.store import Store

FILE = "train-00001.tar"


class Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def read_members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def write_members(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else info.size
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(buffer.getvalue())


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def add_huge_member(path: Path, name: str = "99999999.png", size: int = 10 << 30) -> None:
    """Put a header in front that declares 10 GB which are not there."""
    info = tarfile.TarInfo(name)
    info.size = size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())


def reindex(folder: Path, file: str) -> None:
    """Make digests, sizes, offsets and labels of the index those of a changed shard.

    What somebody does who wants to be believed: rows whose image is gone keep their old place.
    """
    store = Store(folder)
    header = load_header(store)
    data = (folder / file).read_bytes()
    number = next(shard.number for shard in header.shards if shard.file == file)
    columns = pq.read_table(folder / "index.parquet").to_pydict()
    try:
        with tarfile.open(folder / file) as tar:
            found = {m.name: (m.offset_data, m.size) for m in tar}
    except tarfile.TarError:
        found = {}
    for row, (shard, key) in enumerate(zip(columns["shard"], columns["key"], strict=True)):
        place = found.get(f"{key}.{columns['extension'][row]}")
        if shard == number and place is not None:
            columns["offset"][row], columns["size"][row] = place
            image = data[place[0] : sum(place)]
            columns["xxh3_64"][row] = xxhash.xxh3_64_intdigest(image)
    rows = rows_to_parquet(columns)
    shards = list(header.shards)
    digest = hashlib.sha256(data).hexdigest()
    shards[number] = replaced(shards[number], sha256=digest, size=len(data))
    changed = replaced(header, shards=tuple(shards), rows_sha256=hashlib.sha256(rows).hexdigest())
    (folder / "index.parquet").write_bytes(rows)
    (folder / "index.json").write_bytes(header_to_json(changed))


def replaced(value, **fields):
    return type(value)(**{**value.__dict__, **fields})


def die(_):
    """Load no image: end the process. Here, where a worker imports little to find it."""
    os._exit(3)
