"""Named byte objects under a URL: local files, memory, S3 and whatever else fsspec reaches.

The only file of the project that imports fsspec, besides the independent verifier.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from data_shards.errors import ShardError
from data_shards.storage.http_objects import http_size
from data_shards.storage.multipart import part_bytes
from data_shards.storage.range_reader import (
    IN_FLIGHT,
    chunks_of,
    read_local_ranges,
    read_ranges,
)
from data_shards.storage.retry import RetryCount, with_retries
from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.limits import require

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_TEMPORARY = ".tmp"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_HTTP = ("http", "https")
_IN_PROCESS = ("file", "memory")  # no network: nothing to retry
_PIECE = 8 << 20  # a whole object is read in ranges of this, side by side
_KINDS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
          PermissionError, TimeoutError)  # fmt: skip
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
_HINTS = dict.fromkeys(_EXPIRED, "the credentials of the environment or profile have expired") | {
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "NoSuchBucket": "there is no such bucket",
}
_STALL_S = 10  # not the client's default of 60: a stalled body must not hold all ranks that long


class Store:
    """Objects below one URL, named by relative paths with `/`.

    A path without a scheme is a local directory. The filesystem object is made on first use in each
    process, so a store survives fork and pickling. `str(store)` leaves out credentials and query:
    messages use it, `url` is for opening.

    Reads, listings and whole writes of remote stores wait out 5xx, time-outs, resets and short
    bodies; `retries` counts the repetitions. Settings of a store (endpoint, profile, anonymous
    access, time-outs) come from its own environment variables and files and from fsspec's.

    Args:
        url: Of the place.
        patience_s: Seconds without a byte after which a request fails; None: those of `retry`.
    """

    def __init__(self, url: str | os.PathLike[str], *, patience_s: float | None = None) -> None:
        text = os.fspath(url)
        if not text:
            raise ShardError("a store needs a URL or a path, got an empty text")
        if "::" in text:
            raise ShardError(
                f"a URL of several filesystems is not opened: {text.split('://')[0]!r}"
            )
        scheme = text.split("://", 1)[0] if "://" in text else "file"
        if scheme in ("file", "local"):
            text = f"file://{LocalFileSystem._strip_protocol(os.path.expanduser(text))}"
            scheme = "file"
        elif not text.endswith("://"):
            text = text.rstrip("/")
        self.url: str = text
        self._scheme = scheme
        self._pid = -1
        self._filesystems: dict[bool, Any] = {}
        self._root = ""
        self._count = RetryCount(patience_s)

    @property
    def retries(self) -> int:
        """Requests of this object that were repeated after a fault of the store."""
        return self._count.value

    @property
    def lists(self) -> bool:
        """Whether the store can say what it holds; HTTP servers need not."""
        return self._scheme not in _HTTP

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
        """Open one object as a binary stream; missing local directories are made for writing.

        Streams of remote stores have the few retries of their client, which are not counted.
        """
        return cast(BinaryIO, self._fs(streams=True).open(self._path(name), mode))

    @contextlib.contextmanager
    def durable(self, name: str, *, size: int = 0) -> Iterator[BinaryIO]:
        """Open one object for writing; after the block its bytes are on the disk or in the store.

        A block that fails may leave a part of them in a local file; an object store, where nobody
        could tell a part from the whole, keeps what it had, and no parts.

        Args:
            name: Of the object.
            size: About how many bytes will be written; needed for objects of 450 GB and more.

        Raises:
            ShardError: S3 takes no object of that size, or no parts of the configured one.
        """
        options = self._part_bytes(name, size, "block_size")
        path = self._path(name)
        with _naming(path), self._fs(streams=True).open(path, "wb", **options) as stream:
            try:
                yield stream
                if isinstance(stream, AbstractBufferedFile):
                    stream.close()  # sends the last part
            except BaseException:
                if isinstance(stream, AbstractBufferedFile):
                    stream.closed = True  # closing would send what is there
                    with contextlib.suppress(Exception):  # the first error is the one to be told
                        stream.discard()
                raise
            if self.local_path() is not None:
                stream.flush()
                if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    os.fsync(stream.fileno())
        if self.local_path() is not None:
            _sync_directory(Path(self._path(name)).parent)

    def read(self, name: str, *, limit: str = "") -> bytes:
        """Return a whole object.

        Args:
            name: Of the object.
            limit: Field of `untrusted.limits.Limits` to which its size is held before it is read.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: it cannot be read, or is a device or a pipe.
            UntrustedError: it is larger than the limit.
        """
        in_process = self._scheme in _IN_PROCESS
        size = self.size(name) if limit or not in_process else 0
        if limit:
            require(size, limit, f"{self}/{name} has")
        if in_process:
            return self._read_here(name)
        starts = range(0, size, _PIECE)
        return b"".join(self.read_ranges([(name, s, min(s + _PIECE, size)) for s in starts]))

    def _read_here(self, name: str) -> bytes:
        path = self._path(name)
        if self._scheme == "file" and Path(path).exists():
            kind = Path(path).stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # without a size, or without an end
                raise OSError(f"{self}/{name} is a device or a pipe, not a file")
        return cast(bytes, self._fs().cat_file(path))

    def read_object(self, name: str) -> dict[str, Any]:
        """Return the JSON object that an object of the store holds.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: it cannot be read.
            UntrustedError: too large, too deep, or no JSON object.
        """
        return parse_object(self.read(name, limit="json_bytes"), f"{self}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Replace one object.

        On local files a reader sees the old or the new bytes, never a mix, and the new ones are on
        the disk when this returns.
        """
        local = self.local_path()
        if local is None:
            options = self._part_bytes(name, len(data), "chunksize")
            self._call(lambda: self._fs(streams=True).pipe_file(self._path(name), data, **options))
            return
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            with _naming(target), temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write one object unless it exists; of several writers at the same time one gets True.

        `data` should be the writer's own: by it a writer knows the object for its own when the
        answer to its request was lost and the repeated request is refused.

        On local files by a hard link to a finished file, on object stores by a conditional put
        (`If-None-Match: *`). A store that ignores the condition tells everyone True: whoever relies
        on it tries it once, with a name of its own.
        """
        if self.local_path() is not None:
            draft = f"{name}.{uuid.uuid4().hex}{_TEMPORARY}"
            self.write(draft, data)
            try:
                os.link(self._path(draft), self._path(name))
            except FileExistsError:
                return False
            finally:
                self.remove(draft)
            return True
        before = self.retries
        try:
            self._call(lambda: self._fs().pipe_file(self._path(name), data, mode="create"))
        except FileExistsError:
            return self.retries > before and self.read(name) == data
        return True

    def modified(self, name: str) -> float:
        """Return when one object was last written, seconds since the epoch by the store's clock.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return float(self._call(lambda: self._fs().modified(self._path(name))).timestamp())

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of one object; fewer if the object ends earlier."""
        return self.read_ranges([(name, start, stop)])[0]

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return bytes [start, stop) of each (name, start, stop), several in flight at once.

        Raises:
            FileNotFoundError: an object does not exist.
            OSError: it cannot be read.
        """
        wanted = [(self._path(name), start, stop) for name, start, stop in ranges]
        if self._scheme == "file":
            with self._clear_errors():
                return read_local_ranges(wanted)
        filesystem = self._fs()
        if not filesystem.async_impl:
            return [self._call(functools.partial(filesystem.cat_file, *w)) for w in wanted]
        with self._clear_errors():
            return self._with_new_credentials(lambda: self._read_async(wanted))

    def _read_async(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        filesystem = self._fs()
        return cast(
            list[bytes],
            sync(
                filesystem.loop,
                read_ranges,
                chunks_of(filesystem),
                wanted,
                describe=self._describe,
                count=self._count,
                stall_s=_stall_s(self._scheme),
            ),
        )

    def exists(self, name: str = "") -> bool:
        """Tell whether the object (or directory) exists."""
        if self._scheme in _HTTP:  # the client takes every failure for an absent object
            with contextlib.suppress(FileNotFoundError):
                return self.size(name) >= 0
            return False
        return bool(self._call(lambda: self._fs().exists(self._path(name))))

    def size(self, name: str) -> int:
        """Return the size of one object in bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """
        if self._scheme in _HTTP:
            filesystem, path = self._fs(), self._path(name)
            return self._call(lambda: sync(filesystem.loop, http_size, filesystem, path))
        return int(self._call(lambda: self._fs().size(self._path(name))))

    def sizes_of(self, names: Sequence[str]) -> dict[str, int]:
        """Return the bytes of those objects that exist: one listing per folder.

        An HTTP server need not list anything: there it is one request per object.
        """
        if self._scheme in _HTTP:
            with concurrent.futures.ThreadPoolExecutor(IN_FLIGHT) as executor:
                sizes = executor.map(self._size_or_none, names)
                return {n: size for n, size in zip(names, sizes, strict=True) if size is not None}
        listed: dict[str, int] = {}
        for folder in {name.rpartition("/")[0] for name in names}:
            listed |= self.sizes(folder)
        return {name: listed[name] for name in names if name in listed}

    def _size_or_none(self, name: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self.size(name)
        return None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return name and size in bytes of every object directly under `prefix`: one listing.

        A missing prefix is empty. Names are relative to this store. Directories have size 0.
        """
        return {name: size or 0 for name, size in self.entries(prefix).items()}

    def entries(self, prefix: str = "") -> dict[str, int | None]:
        """Return what `sizes` returns, with None instead of 0 for a directory."""
        path = self._path(prefix)
        try:
            entries = self._call(lambda: self._fs().ls(path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found: dict[str, int | None] = {}
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            is_self = entry["name"].strip("/") == path.strip("/")
            if not is_self and not (name.startswith(".") and name.endswith(_TEMPORARY)):
                size = None if entry["type"] == "directory" else int(entry["size"] or 0)
                found[f"{prefix.rstrip('/')}/{name}".lstrip("/")] = size
        return found

    def ls(self, prefix: str = "") -> list[str]:
        """Return the sorted names of objects and directories directly under `prefix`."""
        return sorted(self.sizes(prefix))

    def remove(self, name: str, *, recursive: bool = False) -> None:
        """Remove an object, or with `recursive` a whole prefix; a missing one is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._call(lambda: self._fs().rm(self._path(name), recursive=recursive))

    def remove_drafts(self) -> None:
        """Remove what writers left that died while they wrote below here; nobody may write now.

        These are hidden files, on S3 the parts of uploads that were not completed.
        """
        local = self.local_path()
        for draft in local.glob(f".*{_TEMPORARY}") if local else ():
            draft.unlink(missing_ok=True)
        if self._scheme == "s3":
            bucket, prefix, _ = self._fs().split_path(f"{self._path('')}/")
            self._call(lambda: self._abort_uploads(bucket, prefix))

    def _abort_uploads(self, bucket: str, prefix: str) -> None:
        filesystem = self._fs()
        where = {"Bucket": bucket, "Prefix": prefix}
        for upload in filesystem.call_s3("list_multipart_uploads", **where).get("Uploads", ()):
            with contextlib.suppress(FileNotFoundError):  # its writer gave up just now
                filesystem.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _part_bytes(self, name: str, size: int, option: str) -> dict[str, int]:
        """Return the option of the client that sets the bytes per part of an upload."""
        if self._scheme != "s3":
            return {}
        least = self._fs(streams=True).default_block_size
        return {option: part_bytes(size, least, f"{self}/{name}")}

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

    def _fs(self, *, streams: bool = False) -> Any:
        """Return the filesystem object of this process; for `streams` one that retries by itself.

        Raises:
            ShardError: fsspec does not know the scheme, or its package is not installed.
        """
        if self._pid != os.getpid():
            self._filesystems = {}
            self._pid = os.getpid()
        filesystem = self._filesystems.get(streams)
        if filesystem is None:
            options = _options(self._scheme, streams=streams)
            try:
                filesystem, self._root = fsspec.core.url_to_fs(self.url, **options)
            except (ImportError, ValueError) as error:
                raise ShardError(f"cannot open {self._describe(error)}") from None
            if self._scheme == "s3" and not streams:
                filesystem.retries = 1  # every repetition is ours, and counted
            self._filesystems[streams] = filesystem
        return filesystem

    def _call(self, operation: Callable[[], T]) -> T:
        if self._scheme in _IN_PROCESS:
            return operation()
        with self._clear_errors():
            return self._with_new_credentials(
                lambda: with_retries(operation, self._describe, self._count)
            )

    def _with_new_credentials(self, operation: Callable[[], T]) -> T:
        """Run an operation; where its credentials have expired, once more with those of now."""
        try:
            return operation()
        except Exception as error:
            if _code(error) not in _EXPIRED:
                raise
            _logger.warning("%s; reading the credentials anew", self._describe(error))
        for filesystem in self._filesystems.values():
            type(filesystem).clear_instance_cache()
        self._filesystems = {}
        self._count.add()
        return operation()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turn a client's own errors into OSError, and keep what the URL hides out of messages."""
        try:
            yield
        except (ShardError, TypeError, AssertionError):
            raise
        except Exception as error:
            kind = next((k for k in _KINDS if isinstance(error, k)), OSError)
            if _code(error) == "NoSuchBucket":
                kind = OSError  # an absent object is something to go on with, this is not
            raise kind(self._describe(error)) from None

    def _describe(self, error: Exception) -> str:
        """Return what went wrong where, without what the URL hides."""
        parts = urlsplit(self.url)
        text = f"{self}: {type(error).__name__}: {error}"
        if hint := _HINTS.get(_code(error)):
            text += f" ({hint})"
        for secret in (parts.netloc.rpartition("@")[0], parts.query, parts.password):
            text = text.replace(secret, "***") if secret else text
        return text

    def _path(self, name: str) -> str:
        _check_name(name, self)
        self._fs()
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Add the file to an error of the system that names none, such as a full disk."""
    try:
        yield
    except OSError as error:
        # A block may read elsewhere meanwhile: what went wrong there is not of this file.
        if error.errno in _OF_THE_DISK and error.filename is None:
            error.filename = str(path)
        raise


def _code(error: Exception) -> str:
    """Return the store's own name of an error, "" if it has none."""
    for known in (error, error.__cause__):
        response = getattr(known, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _check_name(name: str, store: Store) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise ShardError(f"name {name!r} would leave the store {store}")


def _options(scheme: str, *, streams: bool) -> dict[str, Any]:
    """Return the options of a filesystem; what fsspec's own configuration says wins."""
    if scheme == "file":
        return {"auto_mkdir": True}
    # A cached listing would hide what other processes wrote.
    options = {"use_listings_cache": False, **fsspec.config.conf.get(scheme, {})}
    if scheme != "s3":
        return options
    configured = fsspec.config.conf.get("s3", {})
    endpoint = configured.get("endpoint_url") or os.environ.get(
        "AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL")
    )
    config: dict[str, Any] = {
        "read_timeout": _STALL_S,
        "connect_timeout": 5,
        "max_pool_connections": IN_FLIGHT,
        # Checksums that stores other than AWS lack are not asked for.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if endpoint:
        config["s3"] = {"addressing_style": "path"}  # other stores have no host name per bucket
    if not streams:
        config["retries"] = {"mode": "standard", "total_max_attempts": 1}
    if endpoint:  # it also separates the filesystem objects that fsspec keeps
        options["endpoint_url"] = endpoint
    return {**options, "config_kwargs": {**config, **configured.get("config_kwargs", {})}}


def _stall_s(scheme: str) -> float:
    return float(
        _options(scheme, streams=False).get("config_kwargs", {}).get("read_timeout", _STALL_S)
    )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
