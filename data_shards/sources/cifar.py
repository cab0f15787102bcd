"""CIFAR-10 and CIFAR-100 from the official binary archives.

A record is one label byte (CIFAR-100: the coarse, then the fine label) and 3,072 bytes of pixels,
channels first. The archives of pickles are not read.
"""

import dataclasses
import functools
import tarfile
import zlib

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.sources.archive import locate, open_file
from data_shards.sources.base import VALIDATION, PackedImages, Source, hold_out
from data_shards.storage.store import Store

_SIDE = 32
_MAX_TEXT = 1 << 16


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Names and sizes inside one of the two archives."""

    name: str
    archive: str
    train: tuple[str, ...]
    test: str
    class_names: str
    classes: int
    label_bytes: int
    train_records: int
    """Records per train file."""
    test_records: int = 10_000

    @property
    def record(self) -> int:
        return self.label_bytes + 3 * _SIDE * _SIDE


_CIFAR10 = _Layout(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test="test_batch.bin",
    class_names="batches.meta.txt",
    classes=10,
    label_bytes=1,
    train_records=10_000,
)
_CIFAR100 = _Layout(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    train=("train.bin",),
    test="test.bin",
    class_names="fine_label_names.txt",
    classes=100,
    label_bytes=2,
    train_records=50_000,
)


def cifar10(source: str) -> Source:
    """CIFAR-10: 50,000 train and 10,000 test images 3x32x32, stored as PNG.

    Args:
        source: `cifar-10-binary.tar.gz` or its folder, a path or any fsspec URL.

    Raises:
        ShardError: no such archive, or not the official content.
    """
    return _cifar(source, _CIFAR10)


def cifar100(source: str) -> Source:
    """CIFAR-100 with its fine labels: 50,000 train and 10,000 test images 3x32x32, as PNG.

    Args:
        source: `cifar-100-binary.tar.gz` or its folder, a path or any fsspec URL.

    Raises:
        ShardError: no such archive, or not the official content.
    """
    return _cifar(source, _CIFAR100)


def _cifar(url: str, layout: _Layout) -> Source:
    store, _ = locate(url, layout.archive)
    files = _read_archive(store, layout)
    records = _records(store, layout, files)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    where = f"{store}/{layout.archive}"
    if labels.max() >= layout.classes:
        raise ShardError(f"{where}: label {labels.max()} is not in [0, {layout.classes})")
    names = tuple(files[layout.class_names].decode("utf-8", "replace").split())
    if len(names) != layout.classes:
        raise ShardError(f"{where}: {len(names)} class names, expected {layout.classes}")
    test = np.arange(len(labels)) >= len(labels) - layout.test_records
    return Source(
        name=layout.name,
        image_shape=(3, _SIDE, _SIDE),
        class_names=names,
        labels=labels,
        test=test,
        validation=hold_out(labels, ~test, VALIDATION),
        load=PackedImages(functools.partial(_read_pixels, store, layout)),
        parameters={"source": layout.name},
    )


def _read_pixels(store: Store, layout: _Layout) -> npt.NDArray[np.uint8]:
    records = _records(store, layout, _read_archive(store, layout))
    pixels = records[:, layout.label_bytes :].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _records(store: Store, layout: _Layout, files: dict[str, bytes]) -> npt.NDArray[np.uint8]:
    counts = dict.fromkeys(layout.train, layout.train_records)
    counts[layout.test] = layout.test_records
    for name, count in counts.items():
        if len(files[name]) != count * layout.record:
            raise ShardError(
                f"{store}/{layout.archive}: {name} has {len(files[name])} bytes, expected "
                f"{count} records of {layout.record}"
            )
    parts = [np.frombuffer(files[name], dtype=np.uint8) for name in counts]
    return np.concatenate(parts).reshape(-1, layout.record)


def _read_archive(store: Store, layout: _Layout) -> dict[str, bytes]:
    """Return the content of the files that are needed, by name without folder."""
    limits = dict.fromkeys(layout.train, layout.train_records * layout.record)
    limits |= {layout.test: layout.test_records * layout.record, layout.class_names: _MAX_TEXT}
    found: dict[str, bytes] = {}
    try:
        with (
            open_file(store, layout.archive) as file,
            tarfile.open(fileobj=file, mode="r|gz") as tar,
        ):
            for member in tar:
                name = member.name.rpartition("/")[2]
                body = tar.extractfile(member) if name in limits and member.isreg() else None
                if body is not None:
                    found[name] = body.read(limits[name] + 1)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ShardError(f"cannot read {store}/{layout.archive}: {error}") from error
    missing = set(limits) - set(found)
    if missing:
        raise ShardError(f"{store}/{layout.archive} has no {', '.join(sorted(missing))}")
    return found
