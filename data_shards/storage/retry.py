"""Which faults of a store pass by themselves, and how long to wait for that."""

import asyncio
import errno
import http.client
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

_logger = logging.getLogger(__name__)

T = TypeVar("T")
Describe = Callable[[Exception], str]

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
# A service that restarts is back by then, and the other ranks still wait in their collective.
PATIENCE_S = 120.0

# What a store says about the request itself: asking again changes nothing.
_PERMANENT_ERRNO = frozenset(
    {
        errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.EMSGSIZE,
        errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOSYS, errno.ENOTDIR,
        errno.ENOTEMPTY, errno.EPERM, errno.EROFS, getattr(errno, "EREMCHG", errno.ENOENT),
    }
)  # fmt: skip


class RangeRefusedError(OSError):
    """A server answers a request for a range with other bytes: asking again changes nothing."""


_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError,
              RangeRefusedError)  # fmt: skip
_BUSY = (408, 425, 429)  # of the statuses below 500, those that pass by themselves


class RetryCount:
    """Faults that were waited out; threads share it.

    Args:
        patience_s: Seconds without a byte after which a request fails; None: `PATIENCE_S`.
    """

    def __init__(self, patience_s: float | None = None) -> None:
        self._lock = threading.Lock()
        self._patience_s = patience_s
        self.value = 0

    @property
    def patience_s(self) -> float:
        """Seconds without a byte after which a request fails."""
        return PATIENCE_S if self._patience_s is None else self._patience_s

    def add(self) -> None:
        """Count one more."""
        with self._lock:
            self.value += 1


class RetryBudget:
    """The attempts of one request: back-off with jitter until nothing has moved for too long.

    Args:
        describe: Returns an error as a text for the log, free of secrets.
        count: Where a repetition is counted; it says how long to go on.
    """

    def __init__(self, describe: Describe, count: RetryCount) -> None:
        self._describe = describe
        self._count = count
        self._attempts = 0
        self._since = time.monotonic()

    def progress(self) -> None:
        """Note that bytes arrived: the store is alive."""
        self._attempts = 0
        self._since = time.monotonic()

    def pause(self, error: Exception) -> float:
        """Return how long to wait before the next attempt, in seconds.

        Raises:
            Exception: `error`, if it is permanent or nothing arrived for `patience_s` of the count.
        """
        waited = time.monotonic() - self._since
        if not is_transient(error) or waited > self._count.patience_s:
            raise error
        if self._attempts == 0:
            _logger.warning("%s; trying again", self._describe(error))
        self._count.add()
        longest = min(FIRST_PAUSE_S * 2**self._attempts, LONGEST_PAUSE_S)
        self._attempts += 1
        # Ranks that failed together must not come back together.
        return longest * random.uniform(0.5, 1.0)


def with_retries(operation: Callable[[], T], describe: Describe, count: RetryCount) -> T:
    """Return what `operation` returns, repeating it while it meets transient faults.

    Raises:
        Exception: the last error of the operation.
    """
    patience = RetryBudget(describe, count)
    while True:
        try:
            return operation()
        except Exception as error:  # noqa: PERF203
            time.sleep(patience.pause(error))


def is_transient(error: BaseException) -> bool:
    """Tell whether a later attempt may succeed: 5xx, time-outs, resets, short bodies."""
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNO
    # Of the clients' own errors, those about the connection; wrong settings are not among them.
    import aiohttp
    from botocore import exceptions as client
    from botocore.parsers import ResponseParserError

    if isinstance(error, client.SSLError):
        return False
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in _BUSY
    connection = (aiohttp.ClientError, client.HTTPClientError, client.ConnectionError)
    unfinished = (client.IncompleteReadError, ResponseParserError, http.client.IncompleteRead)
    return isinstance(error, (*connection, *unfinished, asyncio.TimeoutError, EOFError))
