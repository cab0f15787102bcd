"""Reading a shard set from object storage: `python -m benchmarks.object_store`.

A local S3-compatible server behind a proxy with the latency and the bandwidth per connection of a
real one. Reading alone, no decoding: samples of 110 kB in shuffled order as the stream asks for
them, against one connection that reads shards one after the other. Server and proxy run in a
process of their own, on the same machine.
"""

import contextlib
import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.report import write_result
from data_shards.config import StreamConfig
from data_shards.format.shard_index import (
    HEADER_FILE,
    ROWS_FILE,
    SCHEMA_VERSION,
    Header,
    Shard,
    ShardIndex,
    count_splits,
    header_to_json,
    load_index,
    rows_to_parquet,
)
from data_shards.storage.store import Store
from data_shards.streaming.fetcher import Shares, SplitReader
from data_shards.streaming.sampler import Cursor

SAMPLES, SIZE, PER_SHARD, BATCH = 2000, 110_000, 100, 128
LATENCY_S, RATE = 0.03, 60e6
PIECE = 8 << 20
URL = "s3://bucket/reading"

_SERVER = """
import logging, sys
from tests.faulty_proxy import FaultyProxy, Weather
from tests.object_store import s3_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
weather = Weather(latency_s=float(sys.argv[1]), rate=float(sys.argv[2]))
with s3_server() as address, FaultyProxy(address, weather, remember=True) as proxy:
    print(address, proxy.url, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def local_server(latency_s: float, rate: float) -> Iterator[tuple[int, str, str]]:
    """Run server and proxy in a process; yields its id and the URLs of the two.

    Args:
        latency_s: Seconds before an answer of the proxy.
        rate: Bytes per second and connection of the proxy.
    """
    command = [sys.executable, "-c", _SERVER, str(latency_s), str(rate)]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the proxy was started without pipes")
        address, url = process.stdout.readline().split()
        try:
            yield process.pid, f"http://{address}", url
        finally:
            process.stdin.close()


def make_set() -> None:
    """Write shards of one random body each time, and an index that knows where they lie."""
    store = Store(URL)
    body = np.random.default_rng(0).bytes(SIZE)
    data = (bytes(512) + body) * PER_SHARD
    shards = []
    for number in range(SAMPLES // PER_SHARD):
        file = f"train-{number:05d}.tar"
        store.write(file, data)
        shards.append(
            Shard(
                number=number,
                file=file,
                split="train",
                sha256="0" * 64,
                samples=PER_SHARD,
                size=len(data),
            )
        )
    places = np.arange(SAMPLES)
    columns: dict[str, Any] = {
        "split": ["train"] * SAMPLES,
        "validation": [False] * SAMPLES,
        "shard": places // PER_SHARD,
        "key": [f"{place:08d}" for place in places],
        "offset": places % PER_SHARD * (SIZE + 512) + 512,
        "size": [SIZE] * SAMPLES,
        "extension": ["jpg"] * SAMPLES,
        "xxh3_64": [1] * SAMPLES,
        "label": [0] * SAMPLES,
    }
    rows = rows_to_parquet(columns)
    header = Header(
        schema_version=SCHEMA_VERSION,
        name="reading",
        image_shape=(3, 224, 224),
        train_shape=None,
        num_classes=10,
        class_names=(),
        splits=count_splits(np.ones(SAMPLES, bool), np.zeros(SAMPLES, bool)),
        shards=tuple(shards),
        rows_sha256=hashlib.sha256(rows).hexdigest(),
        generator={},
    )
    store.write(ROWS_FILE, rows)
    store.write(HEADER_FILE, header_to_json(header))


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast samples came.

    Attributes:
        first_s: seconds until the first batch.
        mb_per_s: after it.
    """

    first_s: float
    mb_per_s: float


def one_connection(index: ShardIndex) -> Rate:
    """Read four shards, one request after the other."""
    begin = time.perf_counter()
    total = 0
    for shard in index.shards[:4]:
        for start in range(0, shard.size, PIECE):
            stop = min(start + PIECE, shard.size)
            total += len(index.store.read_range(shard.file, start, stop))
    return Rate(0.0, total / (time.perf_counter() - begin) / 1e6)


def stream(index: ShardIndex, config: StreamConfig) -> Rate:
    """Read most of an epoch as the stream does."""
    begin = time.perf_counter()
    shares = Shares(SAMPLES, BATCH, 0, 1)
    readings = SplitReader(index, config, "train", shares, Cursor(seed=1)).readings()
    next(readings)
    first = time.perf_counter() - begin
    total = 0
    while total < 0.7 * SAMPLES * SIZE:
        total += sum(len(data) for data in next(readings).encoded.values())
    readings.close()
    return Rate(first, total / (time.perf_counter() - begin - first) / 1e6)


def measure() -> Iterator[tuple[str, Rate]]:
    """Yield the rate of every way of reading."""
    index = load_index(URL)
    config = StreamConfig(crop="random-resized")
    yield "one connection, shard after shard", one_connection(index)
    yield "stream, one request per sample", stream(index, config)
    with tempfile.TemporaryDirectory() as folder:
        cached = dataclasses.replace(config, disk_cache=folder)
        yield "stream through the disk cache (empty)", stream(index, cached)
        yield "stream through the disk cache (full)", stream(index, cached)


def main() -> None:
    """Run the server and record the table."""
    from tests.object_store import s3_environment

    with local_server(LATENCY_S, RATE) as (_, address, url):
        os.environ.update(s3_environment(address))
        make_set()
        os.environ["AWS_ENDPOINT_URL"] = url
        results = list(measure())
    slowest = results[0][1].mb_per_s
    write_result(
        "object_store",
        [
            {
                "reading": name,
                **({"first batch [s]": round(rate.first_s, 2)} if rate.first_s else {}),
                "MB/s": round(rate.mb_per_s, 1),
                "times one connection": round(rate.mb_per_s / slowest, 2),
            }
            for name, rate in results
        ],
        [
            f"{SAMPLES} samples of {SIZE} bytes, batch {BATCH}; {LATENCY_S * 1000:.0f} ms latency, "
            f"{RATE / 1e6:.0f} MB/s per connection; server, proxy and reader on one machine.",
            "Target: at least 4 times one connection, first batch within 2.5 s.",
        ],
    )


if __name__ == "__main__":
    main()
