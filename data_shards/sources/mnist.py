"""MNIST, and sets published in its layout, from the four idx files."""

import functools
import gzip
import math
import struct
import zlib

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.sources.archive import open_file, require
from data_shards.sources.base import VALIDATION, PackedImages, Source, hold_out
from data_shards.storage.store import Store

_PARTS = ("train", "t10k")
_CLASSES = 10
_MAX_BYTES = 1 << 30
_UINT8 = 0x08


def mnist(source: str) -> Source:
    """MNIST: 60,000 train and 10,000 test images 1x28x28, stored as PNG.

    Args:
        source: Folder of `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the two
            `t10k` files, a path or any fsspec URL.

    Raises:
        ShardError: a file is missing, damaged or of another layout.
    """
    store = Store(source)
    require(store, *(_file(part, kind) for part in _PARTS for kind in ("images", "labels")))
    labels = [_read_idx(store, _file(part, "labels"), 1) for part in _PARTS]
    pixels = _read_pixels(store)
    joined = np.concatenate(labels).astype(np.int64)
    if len(pixels) != len(joined):
        raise ShardError(f"{store}: {len(pixels)} images and {len(joined)} labels")
    if joined.max() >= _CLASSES:
        raise ShardError(f"{store}: label {joined.max()} is not in [0, {_CLASSES})")
    test = np.arange(len(joined)) >= len(labels[0])
    height, width = pixels.shape[1:]
    return Source(
        name="mnist",
        image_shape=(1, height, width),
        class_names=tuple(str(digit) for digit in range(_CLASSES)),
        labels=joined,
        test=test,
        validation=hold_out(joined, ~test, VALIDATION),
        load=PackedImages(functools.partial(_read_pixels, store)),
        parameters={"source": "mnist"},
    )


def _file(part: str, kind: str) -> str:
    return f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"


def _read_pixels(store: Store) -> npt.NDArray[np.uint8]:
    return np.concatenate([_read_idx(store, _file(part, "images"), 3) for part in _PARTS])


def _read_idx(store: Store, name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """Return the array of an idx file of bytes: 0, 0, type, dimensions, sizes, content."""
    try:
        with open_file(store, name) as file, gzip.GzipFile(fileobj=file) as unpacked:
            head = unpacked.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, _UINT8, dimensions)):
                raise ShardError(
                    f"{store}/{name} begins with {head[:4].hex()}, not with that of an idx file "
                    f"of bytes in {dimensions} dimensions"
                )
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = math.prod(shape)
            if size > _MAX_BYTES:
                raise ShardError(f"{store}/{name} declares {size} bytes, more than {_MAX_BYTES}")
            data = unpacked.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ShardError(f"cannot read {store}/{name}: {error}") from error
    if len(data) != size:
        raise ShardError(f"{store}/{name} does not hold the {size} bytes that it declares")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
