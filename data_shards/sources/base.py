"""What a source of images is, and the parts that all of them hold out."""

import dataclasses
import io
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_shards.errors import ShardError
from data_shards.rng import philox_words

TEST, VALIDATION = 200, 201  # purposes of the words that choose the parts
HELD_OUT = 0.2
MOST_HELD_OUT = 10_000
"""Share of a training split that is its validation part, and the most images of it."""
_SPLIT_SEED = 0

Pixels = npt.NDArray[np.uint8]


def keep(data: bytes, test: bool) -> bytes:
    """Return the bytes as they are: a source whose images are made to be stored."""
    return data


@dataclasses.dataclass(frozen=True)
class Source:
    """Images to be written as shards; picklable, because several processes write.

    Labels, splits and the bytes of every image depend on `parameters` and on the archives alone.
    """

    name: str
    """Name of the set."""
    image_shape: tuple[int, int, int]
    """(C, H, W) that a network sees; every stored test image has it."""
    class_names: tuple[str, ...]
    """One name per class."""
    labels: npt.NDArray[np.int64]
    """Label of every image."""
    test: npt.NDArray[np.bool_]
    """True for images of the test split; the others are the train split."""
    validation: npt.NDArray[np.bool_]
    """True for the train images that "validation" holds and "fit" lacks."""
    load: Callable[[Sequence[int]], list[bytes]]
    """Numbers of images -> their bytes in the archive; several at once, as requests overlap."""
    parameters: Mapping[str, Any]
    """What identifies the content, for the header."""
    convert: Callable[[bytes, bool], bytes] = keep
    """(bytes in the archive, is of the test split) -> bytes to store, or UndecodableError."""
    uniform: bool = True
    """All train images have the image shape too; otherwise they differ and a stream crops them."""
    sizes: npt.NDArray[np.int64] | None = None
    """Bytes of every image in the archive, where known without reading."""
    names: npt.NDArray[np.bytes_] | None = None
    """Name of every image in the archive, for the report."""
    other_files: int = 0
    """Entries of the archive that are no images of the set and were left aside."""
    not_taken: tuple[tuple[str, str], ...] = ()
    """(name, cause) of each of them, where the source tells them apart."""

    def encode(self, number: int) -> bytes:
        """Return the bytes that are stored for one image.

        Raises:
            ShardError: it cannot be read or decoded.
        """
        return self.convert(self.load([number])[0], bool(self.test[number]))

    def name_of(self, number: int) -> str:
        """Return the name of an image in the archive; bytes that are not UTF-8 as surrogates."""
        return str(number) if self.names is None else os.fsdecode(self.names[number])

    def describe(self, number: int) -> str:
        """Return the name of an image in the archive as a text that can be printed."""
        return printable(self.name_of(number))


def printable(name: str) -> str:
    r"""Return a file name with every byte that is not UTF-8 written as `\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return a PNG of uint8 pixels (H, W) or (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def hold_out(
    labels: npt.NDArray[np.int64],
    among: npt.NDArray[np.bool_],
    purpose: int,
    *,
    fraction: float = HELD_OUT,
    most: int = MOST_HELD_OUT,
) -> npt.NDArray[np.bool_]:
    """Flag a part of the samples in `among`, rounded up in all; by default a fifth, at most 10,000.

    Classes get their shares by largest remainder; the members of a class by their random words,
    which depend on the number of a sample alone.

    Args:
        labels: Label of every sample.
        among: The samples to choose from.
        purpose: Separates the choice of `TEST` from that of `VALIDATION`.
        fraction: Part to flag.
        most: Largest number to flag.
    """
    counts = np.bincount(labels[among])
    total = min(int(np.ceil(counts.sum() * fraction)), most)
    # Not total / sum: rounding must not depend on the limit where that does not bind.
    share = fraction if total < most else total / counts.sum()
    quotas = np.floor(counts * share).astype(int)
    remainders = counts * share - quotas
    quotas[np.argsort(-remainders, kind="stable")[: total - quotas.sum()]] += 1
    words = philox_words(_SPLIT_SEED, 0, purpose=purpose, count=len(labels))[:, 0]
    held_out = np.zeros(len(labels), dtype=bool)
    members = np.flatnonzero(among)
    members = members[np.lexsort((words[members], labels[members]))]
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(members)) - starts[labels[members]]
    held_out[members[rank < quotas[labels[members]]]] = True
    return held_out


def hold_out_test(
    labels: npt.NDArray[np.int64], first: npt.NDArray[np.int64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Flag the test split of a source that has none; images with the same bytes go together.

    Args:
        labels: Label of every image.
        first: Number of the first image with the same bytes, of every image.
        fraction: Part of the different images to flag.

    Raises:
        ShardError: not a part of them.
    """
    if not 0 < fraction < 1:
        raise ShardError(f"a part of {fraction} cannot be held out: it must be in (0, 1)")
    different = first == np.arange(len(labels))
    return hold_out(labels, different, TEST, fraction=fraction, most=len(labels))[first]


def with_validation(source: Source, samples: int) -> Source:
    """The source with so many train images in "validation".

    Raises:
        ShardError: not at least one, or none would be left to train on.
    """
    train = int((~source.test).sum())
    if not 0 < samples < train:
        raise ShardError(
            f"{samples} images for validation: must be from 1 to {train - 1}, {source.name} has "
            f"{train} train images"
        )
    return dataclasses.replace(
        source,
        validation=hold_out(
            source.labels, ~source.test, VALIDATION, fraction=samples / train, most=samples
        ),
        parameters={**source.parameters, "validation_samples": samples},
    )


def checksum(data: bytes, stated: int, what: str) -> None:
    """Compare the CRC-32 of some bytes.

    Raises:
        ShardError: another one than stated.
    """
    if zlib.crc32(data) != stated:
        raise ShardError(f"{what}: CRC-32 {zlib.crc32(data):08x}, the archive states {stated:08x}")


class PackedImages:
    """All images of a set that fits into memory, (N, H, W) or (N, H, W, 3); pickled without them.

    Args:
        read: Returns the pixels; picklable.
    """

    def __init__(self, read: Callable[[], Pixels]) -> None:
        self._read = read
        self._pixels: Pixels | None = None

    def __call__(self, numbers: Sequence[int]) -> list[bytes]:
        """Return some images as PNG."""
        if self._pixels is None:
            self._pixels = self._read()
        return [encode_png(self._pixels[i]) for i in numbers]

    def __reduce__(self) -> tuple[type["PackedImages"], tuple[Any]]:
        return PackedImages, (self._read,)
