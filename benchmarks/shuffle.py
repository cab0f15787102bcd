"""How well an order of samples mixes, and what it costs: `python -m benchmarks.shuffle`.

At ImageNet size, for the order of today, the one before and a permutation of the whole: shards in
a batch and pairs of a batch that meet again, counted over two epochs; requests and bytes that the
stream asks for, and the stalls of a consumer that takes a fixed time per batch. The store is a
model: it answers with zeros after the time that its latency and bandwidth per connection give.
Images are not decoded.
"""

import heapq
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.index import SAMPLES, SHARDS, make_set
from benchmarks.object_store import LATENCY_S, RATE
from benchmarks.report import write_result
from data_shards import bench
from data_shards.config import StreamConfig
from data_shards.format.shard_index import ShardIndex, load_index
from data_shards.storage.range_reader import IN_FLIGHT
from data_shards.storage.store import Store
from data_shards.streaming import batcher
from data_shards.streaming.sampler import Cursor, EpochOrder
from data_shards.streaming.shuffle_quality import shuffle_quality

ORDERS = {
    "128 lanes, window 128 (default)": (128, 128),
    "8 lanes, window 2,048 (before)": (8, 2048),
    "as a whole": (1, SAMPLES),
}
GLOBAL_BATCH = 1024
BATCH, STEPS, STEP_MS = 256, 40, 400.0


def modelled(_: Store, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Answer ranges with zeros, `IN_FLIGHT` connections taking the next one as they become free."""
    free = [0.0] * IN_FLIGHT
    for _file, start, stop in ranges:
        heapq.heapreplace(free, free[0] + LATENCY_S + (stop - start) / RATE)
    time.sleep(max(free))
    return [bytes(stop - start) for _file, start, stop in ranges]


def without_decoding(*_: object) -> torch.Tensor:
    """Stand in for an image."""
    return torch.zeros(3, 224, 224, dtype=torch.uint8)


def measure(index: ShardIndex, lanes: int, window: int) -> dict[str, Any]:
    """Mixing, requests, bytes and stalls of one order."""
    counts = [shard.samples for shard in index.shards]
    order = EpochOrder(counts, seed=1, lanes=lanes, window=window)
    mixing = shuffle_quality(order, GLOBAL_BATCH)
    config = StreamConfig(crop="random-resized", lanes=lanes, window=window)
    with (
        mock.patch.object(batcher, "decode", without_decoding),
        mock.patch.object(Store, "read_ranges", modelled),
    ):
        found = bench.measure(
            index, config, batch=BATCH, steps=STEPS, step_ms=STEP_MS, cursor=Cursor(seed=1)
        )
    stalls = (found.stall_ms, found.stall_ms_p95, found.stall_ms_max)
    return {
        "shards per batch": round(mixing.shards_per_batch, 1),
        "meet again": round(mixing.meeting_again or 0.0, 2),
        "requests per image": round(found.requests_per_image, 2),
        "bytes read per byte": round(found.read_mb_per_s / found.mb_per_s, 2),
        "stall [ms]: median, 95 %, largest": ", ".join(f"{stall:.0f}" for stall in stalls),
        "first batch [s]": round(found.first_batch_s, 2),
    }


def main() -> None:
    """Measure every order and record the table."""
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder))
        index = load_index(folder)
        rows = [{"order": name, **measure(index, *order)} for name, order in ORDERS.items()]
    write_result(
        "shuffle",
        rows,
        [
            f"{SAMPLES:,} images in {SHARDS} shards; shards and pairs of batches of "
            f"{GLOBAL_BATCH:,}, pairs as a multiple of a uniform shuffle.",
            f"Requests, bytes and stalls of batches of {BATCH}, {STEPS} after the first, a step "
            f"taking {STEP_MS:.0f} ms, on a modelled store of {1000 * LATENCY_S:.0f} ms latency, "
            f"{RATE / 1e6:.0f} MB/s per connection and {IN_FLIGHT} connections.",
            f"Load average of the machine before: {before:.1f}, of which nothing is ours.",
            "Targets: at least 100 shards per batch, at most 1.3 times the requests of 8 lanes.",
        ],
    )


if __name__ == "__main__":
    main()
