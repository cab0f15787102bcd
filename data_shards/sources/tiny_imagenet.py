"""Tiny-ImageNet from `tiny-imagenet-200.zip`.

The images with public labels outside the train part are its "val" images: they are the test split
here, as in the literature. Grey images are stored as RGB with equal channels.
"""

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.sources.archive import Members, locate, open_file
from data_shards.sources.base import VALIDATION, Source, checksum, hold_out
from data_shards.sources.transcode import Recipe
from data_shards.storage.store import Store

_ARCHIVE = "tiny-imagenet-200.zip"
_ROOT = "tiny-imagenet-200"
_SIDE = 64
_MAX_TEXT = 1 << 24
_MAX_IMAGE = 1 << 24
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"


def tiny_imagenet(source: str) -> Source:
    """Tiny-ImageNet: 100,000 train and 10,000 test images 3x64x64 of 200 classes.

    Classes are numbered in the sorted order of their WordNet ids.

    Args:
        source: `tiny-imagenet-200.zip` or its folder, a path or any fsspec URL.

    Raises:
        ShardError: no such archive, or not the official layout.
    """
    store, name = locate(source, _ARCHIVE)
    where = f"{store}/{name}"
    try:
        with open_file(store, name) as file, zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            directory = archive.start_dir
            texts = {
                text: _read_text(archive, text)
                for text in ("wnids.txt", "words.txt", "val/val_annotations.txt")
            }
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ShardError(f"cannot read {where}: {error}") from error
    wnids = sorted(texts["wnids.txt"].split())
    words = dict(line.split("\t")[:2] for line in texts["words.txt"].splitlines() if "\t" in line)
    lines = texts["val/val_annotations.txt"].splitlines()
    truth = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    stops = [entry.header_offset for entry in entries[1:]] + [directory]
    found = []  # (name in the archive, wnid, is test, entry, end of its range)
    for entry, stop in zip(entries, stops, strict=True):
        wnid = _wnid(entry, truth)
        if wnid is not None:
            found.append((entry.filename, wnid, "/val/" in entry.filename, entry, stop))
    found.sort(key=lambda item: (item[2], item[1], item[0]))
    _check(where, {item[1] for item in found}, set(wnids), truth, found)
    labels = np.array([wnids.index(item[1]) for item in found], dtype=np.int64)
    test = np.array([item[2] for item in found])
    recipe = Recipe(channels=3, size=_SIDE, uniform=True)
    load = _ZipImages.of(store, name, [(item[3], item[4]) for item in found])
    return Source(
        name="tiny-imagenet",
        image_shape=(3, _SIDE, _SIDE),
        class_names=tuple(f"{wnid} {words.get(wnid, '')}".strip() for wnid in wnids),
        labels=labels,
        test=test,
        validation=hold_out(labels, ~test, VALIDATION),
        load=load,
        convert=recipe,
        parameters={"source": "tiny-imagenet", **recipe.parameters()},
        sizes=load.unpacked,
        names=np.array([item[0] for item in found], dtype=np.bytes_),
    )


def _read_text(archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(f"{_ROOT}/{name}") as file:
        return file.read(_MAX_TEXT).decode("utf-8", "replace")


def _wnid(entry: zipfile.ZipInfo, truth: dict[str, str]) -> str | None:
    """Return the class of an image with a public label, None for any other entry."""
    parts = entry.filename.split("/")
    if parts[0] != _ROOT or not parts[-1].endswith(".JPEG"):
        return None
    if parts[1] == "train" and len(parts) == 5:
        return parts[2]
    return truth.get(parts[-1]) if parts[1:3] == ["val", "images"] else None


def _check(
    where: str, classes: set[str], wnids: set[str], truth: dict[str, str], found: list
) -> None:
    if classes != wnids:
        odd = ", ".join(sorted(classes ^ wnids)[:5])
        raise ShardError(f"{where}: classes of images and wnids.txt differ: {odd}")
    test = sum(item[2] for item in found)
    if test != len(truth):
        raise ShardError(f"{where}: {test} val images, val_annotations.txt has {len(truth)}")
    for name, *_, entry, _stop in found:
        method = entry.compress_type
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise ShardError(f"{where}: {name} is encrypted or packed by method {method}")
        if entry.file_size > _MAX_IMAGE:
            raise ShardError(f"{where}: {name} declares {entry.file_size} bytes")


@dataclasses.dataclass(frozen=True)
class _ZipImages:
    """Entries of a zip archive, read at random."""

    members: Members
    """From the local header of each entry to that of the next."""
    deflated: npt.NDArray[np.bool_]
    packed: npt.NDArray[np.int64]
    unpacked: npt.NDArray[np.int64]
    crc: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, store: Store, name: str, entries: Sequence[tuple[zipfile.ZipInfo, int]]
    ) -> "_ZipImages":
        def column(values: list[int]) -> npt.NDArray[np.int64]:
            return np.array(values, dtype=np.int64)

        infos = [entry for entry, _ in entries]
        start = column([entry.header_offset for entry in infos])
        size = column([stop for _, stop in entries]) - start
        return cls(
            Members(store, (name,), np.zeros(len(infos), dtype=np.int64), start, size),
            np.array([entry.compress_type == zipfile.ZIP_DEFLATED for entry in infos]),
            column([entry.compress_size for entry in infos]),
            column([entry.file_size for entry in infos]),
            column([entry.CRC for entry in infos]),
        )

    def __call__(self, numbers: Sequence[int]) -> list[bytes]:
        return [
            self._unpack(i, data) for i, data in zip(numbers, self.members(numbers), strict=True)
        ]

    def _unpack(self, number: int, data: bytes) -> bytes:
        where = f"{self.members.store}/{_ARCHIVE} at offset {self.members.offset[number]}"
        if len(data) < _LOCAL_HEADER.size or not data.startswith(_SIGNATURE):
            raise ShardError(f"{where}: no zip entry")
        *_, name_size, extra_size = _LOCAL_HEADER.unpack_from(data)
        start = _LOCAL_HEADER.size + name_size + extra_size
        body = data[start : start + int(self.packed[number])]
        if self.deflated[number]:
            try:
                body = zlib.decompressobj(-15).decompress(body, int(self.unpacked[number]) + 1)
            except zlib.error as error:
                raise ShardError(f"{where}: {error}") from error
        checksum(body, int(self.crc[number]), where)
        return body
