"""Run one function on many tasks in several processes, with a count of what was done so far."""

import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from data_shards.errors import ShardError

Advance = Callable[[int, int], None]
"""Called with a number of images and of bytes that were done since the last call."""

T = TypeVar("T")
R = TypeVar("R")

_REFRESH_S = 0.5
_QUEUED = 8  # tasks per process: none is idle while results are dealt with


class _Worker:
    """State of a worker process: what it runs, and the counts that all workers share."""

    function: Callable[[Any, Advance], Any]
    counts: Any


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[T, Advance], R], tasks: Sequence[T], workers: int, advance: Advance
) -> Iterator[tuple[int, R]]:
    """Yield (place of the task, result) as tasks end; in this process for one worker.

    Args:
        function: Called with a task and a callback for progress; picklable, sent once per process.
        tasks: The tasks.
        workers: Processes, at least 1; never more than tasks.
        advance: Receives the progress of all.

    Raises:
        ShardError: of the function, at once; or a process died.
    """
    if workers < 1:
        raise ShardError(f"{workers} workers: at least 1 is needed")
    if min(workers, len(tasks)) <= 1:
        yield from ((place, function(task, advance)) for place, task in enumerate(tasks))
        return
    # Not fork: the threads of an object store's client do not survive it.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)
    executor = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), context, _start, (function, counts)
    )
    try:
        yield from _results(executor, tasks, _QUEUED * workers, counts, advance)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ShardError("a worker process died (killed, or out of memory)") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _results(
    executor: concurrent.futures.Executor,
    tasks: Sequence[T],
    queued: int,
    counts: Any,
    advance: Advance,
) -> Iterator[tuple[int, Any]]:
    waiting = enumerate(tasks)
    places: dict[concurrent.futures.Future[Any], int] = {}
    shown = [0, 0]
    while True:
        # Few at a time: each wait looks at all that it is given.
        for place, task in itertools.islice(waiting, queued - len(places)):
            places[executor.submit(_run, task)] = place
        if not places:
            return
        done, _ = concurrent.futures.wait(places, _REFRESH_S, concurrent.futures.FIRST_COMPLETED)
        now = list(counts)
        advance(now[0] - shown[0], now[1] - shown[1])
        shown = now
        yield from [(places.pop(future), future.result()) for future in done]


def _start(function: Callable[[Any, Advance], Any], counts: Any) -> None:
    _Worker.function = function
    _Worker.counts = counts
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended: nobody waits for the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run(task: Any) -> Any:
    return _Worker.function(task, _advance)


def _advance(images: int, size: int) -> None:
    with _Worker.counts.get_lock():
        _Worker.counts[0] += images
        _Worker.counts[1] += size
