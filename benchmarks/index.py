"""Time and memory of a shard set as large as ImageNet: `python -m benchmarks.index`.

The set has 1.28 million rows and empty (sparse) shards: what is measured is the index, the order of
an epoch and the start of a stream, not decoding.
"""

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.report import write_result
from data_shards.config import StreamConfig
from data_shards.format.shard_index import (
    SCHEMA_VERSION,
    Header,
    Shard,
    count_splits,
    header_to_json,
    load_index,
    rows_to_parquet,
)
from data_shards.streaming import batcher
from data_shards.streaming.fetcher import Shares, SplitReader
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream

SAMPLES = 1_281_167
SHARDS = 512
SIZE = 110_000
WORLDS = (1, 2, 3, 4, 8)
GLOBAL_BATCH = 384


def make_set(folder: Path, samples: int = SAMPLES, shards: int = SHARDS) -> None:
    """Write header and rows of a large set, and files of the right sizes without content."""
    shard = np.sort(np.arange(samples) % shards)
    first = np.concatenate([[True], np.diff(shard) > 0])
    place = np.arange(samples) - np.maximum.accumulate(np.where(first, np.arange(samples), 0))
    generator = np.random.Generator(np.random.Philox(0))
    columns: dict[str, Any] = {
        "split": ["train"] * samples,
        "validation": generator.random(samples) < 0.01,
        "shard": shard,
        "key": [f"n{i % 1000:08d}_{i:08d}" for i in range(samples)],
        "offset": place * SIZE + 512,
        "size": generator.integers(SIZE // 2, SIZE - 2048, samples),
        "extension": ["jpeg"] * samples,
        "xxh3_64": generator.integers(0, 2**63, samples, dtype=np.uint64),
        "label": generator.integers(0, 1000, samples),
    }
    rows = rows_to_parquet(columns)
    listed = []
    for number, count in enumerate(np.bincount(shard).tolist()):
        file = f"train-{number:05d}.tar"
        size = count * SIZE + 10240
        with (folder / file).open("wb") as tar:
            tar.truncate(size)
        listed.append(
            Shard(
                number=number, file=file, split="train", samples=count, size=size, sha256="0" * 64
            )
        )
    header = Header(
        schema_version=SCHEMA_VERSION,
        name="large",
        image_shape=(3, 224, 224),
        train_shape=None,
        num_classes=1000,
        class_names=(),
        splits=count_splits(np.ones(samples, bool), columns["validation"]),
        shards=tuple(listed),
        rows_sha256=hashlib.sha256(rows).hexdigest(),
        generator={},
    )
    (folder / "index.parquet").write_bytes(rows)
    (folder / "index.json").write_bytes(header_to_json(header))


def resident_mib() -> float:
    """Return the memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """Return the most memory this process ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss is the parent's at first
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Make the set, measure in a process of its own and record the table."""
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder))
        rows = [_alone(folder), *(_alone(folder, str(world)) for world in WORLDS)]
    write_result(
        "index",
        rows,
        [
            "MiB beyond those of the imported libraries. Targets: load in under 2 s and 300 MiB; a "
            "rank at the default options under 400 MiB, first batch within 2.5 s.",
            f"By world size: index and stream of 3x224x224 crops, global batch {GLOBAL_BATCH}, "
            "over the end of an epoch, with a consumer that lets everything fill up; images are "
            "not decoded, memory is taken as if they were.",
        ],
    )


def _alone(*arguments: str) -> dict[str, float]:
    """Measure in a process of its own: making the set took more memory than reading it."""
    command = [sys.executable, "-m", "benchmarks.index", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measure(folder: str) -> dict[str, float]:
    """Load the set, order an epoch and read a first batch deep inside one."""
    before = resident_mib()
    begin = time.perf_counter()
    index = load_index(folder)
    figures = {"samples": SAMPLES, "load_s": time.perf_counter() - begin}
    figures["load_mib"] = resident_mib() - before
    cursor = Cursor(seed=1, epoch=7, position=SAMPLES * 9 // 10)
    begin = time.perf_counter()
    shares = Shares(len(index.select("train")), 1024, 3, 8)
    reader = SplitReader(index, StreamConfig(crop="random-resized"), "train", shares, cursor)
    next(reader.readings())
    figures["first_reading_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    reader.order.permutation(8)
    figures["next_epoch_s"] = time.perf_counter() - begin
    figures["peak_mib"] = peak_mib() - before
    return figures


def measure_rank(folder: str, world: int) -> dict[str, float]:
    """Stream on the last of `world` ranks across the end of an epoch."""

    def without_decoding(*_: object) -> torch.Tensor:
        return torch.zeros(3, 224, 224, dtype=torch.uint8)

    before = resident_mib()
    index = load_index(folder)
    cursor = Cursor(seed=1, epoch=3, position=SAMPLES - 20 * GLOBAL_BATCH)
    config = StreamConfig(crop="random-resized")
    with (
        mock.patch.object(batcher, "decode", without_decoding),
        SampleStream(
            index,
            config,
            split="train",
            global_batch=GLOBAL_BATCH,
            rank=world - 1,
            world_size=world,
            cursor=cursor,
        ) as stream,
    ):
        begin = time.perf_counter()
        batch = next(stream)
        first = time.perf_counter() - begin
        for step in range(40):
            batch = next(stream)
            time.sleep(0.5 if step % 10 == 0 else 0)
    if not batch.cursor_after.epoch > cursor.epoch:
        raise RuntimeError("the epoch did not end")
    return {"world size": world, "first batch [s]": first, "peak_mib": peak_mib() - before}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        folder, *world = sys.argv[1:]
        figures = measure_rank(folder, int(world[0])) if world else measure(folder)
        sys.stdout.write(json.dumps({name: round(value, 2) for name, value in figures.items()}))
