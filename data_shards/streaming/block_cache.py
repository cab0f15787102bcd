"""Blocks of remote shards on a local disk, shared by the processes of a node.

A block is a file named by set, shard and number, written beside its place and renamed, so a crash
leaves nothing that looks whole. Whoever fetches a block holds a lock on the file being written; the
other processes wait for it instead of fetching the same bytes. A file of a wrong size is dropped
when it is opened; wrong bytes are found by the digest of the sample read from it, and `forget`
drops the block.
"""

import concurrent.futures
import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_shards.config import MIB
from data_shards.errors import ShardError
from data_shards.format.shard_index import ShardIndex
from data_shards.storage.retry import PATIENCE_S

_logger = logging.getLogger(__name__)

BLOCK = 4 * MIB
_AT_ONCE = 8  # blocks under way to the disk, held in memory
_PART = ".part"
_SET = re.compile(r"[0-9a-f]{24}")  # folder of a set in the cache
_BLOCK_NAME = re.compile(rf"\d{{6,}}-\d{{6,}}({re.escape(_PART)})?")
_POLL_S = 0.02
_SCANS = 64  # bytes written between two looks at the size of the cache, as a part of its bound

Range = tuple[str, int, int]
_Block = tuple[str, int]


class BlockCache:
    """Ranges of a shard set through a directory.

    Args:
        index: The shard set.
        directory: Where the blocks are kept; made if needed. Several sets may share it.
        max_bytes: Bound on all blocks in the directory, exceeded by a 64th per process at most.

    Raises:
        ShardError: the directory cannot be written.
    """

    def __init__(self, index: ShardIndex, directory: str, max_bytes: int) -> None:
        self._files = index.files
        self._sizes = {shard.file: shard.size for shard in index.shards}
        self._numbers = {shard.file: shard.number for shard in index.shards}
        self._root = Path(directory).expanduser()
        self._directory = self._root / index.digest[:24]
        self._max_bytes = max_bytes
        self._written = max_bytes  # the first block written looks at what is there
        self._writable = True
        self._pending: dict[_Block, concurrent.futures.Future[bool]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "data_shards_cache")
        self._scanning = threading.Lock()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(f"disk_cache {directory!r} cannot be written: {error}") from error

    def read_ranges(self, ranges: Sequence[Range], *, fill: bool = True) -> list[bytes]:
        """Return bytes [start, stop) of each (file, start, stop), fetching the blocks they lack.

        Args:
            ranges: What to read.
            fill: Whether blocks that are missing are fetched whole; otherwise, as for a range whose
                block cannot be kept, the range alone is read from the store.

        Raises:
            OSError: the store cannot be read.
        """
        if fill:
            self.prefetch(ranges)
            blocks = {block: None for wanted in ranges for block in self._blocks(wanted)}
            fetched = {b: self._pending.pop(b).result() for b in blocks if b in self._pending}
            for block, elsewhere in fetched.items():
                if elsewhere:
                    self._wait(block)
        with contextlib.ExitStack() as stack:
            opened: dict[_Block, int | None] = {}
            found = [self._read(wanted, opened, stack) for wanted in ranges]
        missing = [i for i, data in enumerate(found) if data is None]
        direct = self._files.read_ranges([ranges[i] for i in missing])
        for i, data in zip(missing, direct, strict=True):
            found[i] = data
        return [data for data in found if data is not None]

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Begin to fetch the blocks of ranges that are about to be read."""
        if not self._writable:
            return
        for block in {block: None for wanted in ranges for block in self._blocks(wanted)}:
            if block not in self._pending and not self._path(block).exists():
                self._pending[block] = self._pool.submit(self._fetch, block)

    def lacking(self, ranges: Sequence[Range]) -> int:
        """How many blocks of ranges are not on the disk."""
        blocks = {block for wanted in ranges for block in self._blocks(wanted)}
        return sum(not self._path(block).exists() for block in blocks)

    def close(self) -> None:
        """Give up what was not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, wanted: Range) -> None:
        """Drop the blocks of a range: what they hold is not what the store should."""
        for block in self._blocks(wanted):
            self._path(block).unlink(missing_ok=True)

    def _blocks(self, wanted: Range) -> list[_Block]:
        file, start, stop = wanted
        return [(file, number) for number in range(start // BLOCK, -(-stop // BLOCK))]

    def _path(self, block: _Block) -> Path:
        return self._directory / f"{self._numbers[block[0]]:06d}-{block[1]:06d}"

    def _extent(self, block: _Block) -> Range:
        start = block[1] * BLOCK
        return block[0], start, min(start + BLOCK, self._sizes[block[0]])

    def _read(
        self, wanted: Range, opened: dict[_Block, int | None], stack: contextlib.ExitStack
    ) -> bytes | None:
        """Return a range from blocks on the disk, None if one is not there."""
        _, start, stop = wanted
        parts = []
        for block in self._blocks(wanted):
            if block not in opened:
                opened[block] = self._open(block, stack)
            descriptor = opened[block]
            if descriptor is None:
                return None
            _, first, last = self._extent(block)
            begin = max(start, first)
            parts.append(os.pread(descriptor, min(stop, last) - begin, begin - first))
        return b"".join(parts)

    def _open(self, block: _Block, stack: contextlib.ExitStack) -> int | None:
        path = self._path(block)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        stack.callback(os.close, descriptor)
        _, start, stop = self._extent(block)
        if os.fstat(descriptor).st_size != stop - start:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: goes last
        return descriptor

    def _fetch(self, block: _Block) -> bool:
        """Fetch a block unless another process is doing so; tell whether that is the case."""
        with contextlib.ExitStack() as stack:
            descriptor = self._claim(block, stack)
            if descriptor is None:
                return True
            if self._path(block).exists():  # its last holder has just finished
                self._path(block).with_suffix(_PART).unlink(missing_ok=True)
            else:
                self._keep(block, descriptor, self._files.read_ranges([self._extent(block)])[0])
            return False

    def _claim(self, block: _Block, stack: contextlib.ExitStack) -> int | None:
        """Lock the file in which a block is made; None if another process holds it."""
        part = self._path(block).with_suffix(_PART)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(part, flags, 0o600)
        except OSError as error:
            self._give_up(error)
            return None
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        return descriptor

    def _keep(self, block: _Block, descriptor: int, content: bytes) -> None:
        path = self._path(block)
        part = path.with_suffix(_PART)
        _, start, stop = self._extent(block)
        try:
            if len(content) != stop - start:  # the shard was cut: its samples will say so
                part.unlink(missing_ok=True)
                return
            os.ftruncate(descriptor, 0)
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            part.rename(path)
        except FileNotFoundError:  # evicted on the way: the range is read directly
            return
        except OSError as error:
            part.unlink(missing_ok=True)
            self._give_up(error)
            return
        with self._scanning:
            self._written += len(content)
            if self._written >= self._max_bytes // _SCANS:
                self._written = 0
                self._evict()

    def _wait(self, block: _Block) -> None:
        """Wait while another process fetches a block."""
        deadline = time.monotonic() + PATIENCE_S
        part = self._path(block).with_suffix(_PART)
        while part.exists() and time.monotonic() < deadline:
            with contextlib.ExitStack() as stack:
                if self._claim(block, stack) is not None:
                    part.unlink(missing_ok=True)  # its maker has gone or failed
                    return
            time.sleep(_POLL_S)

    def _give_up(self, error: OSError) -> None:
        if self._writable:
            _logger.warning("disk cache %s is not written any more: %s", self._root, error)
        self._writable = False

    def _evict(self) -> None:
        """Remove the least recently used blocks until nine tenths of the bound are left."""
        with _sole(self._root / "evict.lock") as mine:
            if not mine:
                return
            files = []
            for directory in self._root.iterdir():
                if _SET.fullmatch(directory.name) and directory.is_dir():
                    files += list(_files(directory))
            total = sum(size for _, size, _ in files)
            if total <= self._max_bytes:
                return
            for _, size, path in sorted(files):
                Path(path).unlink(missing_ok=True)
                total -= size
                if total <= self._max_bytes * 0.9:
                    return


def _files(directory: Path) -> Iterator[tuple[int, int, str]]:
    """Yield time of last use, size and path of each block; other files are somebody's own."""
    for entry in os.scandir(directory):
        if not _BLOCK_NAME.fullmatch(entry.name):
            continue
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            yield status.st_mtime_ns, status.st_size, entry.path


@contextlib.contextmanager
def _sole(path: Path) -> Iterator[bool]:
    """Tell whether this is the only process in the block."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)
