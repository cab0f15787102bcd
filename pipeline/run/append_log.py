"""Append-only lines on the local disk, which a full disk delays and does not tear."""

import contextlib
import errno
import logging
import os
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16


class AppendLog:
    """A file that only grows, by whole lines.

    What cannot be written (a full disk, a limit) waits in memory and goes into the file, in order,
    with a later call. A line that a dead process left half written is dropped.

    Args:
        path: the file; its folder exists.

    Attributes:
        path: the file.
        end: bytes of all lines so far, those that wait included.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("a+b") as file:
            file.truncate(_end_of_lines(file))
        self.end = self._written = path.stat().st_size
        self._waiting: list[bytes] = []
        self._torn = False

    def append(self, line: bytes) -> int:
        """Add a line, which ends with a newline; returns where it ends in the file."""
        self._waiting.append(line)
        self.end += len(line)
        self.flush()
        return self.end

    def flush(self) -> None:
        """Try to write what waits."""
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        try:
            if self._torn:
                self._cut()
            with self.path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if len(self._waiting) == 1:  # the first of this outage
                logger.warning("%s: %s; lines wait in memory", self.path, error)
            self._torn = True
            with contextlib.suppress(OSError):  # else before the next attempt
                self._cut()
            return
        self._written += len(data)
        self._waiting.clear()

    def _cut(self) -> None:
        """Take back what an attempt that failed has left."""
        os.truncate(self.path, self._written)
        self._torn = False


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends, which is read from its end, by blocks."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
