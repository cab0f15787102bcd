"""From object storage to batches on two cores: `python -m benchmarks.data [--peer-python PATH]`.

Real photographs of mixed sizes as JPEGs on a local S3-compatible server, random-resized crop to
224 x 224 and mirroring, batches of 128: the stream of this project beside WebDataset and MosaicML
Streaming, each in a process of its own, in turn. MosaicML Streaming needs an environment of its
own; `--peer-python` is its interpreter. The photographs are those of scikit-learn and, where it is
installed, scikit-image.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.data_peers import process_cpu_s
from benchmarks.decode import SIZE, mixed_photographs, sizes_of
from benchmarks.index import peak_mib, resident_mib
from benchmarks.object_store import local_server
from benchmarks.report import write_result
from data_shards import bench
from data_shards.config import StreamConfig
from data_shards.format.shard_index import load_index
from data_shards.sources.imagefolder import imagefolder
from data_shards.sources.transcode import Recipe
from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from data_shards.writing.writer import write_shard_set

CORES, WORKERS = 2, 2
IMAGES, DISTINCT, CLASSES, PER_SHARD = 3072, 256, 10, 128
BATCH, STEPS = 128, 20  # with the first batch less than an epoch
RESUMED = (0, 1357, 2900)  # positions, one in each turn
OURS, SHARDS, PEER_SHARDS = "ours", "s3://bucket/images", "s3://bucket/mosaicml"
NOTES = (
    f"{IMAGES} JPEGs, {PER_SHARD} per shard, of {DISTINCT} crops and scalings; batches of {BATCH}, "
    f"{STEPS} after the first; {CORES} cores, {WORKERS} threads or processes decode. Medians of "
    f"{len(RESUMED)} turns; of first batches (index or set-up included, imports not) and memory "
    "the largest.",
    "The server takes its processor time from the same cores. WebDataset fetches each shard once "
    "by HTTP and keeps nothing; ours and MosaicML Streaming keep what they fetched on the disk.",
    f"With a full disk cache the stream is resumed at positions {RESUMED} of another epoch. "
    "Memory: beyond the imported libraries.",
    "empty, full: how many times as fast ours is with an empty and a full disk cache, by the clock "
    "and by processor time (server included), which other work on the machine disturbs less.",
    "Targets: 1.5 times WebDataset, no slower than MosaicML Streaming, first batch within 2.5 s, "
    "memory under 400 MiB.",
)
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is measured: an interpreter, a module's arguments, whether its local copies are kept."""

    python: str
    arguments: tuple[str, ...]
    keep: bool = False


def make_images(root: Path) -> str:
    """Write a tree of classes; every image occurs several times. Return where they are from."""
    images, origin = mixed_photographs(DISTINCT)
    for part, count in (("train", IMAGES), ("val", 2 * CLASSES)):
        for number in range(count):
            folder = root / part / str(number % CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:06d}.jpg").write_bytes(images[number % DISTINCT])
    return f"Photographs of {origin}: {', '.join(sizes_of(images))}, quality 75 to 95."


def upload(root: Path, peer_python: str) -> str:
    """Write both formats to the server; returns why the peer's is missing, or nothing."""
    source = imagefolder(str(root), Recipe(channels=3, size=SIZE, uniform=False))
    index = write_shard_set(source, SHARDS, samples_per_shard=PER_SHARD, workers=CORES)
    if not peer_python:
        return "no --peer-python"
    out = root / "mosaicml"
    arguments = ("write", str(root / "train"), str(out), str(index.shards[0].size))
    done = _run(Contestant(peer_python, ("benchmarks.data_peers", *arguments)))
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    store = Store(PEER_SHARDS)
    for path in sorted(out.iterdir()):
        store.write(path.name, path.read_bytes())
    return ""


def measure_ours(disk_cache: str, epoch: int, position: int) -> Figures:
    """The stream at the default options, but for the crop, mirroring, workers and the cache."""
    torch.set_num_threads(1)
    before, begin = resident_mib(), time.perf_counter()
    index = load_index(SHARDS)
    loaded = time.perf_counter() - begin
    config = StreamConfig(crop="random-resized", flip=True, workers=WORKERS, disk_cache=disk_cache)
    cursor = Cursor(seed=1, epoch=epoch, position=position)
    found = bench.measure(index, config, batch=BATCH, steps=STEPS, cursor=cursor)
    return {
        "first_s": loaded + found.first_batch_s,
        "images_per_s": found.images_per_s,
        "cpu_ms": found.cpu_ms_per_image,
        "peak_mib": peak_mib() - before,
    }


def contestants(address: str, peer_python: str, position: int) -> dict[str, Contestant]:
    """All of them by name; `{local}` is a folder for what they keep."""
    shards = [name for name in Store(SHARDS).ls() if name.startswith("train")]
    urls = " ".join(f"{SHARDS}/{name}".replace("s3:/", address) for name in shards)
    counts = ("{local}", str(BATCH), str(STEPS))

    def ours(*cursor: int) -> tuple[str, ...]:
        return "benchmarks.data", OURS, "{local}", *map(str, cursor)

    peer = "benchmarks.data_peers"
    found = {
        "ours, empty disk cache": Contestant(sys.executable, ours(0, 0)),
        "ours, full disk cache": Contestant(sys.executable, ours(2, position), keep=True),
        "WebDataset": Contestant(sys.executable, (peer, "webdataset", urls, *counts)),
    }
    if peer_python:
        arguments = (peer, "mosaicml", PEER_SHARDS, *counts)
        found["MosaicML Streaming"] = Contestant(peer_python, arguments)
    return found


def in_turn(address: str, peer_python: str, server: int) -> Iterator[tuple[str, Figures]]:
    """Yield the figures of every contestant, once for each of the positions."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as local:
        for position in RESUMED:
            for name, contestant in contestants(address, peer_python, position).items():
                if not contestant.keep:
                    shutil.rmtree(local, ignore_errors=True)
                    Path(local).mkdir()
                before = process_cpu_s(server)
                done = _run(contestant, local)
                if done.returncode:
                    raise RuntimeError(f"{name} failed:\n{done.stderr}")
                served = process_cpu_s(server) - before
                figures: Figures = json.loads(done.stdout.splitlines()[-1])
                yield name, {**figures, "server_ms": 1000 * served / BATCH / (STEPS + 1)}


def _run(contestant: Contestant, local: str = "") -> "subprocess.CompletedProcess[str]":
    arguments = [argument.replace("{local}", local) for argument in contestant.arguments]
    return subprocess.run(
        [contestant.python, "-m", *arguments],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=300,
    )


def table(measured: Mapping[str, list[Figures]], missing: str) -> list[dict[str, Any]]:
    """Rows of medians over the turns; of first batches and memory the largest."""
    rows: list[dict[str, Any]] = []
    for name, figures in measured.items():
        rate, own, server = (
            statistics.median(one[key] for one in figures)
            for key in ("images_per_s", "cpu_ms", "server_ms")
        )
        row = {
            "route": name,
            "images/s": round(rate),
            "CPU ms/image": round(own, 2),
            "the server's": round(server, 2),
            "first batch [s]": round(max(one["first_s"] for one in figures), 2),
        }
        if "peak_mib" in figures[0]:
            row["memory [MiB]"] = round(max(one["peak_mib"] for one in figures))
        rows.append(row)
    for row in rows:
        for state, ours in zip(("empty", "full"), rows, strict=False):
            row[f"{state}: rate"] = round(ours["images/s"] / row["images/s"], 2)
            row[f"{state}: CPU"] = round(_cpu_ms(row) / _cpu_ms(ours), 2)
    if missing:
        rows.append({"route": "MosaicML Streaming", "images/s": f"not run: {missing}"})
    return rows


def _cpu_ms(row: Mapping[str, Any]) -> float:
    return float(row["CPU ms/image"] + row["the server's"])


def run(peer_python: str = "") -> None:
    """Measure all and record the table.

    Args:
        peer_python: Interpreter of an environment with MosaicML Streaming, torch and Pillow.
    """
    from tests.object_store import s3_environment

    measured: dict[str, list[Figures]] = {}
    before = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as folder,
        local_server(latency_s=0, rate=1e12) as (server, address, _),
    ):
        os.environ.update(s3_environment(address), S3_ENDPOINT_URL=address, OMP_NUM_THREADS="1")
        images = make_images(Path(folder))
        missing = upload(Path(folder), peer_python)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        for name, figures in in_turn(address, "" if missing else peer_python, server):
            measured.setdefault(name, []).append(figures)
    load = f"Load average of the machine before: {before:.1f}, of which nothing is ours."
    write_result("data", table(measured, missing), [images, *NOTES, load])


def main() -> None:
    """Measure all, or the stream alone in a process of its own."""
    if sys.argv[1:2] == [OURS]:
        _, disk_cache, epoch, position = sys.argv[1:]
        figures = measure_ours(disk_cache, int(epoch), int(position))
        sys.stdout.write(json.dumps(figures))
    else:
        tyro.cli(run)


if __name__ == "__main__":
    main()
