"""Run an iterator ahead of its consumer in one thread, within a bound on bytes."""

import collections
import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_JOIN_S = 5.0


class Prefetcher(Generic[T]):
    """Items of an iterator, made ahead in a background thread.

    An item waits for room before it is queued, so one more than fits may exist. One item is always
    let through; while it is larger than the bound, no other is made. An error of the iterator is
    raised by `get` after the items before it.

    Args:
        items: Made and iterated in the thread alone.
        size_of: Bytes an item holds.
        max_bytes: Bound on the bytes of the queue.
        max_items: Bound on the length of the queue.
    """

    def __init__(
        self, items: Iterator[T], *, size_of: Callable[[T], int], max_bytes: int, max_items: int
    ) -> None:
        self._items = items
        self._size_of = size_of
        self._max_bytes = max_bytes
        self._max_items = max_items
        self._queue: collections.deque[tuple[T, int]] = collections.deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="data_shards", daemon=True)
        self._thread.start()

    def get(self) -> T:
        """Return the next item, waiting for it.

        Raises:
            StopIteration: the iterator has ended, or this was closed.
        """
        with self._changed:
            while not self._queue and not self._finished and not self._closed:
                self._changed.wait()
            if self._closed:
                raise StopIteration
            if self._queue:
                item, size = self._queue.popleft()
                self._bytes -= size
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def __iter__(self) -> Iterator[T]:
        """Yield the items; ends when this is closed."""
        with contextlib.suppress(StopIteration):
            while True:
                yield self.get()

    def close(self) -> None:
        """End the thread and drop what it made; safe to call again.

        A thread that waits for a store is left to end by itself.
        """
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # the collector may call from there
            self._thread.join(_JOIN_S)

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
                del item  # not held while the next one is made
        except BaseException as error:  # surfaces in the consumer's thread
            self._error = error
        finally:
            if isinstance(self._items, Generator):
                self._items.close()  # ends its threads
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        size = self._size_of(item)
        with self._changed:
            while self._queue and not self._closed and self._is_full(size):
                self._changed.wait()
            if not self._closed:
                self._queue.append((item, size))
                self._bytes += size
                self._changed.notify_all()
            while self._queue and not self._closed and self._bytes > self._max_bytes:
                self._changed.wait()  # it is over the bound alone: no other is made beside it
            return not self._closed

    def _is_full(self, size: int) -> bool:
        return self._bytes + size > self._max_bytes or len(self._queue) >= self._max_items
