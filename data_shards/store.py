"""Named byte objects under a URL: local files, memory, S3 and whatever else fsspec reaches.

The only file of the project that imports fsspec.
"""

import contextlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_shards.errors import ShardError

_TEMPORARY = ".tmp"
# S3: a stalled body must not hold a run for the default 60 s; checksums that stores other than AWS
# lack are not asked for; a cached listing would hide what other processes wrote.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {
            "read_timeout": 10,
            "connect_timeout": 5,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    },
    "file": {"auto_mkdir": True},
}


class Store:
    """Objects below one URL, named by relative paths with `/`.

    A path without a scheme is a local directory. The filesystem object is made on first use in each
    process, so a store survives fork and pickling. `str(store)` leaves out credentials and query:
    messages use it, `url` is for opening.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        text = os.fspath(url)
        if not text:
            raise ShardError("a store needs a URL or a path, got an empty text")
        scheme = text.split("://", 1)[0] if "://" in text else "file"
        if scheme in ("file", "local"):
            text = f"file://{LocalFileSystem._strip_protocol(os.path.expanduser(text))}"
            scheme = "file"
        elif not text.endswith("://"):
            text = text.rstrip("/")
        self.url: str = text
        self._scheme = scheme
        self._pid = -1
        self._filesystem: Any = None
        self._root = ""

    def __str__(self) -> str:
        if self._scheme == "file":
            return self.url
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def __repr__(self) -> str:
        return f"Store({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.url,)

    def open(self, name: str, mode: str = "rb") -> BinaryIO:
        """Open one object as a binary stream; missing local directories are made for writing."""
        return cast(BinaryIO, self._fs().open(self._path(name), mode))

    def read(self, name: str) -> bytes:
        """Return a whole object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return cast(bytes, self._fs().cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Replace one object.

        On local files a reader sees the old or the new bytes, never a mix, and the new ones are on
        the disk when this returns.
        """
        local = self.local_path()
        if local is None:
            self._fs().pipe_file(self._path(name), data)
            return
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of one object; fewer if the object ends earlier."""
        return self.read_ranges([(name, start, stop)])[0]

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return bytes [start, stop) of each (name, start, stop), several in flight at once.

        Raises:
            FileNotFoundError: an object does not exist.
        """
        paths, starts, stops = zip(*ranges, strict=True) if ranges else ((), (), ())
        paths = tuple(self._path(name) for name in paths)
        return list(self._fs().cat_ranges(list(paths), list(starts), list(stops), on_error="raise"))

    def exists(self, name: str = "") -> bool:
        """Tell whether the object (or directory) exists."""
        return bool(self._fs().exists(self._path(name)))

    def size(self, name: str) -> int:
        """Return the size of one object in bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return int(self._fs().size(self._path(name)))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return name and size in bytes of every object directly under `prefix`: one listing.

        A missing prefix is empty. Names are relative to this store. Directories have size 0.
        """
        path = self._path(prefix)
        try:
            entries = self._fs().ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            is_self = entry["name"].strip("/") == path.strip("/")
            if not is_self and not (name.startswith(".") and name.endswith(_TEMPORARY)):
                found[f"{prefix.rstrip('/')}/{name}".lstrip("/")] = int(entry["size"] or 0)
        return found

    def ls(self, prefix: str = "") -> list[str]:
        """Return the sorted names of objects and directories directly under `prefix`."""
        return sorted(self.sizes(prefix))

    def remove(self, name: str, *, recursive: bool = False) -> None:
        """Remove an object, or with `recursive` a whole prefix; a missing one is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs().rm(self._path(name), recursive=recursive)

    def child(self, *parts: str) -> "Store":
        """Return the store of a directory below this one."""
        for part in parts:
            _check_name(part, self)
        return Store("/".join([self.url.rstrip("/"), *(part.strip("/") for part in parts)]))

    def local_path(self) -> Path | None:
        """Return the directory on this machine, or None for any other kind of store."""
        return Path(self.url.removeprefix("file://")) if self._scheme == "file" else None

    def arrow(self) -> tuple[Any, str]:
        """Return the same place as a pyarrow filesystem and a path in it (for Ray Train)."""
        from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

        if self.local_path() is not None:
            return LocalFileSystem(), str(self.local_path())
        return PyFileSystem(FSSpecHandler(self._fs())), self._path("")

    def _fs(self) -> Any:
        if self._pid != os.getpid():
            options = _OPTIONS.get(self._scheme, {})
            self._filesystem, self._root = fsspec.core.url_to_fs(self.url, **options)
            self._pid = os.getpid()
        return self._filesystem

    def _path(self, name: str) -> str:
        _check_name(name, self)
        self._fs()
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


def _check_name(name: str, store: Store) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise ShardError(f"name {name!r} would leave the store {store}")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
