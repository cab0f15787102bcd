"""The shard set: section 8.4 of docs/explanation/certificate.md."""

import io
import re
import tarfile
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.verifier.errors import (
    DisagreementError,
    UnusableError,
    agree,
    attempt,
    differ,
    shown,
    take,
)
from model.verifier.files import (
    LARGEST_JSON,
    LARGEST_TABLE,
    Body,
    Table,
    beside,
    digest_of,
    parse_object,
    read_bytes,
    read_table,
    sha256,
)

LARGEST_SHARD = 1 << 36
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}


class Images(NamedTuple):
    """The certified split of a shard set."""

    folder: str
    shards: list[Body]
    rows: Table
    """Rows of the split, in index order."""


def read_index(folder: str, classes: int, body: Body, samples: Table) -> Images:
    """Read a shard set's index: its split must be the rows of samples.parquet, in order."""
    place = beside(folder, "index.json")
    header = parse_object(read_bytes(place, LARGEST_JSON), place)
    digest = digest_of(header, place)
    due = {"schema_version": 2, "image_shape": body["native_shape"], "num_classes": classes}
    for name, value in {"digest": digest, **due}.items():
        agree(header.get(name), value, f"{place}: {name}")
    shards = take(header, "shards", list, place)
    for shard in shards:
        file = take(shard, "file", str, f"{place}: shards")
        if not re.fullmatch(r"(train|test)-[0-9]{5,9}\.tar", file):
            raise UnusableError(f"{place}: {shown(file)} is no name of a shard")
    data = read_bytes(beside(folder, "index.parquet"), LARGEST_TABLE)
    agree(header.get("rows_sha256"), sha256(data), f"{place}: rows_sha256")
    split = take(take(body, "shards", dict, "certificate"), "split", str, "shards")
    rows = rows_of_split(data, split, beside(folder, "index.parquet"))
    count = len(rows["key"])
    derived = {"name": header.get("name"), "index_digest": digest, "split": split, "samples": count}
    agree(body["shards"], derived, "shards")
    compare_rows(shards, rows, samples, place)
    return Images(folder, shards, rows)


def load_images(
    images: Images,
    samples: Table,
    chosen: npt.NDArray[np.int64],
    shape: tuple[int, int, int],
    at_once: int,
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """Row numbers and decoded images, shard by shard; label and pixels as the tar has them."""
    shard_of = images.rows["shard"][chosen]
    for number in np.unique(shard_of):
        file = images.shards[number]
        place = beside(images.folder, file["file"])
        data = read_bytes(place, LARGEST_SHARD)
        agree(file.get("sha256"), sha256(data), f"index.json: sha256 of {file['file']}")
        shard = Shard(data, place)
        members = chosen[shard_of == number]
        for start in range(0, len(members), at_once):
            batch, pixels = members[start : start + at_once], []
            for i in batch:
                key, extension = samples["key"][i], images.rows["extension"][i]
                where = f"samples.parquet row {i} ({shown(key)})"
                agree(int(samples["label"][i]), shard.label(key), f"{where} label")
                pixels.append(shard.pixels(key, extension, shape))
                digest = sha256(pixels[-1].data)
                agree(samples["pixels_sha256"][i], digest, f"{where} pixels_sha256")
            yield batch, np.stack(pixels)


def rows_of_split(data: bytes, split: str, place: str) -> Table:
    """The rows of index.parquet that belong to a split; fit and validation partition train."""
    kinds = {"split": "string", "validation": "bool", "shard": "integer"}
    rows = read_table(
        data, {**kinds, "key": "string", "extension": "string", "label": "integer"}, place
    )
    if split not in ("train", "test", "fit", "validation"):
        raise UnusableError(f"shards.split {shown(split)} is not a split")
    chosen = rows["split"] == ("test" if split == "test" else "train")
    if split in ("fit", "validation"):
        chosen &= rows["validation"] == (split == "validation")
    rows = {name: column[chosen] for name, column in rows.items()}
    if len(set(rows["key"])) != len(rows["key"]):
        raise DisagreementError(f"{place}: a key occurs twice in the split {split}")
    if not len(rows["key"]):
        raise DisagreementError(f"{place}: the split {split} is empty")
    return rows


def compare_rows(shards: list[Body], rows: Table, samples: Table, place: str) -> None:
    """samples.parquet has the keys and labels of the split, in order."""
    if len(samples["key"]) != len(rows["key"]):
        differ("the number of rows of samples.parquet", len(samples["key"]), len(rows["key"]))
    if rows["shard"].min() < 0 or rows["shard"].max() >= len(shards):
        raise UnusableError(f"{place}: index.parquet names a shard that is not listed")
    files = np.array([shard["file"] for shard in shards], dtype=object)[rows["shard"]]
    for name, due in (("shard", files), ("key", rows["key"]), ("label", rows["label"])):
        if (wrong := np.flatnonzero(samples[name] != due)).size:
            i = int(wrong[0])
            differ(f"samples.parquet row {i} {name}", samples[name][i], due[i])


class Shard:
    """A tar file in memory; members are found by name, and nothing is extracted."""

    def __init__(self, data: bytes, place: str) -> None:
        self._data = memoryview(data)
        self._place = place
        self._members: dict[str, tuple[int, int]] = {}
        for member in attempt(place, lambda: list(_members(data))):
            if member.name in self._members:
                raise DisagreementError(f"{place} has two members {shown(member.name)}")
            self._members[member.name] = (member.offset_data, member.size)

    def body(self, name: str) -> bytes:
        """Bytes of a member."""
        if name not in self._members:
            raise DisagreementError(f"{self._place} has no member {shown(name)}")
        offset, size = self._members[name]
        if not 0 <= size <= len(self._data) - offset:
            raise UnusableError(f"{self._place}: member {shown(name)} reaches past the end")
        return bytes(self._data[offset : offset + size])

    def label(self, key: str) -> int:
        """The class that the member KEY.cls states."""
        text = self.body(f"{key}.cls").strip()
        if not re.fullmatch(rb"[0-9]{1,9}", text):
            raise UnusableError(f"{self._place}: {shown(key)}.cls holds {shown(text)}, no class")
        return int(text)

    def pixels(
        self, key: str, extension: str, shape: tuple[int, int, int]
    ) -> npt.NDArray[np.uint8]:
        """Decoded image, shape (channels, height, width)."""
        place = f"{self._place}: {shown(key)}.{extension}"
        data = self.body(f"{key}.{extension}")
        return attempt(place, lambda: _decode(data, extension, shape, place))


def _members(data: bytes) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            if not member.isreg() or member.issparse():
                raise UnusableError(f"member {shown(member.name)} is not a regular file")
            yield member


def _decode(
    data: bytes, extension: str, shape: tuple[int, int, int], place: str
) -> npt.NDArray[np.uint8]:
    if extension not in FORMATS:
        raise UnusableError(f"{place} is not one of {', '.join(FORMATS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=[FORMATS[extension]]) as image:
            # Size and mode are known before a pixel is decoded.
            found = (len(image.getbands()), image.height, image.width)
            if image.mode not in ("L", "RGB") or found != shape:
                differ(f"{place} (mode, channels, height, width)", (image.mode, *found), shape)
            pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1))
