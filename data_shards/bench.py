"""Measure the stream of a shard set: `python -m data_shards.bench URL`."""

import dataclasses
import json
import sys
import time
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.table import Table

from data_shards.command_line.parsing import parse_words
from data_shards.command_line.progress import ProgressBar
from data_shards.config import StreamConfig
from data_shards.errors import ShardError, exit_on_error
from data_shards.format.shard_index import ShardIndex, load_index
from data_shards.streaming.sampler import Cursor, EpochOrder
from data_shards.streaming.shuffle_quality import ShuffleQuality, shuffle_quality
from data_shards.streaming.stream import SampleStream
from data_shards.untrusted.terminal import PlainConsole

_MB = 1e6
_DEFAULT = StreamConfig()


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a stream delivered and what it took; batches after the first one, unless named."""

    index_s: float
    """Seconds to load the index."""
    first_batch_s: float
    """Seconds from opening the stream to its first batch."""
    images_per_s: float
    mb_per_s: float
    """Encoded bytes of the images delivered, in 10^6 per second."""
    stall_ms: float
    """Milliseconds that a step waits for its batch: median."""
    stall_ms_p95: float
    stall_ms_max: float
    cpu_ms_per_image: float
    """Processor time of the whole process, the simulated steps' sleep not included."""
    steps: int
    images: int
    requests_per_image: float
    """Ranges asked of the store, those of images read ahead included; so are the bytes."""
    read_mb_per_s: float
    """Bytes read from the store, in 10^6 per second."""
    retries: int
    """Requests to the store that were repeated."""
    damaged: int
    """Samples that were replaced."""
    shuffle: ShuffleQuality
    """Of the order, over its first two epochs."""


def measure(
    index: ShardIndex,
    config: StreamConfig,
    *,
    split: str = "train",
    batch: int = 256,
    steps: int = 40,
    step_ms: float = 0.0,
    cursor: Cursor,
    progress: bool = False,
) -> Figures:
    """Take a first batch and `steps` more from a stream.

    Args:
        index: The shard set.
        config: Options of the stream.
        split: Name of the split.
        batch: Images per batch.
        steps: Batches that are measured.
        step_ms: Milliseconds that the consumer sleeps after each batch, as a training step on an
            accelerator would.
        cursor: Where to begin.
        progress: Show a bar on standard error.

    Raises:
        ShardError: of the stream, or fewer than one step.
    """
    if steps < 1 or step_ms < 0:
        raise ShardError(f"{steps} steps of {step_ms} ms: at least one of 0 ms is needed")
    waits = []
    images = size = 0
    begin = time.perf_counter()
    with (
        SampleStream(index, config, split=split, global_batch=batch, cursor=cursor) as stream,
        ProgressBar(f"reading {split}", steps, unit="batches", shown=progress) as bar,
    ):
        next(stream)
        start = time.perf_counter()
        first, cpu = start - begin, time.process_time()
        traffic = index.files.traffic
        requests, size_read = traffic.requests, traffic.bytes
        for _ in range(steps):
            time.sleep(step_ms / 1000)
            before = stream.waited_s
            rows = next(stream).rows
            waits.append(1000 * (stream.waited_s - before))
            images += len(rows)
            size += int(index.rows.size[rows].sum())
            bar.advance()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Figures(
            index_s=0.0,
            first_batch_s=first,
            images_per_s=images / seconds,
            mb_per_s=size / seconds / _MB,
            stall_ms=float(np.median(waits)),
            stall_ms_p95=float(np.quantile(waits, 0.95)),
            stall_ms_max=max(waits),
            cpu_ms_per_image=1000 * cpu / images,
            steps=steps,
            images=images,
            requests_per_image=(traffic.requests - requests) / images,
            read_mb_per_s=(traffic.bytes - size_read) / seconds / _MB,
            retries=stream.retries,
            damaged=stream.damaged.total(),
            shuffle=_quality(index, split, stream.cursor, batch),
        )


def _quality(index: ShardIndex, split: str, cursor: Cursor, batch: int) -> ShuffleQuality:
    counts = np.unique(index.rows.shard[index.select(split)], return_counts=True)[1]
    order = EpochOrder(counts.tolist(), seed=cursor.seed, lanes=cursor.lanes, window=cursor.window)
    return shuffle_quality(order, batch)


def _show(title: str, figures: Figures) -> None:
    table = Table(title=title, show_header=False)
    shuffle, again = figures.shuffle, figures.shuffle.meeting_again
    for name, value in (
        ("images/s", f"{figures.images_per_s:,.0f}"),
        ("MB/s (encoded)", f"{figures.mb_per_s:.1f}"),
        (
            "stall per step: median, 95 %, largest",
            f"{figures.stall_ms:.1f}, {figures.stall_ms_p95:.1f}, {figures.stall_ms_max:.1f} ms",
        ),
        ("requests per image", f"{figures.requests_per_image:.2f}"),
        ("MB/s (read from the store)", f"{figures.read_mb_per_s:.1f}"),
        ("CPU per image", f"{figures.cpu_ms_per_image:.3f} ms"),
        ("index loaded in", f"{figures.index_s:.2f} s"),
        ("first batch after", f"{figures.first_batch_s:.2f} s"),
        ("steps, images", f"{figures.steps}, {figures.images:,}"),
        ("requests repeated, samples replaced", f"{figures.retries}, {figures.damaged}"),
        (
            "shards in a batch (uniform shuffle)",
            f"{shuffle.shards_per_batch:.1f} ({shuffle.uniform_shards_per_batch:.1f})",
        ),
        (
            "pairs of a batch that meet again",
            "one batch per epoch" if again is None else f"{again:.2f} x uniform shuffle",
        ),
    ):
        table.add_row(name, value)
    PlainConsole(width=88).print(table)


def _run(
    url: Annotated[str, tyro.conf.Positional],
    /,
    stream: Annotated[StreamConfig, tyro.conf.arg(name="")] = _DEFAULT,
    *,
    split: str = "train",
    batch: int = 256,
    steps: int = 40,
    step_ms: float = 0.0,
    seed: int = 0,
    epoch: int = 0,
    position: int = 0,
    threads: int = 1,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure how fast the stream of a shard set delivers batches to one rank.

    Args:
        url: Directory or URL of the set.
        stream: Options of the stream; images that differ in shape are cropped in any case.
        split: Name of the split.
        batch: Images per batch.
        steps: Batches that are measured, after a first one.
        step_ms: Milliseconds that a simulated training step takes.
        seed: Of the order.
        epoch: Where to begin.
        position: Where to begin, within the epoch.
        threads: Threads that torch may use within one operation.
        json_output: Print one JSON object instead of a table.
    """
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    index = load_index(url)
    loaded = time.perf_counter() - begin
    if index.stored_shape(split) is None:
        stream = dataclasses.replace(stream, crop="random-resized")
    cursor = Cursor(seed=seed, epoch=epoch, position=position)
    figures = measure(
        index,
        stream,
        split=split,
        batch=batch,
        steps=steps,
        step_ms=step_ms,
        cursor=cursor,
        progress=True,
    )
    figures = dataclasses.replace(figures, index_s=loaded)
    if json_output:
        sys.stdout.write(json.dumps(dataclasses.asdict(figures)) + "\n")
    else:
        _show(f"{index.store}, {split}, batch {batch}, {stream.workers} workers", figures)


def main(arguments: list[str] | None = None) -> None:
    """Run the entry; one line on standard error and exit status 1 on a refused request."""
    with exit_on_error():
        parse_words(_run, arguments, prog="python -m data_shards.bench")


if __name__ == "__main__":
    main()
