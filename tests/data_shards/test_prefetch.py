import gc
import itertools
import threading
import time

import pytest

from data_shards.streaming.prefetch import Prefetcher


def prefetch(items, max_bytes=100, max_items=10):
    return Prefetcher(iter(items), size_of=lambda item: item, max_bytes=max_bytes,
                      max_items=max_items)  # fmt: skip


def made_ahead(**limits):
    """Return how many items are made before the first is taken."""
    made = []

    def items():
        for _ in itertools.count():
            made.append(10)
            yield 10

    prefetcher = prefetch(items(), **limits)
    deadline = time.monotonic() + 20
    previous = -1
    while previous != len(made) and time.monotonic() < deadline:
        previous = len(made)
        time.sleep(0.05)
    prefetcher.close()
    return previous


def test_items_in_order_then_the_end():
    prefetcher = prefetch(range(30))
    assert [prefetcher.get() for _ in range(30)] == list(range(30))
    with pytest.raises(StopIteration):
        prefetcher.get()
    prefetcher.close()


def test_bounds():
    assert made_ahead(max_bytes=40, max_items=100) <= 5
    assert made_ahead(max_bytes=10**9, max_items=3) <= 4
    assert made_ahead(max_bytes=1, max_items=3) <= 2  # one item always passes


def test_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise RuntimeError("broken")

    prefetcher = prefetch(items())
    assert prefetcher.get() == 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            prefetcher.get()
    prefetcher.close()


def test_close_ends_the_thread_and_wakes_a_waiting_consumer():
    before = set(threading.enumerate())
    gate = threading.Event()

    def items():
        gate.wait(20)
        yield from itertools.repeat(1)

    prefetcher = prefetch(items())
    ended = []

    def consume():
        try:
            prefetcher.get()
        except StopIteration:
            ended.append(True)

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    consumer.join(20)
    gate.set()
    closer.join(20)
    assert ended == [True]
    prefetcher.close()
    gc.collect()
    assert set(threading.enumerate()) <= before  # others may end meanwhile
