"""Where the bytes of images lie in archives on a store, and how they are read at random."""

import dataclasses
import io
from collections.abc import Sequence
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.storage.store import Store

_REMOTE_BLOCK = 4 << 20  # a request costs as much time as some megabytes


@dataclasses.dataclass(frozen=True)
class Members:
    """A range of bytes of a file per image, all files in one store."""

    store: Store
    files: tuple[str, ...]
    file: npt.NDArray[np.int64]
    """Place of its file, per image."""
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]

    def __call__(self, numbers: Sequence[int]) -> list[bytes]:
        """Return the bytes of some images, read side by side.

        Raises:
            ShardError: they cannot be read, or a file ends early.
        """
        ranges = [
            (self.files[self.file[i]], int(self.offset[i]), int(self.offset[i] + self.size[i]))
            for i in numbers
        ]
        wanted = [r for r in ranges if r[1] < r[2]]
        try:
            found = iter(self.store.read_ranges(wanted))
        except OSError as error:
            raise ShardError(f"cannot read images from {self.store}: {error}") from error
        bodies = [next(found) if start < stop else b"" for _, start, stop in ranges]
        for (name, start, stop), body in zip(ranges, bodies, strict=True):
            if len(body) != stop - start:
                raise ShardError(
                    f"{self.store}/{name}: {len(body)} bytes at offset {start}, expected "
                    f"{stop - start}: the file changed"
                )
        return bodies


def locate(url: str, name: str) -> tuple[Store, str]:
    """Return the store and the name of an archive, given its folder or itself.

    Raises:
        ShardError: there is no such archive.
    """
    if url.rstrip("/").endswith(name):
        url = url.rstrip("/")[: -len(name)] or "."
    store = Store(url)
    require(store, name)
    return store, name


def require(store: Store, *names: str) -> None:
    """Check that files exist.

    Raises:
        ShardError: some do not; the message names them all.
    """
    missing = [name for name in names if not store.exists(name)]
    if missing:
        raise ShardError(f"{store} has no {', '.join(missing)}")


def read_small(store: Store, name: str, limit: int) -> bytes:
    """Return a whole file.

    Raises:
        ShardError: it is larger than `limit` bytes, or cannot be read.
    """
    try:
        size = store.size(name)
        if size > limit:
            raise ShardError(f"{store}/{name} has {size} bytes, more than {limit}")
        return store.read(name)
    except OSError as error:
        raise ShardError(f"cannot read {store}/{name}: {error}") from error


def open_file(store: Store, name: str) -> BinaryIO:
    """Open a file for many small reads; on a remote store in ranges of 4 MiB, with its retries."""
    if store.local_path() is not None:
        return store.open(name)
    return cast(BinaryIO, io.BufferedReader(_Ranges(store, name), _REMOTE_BLOCK))


class _Ranges(io.RawIOBase):
    """A file of a store read by ranges."""

    def __init__(self, store: Store, name: str) -> None:
        super().__init__()
        self._store, self._name, self._size = store, name, store.size(name)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._store.read_range(self._name, self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
