"""From the command to the first step, and what it costs: `python -m benchmarks.start`.

`python -m pipeline.pretrain` on Ray, as a user types it, on shards that are there. The clock runs
until the record of the first step; processor time is that of all processes of the run by then, the
servers of Ray included, less those that have ended.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import tyro

from benchmarks.report import Row, write_result
from data_shards.sources.registry import SOURCES
from data_shards.write import write_shard_set

TARGET_S = 16.0
_LIMIT_S = 600.0
_POLL_S = 0.05


def command(storage: Path, preset: str, shards: str, workers: int) -> list[str]:
    """A run of one step without evaluation."""
    words = [sys.executable, "-m", "pipeline.pretrain", preset, "--storage", str(storage)]
    words += ["--data.shards", shards, "--cluster.workers", str(workers)]
    return [*words, "--train.stop-after", "1", "--checkpoint.no-evaluate"]


def spent(process: psutil.Process) -> dict[str, float]:
    """Processor seconds of a process and of all below it, by program."""
    found: dict[str, float] = {}
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = member.cpu_times()
            name = "this command" if member == process else _program(member)
            found[name] = found.get(name, 0.0) + times.user + times.system
    return found


def _program(process: psutil.Process) -> str:
    """What Ray calls its process, or the file of it."""
    words = process.cmdline() or [process.name()]
    first = words[0].split()[0]
    if first.startswith("ray::"):
        return first
    scripts = [word for word in words if word.endswith(".py")]
    return Path(scripts[0] if scripts else first).stem


def first_step(words: list[str], storage: Path) -> tuple[float, float, dict[str, float]]:
    """Seconds until training begins and until the first step is recorded; processor seconds.

    Raises:
        RuntimeError: the command ended, or took too long, without a step.
    """
    begin = time.perf_counter()
    began = None
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        member = psutil.Process(process.pid)
        while time.perf_counter() - begin < _LIMIT_S:
            now = time.perf_counter() - begin
            if began is None and _holds(storage, "events.jsonl", b'"Started"'):
                began = now
            if _holds(storage, "spool.jsonl", b'"train/loss"'):
                processor = spent(member)
                process.communicate()
                return began or now, now, processor
            if process.poll() is not None:
                break
            time.sleep(_POLL_S)
        process.kill()
        said = process.communicate()[0].decode(errors="replace")[-2000:]
    raise RuntimeError(f"no step was recorded by {' '.join(words)}:\n{said}")


def _holds(storage: Path, name: str, what: bytes) -> bool:
    return any(what in path.read_bytes() for path in storage.glob(f"**/{name}"))


def main(preset: str = "digits", source: str = "digits", workers: int = 2, runs: int = 3) -> None:
    """Measure and record the table.

    Args:
        preset: what is trained.
        source: its images.
        workers: ranks.
        runs: measured starts, after one that fills the caches of the disk.
    """
    found: list[tuple[float, float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = str(folder / "shards")
        write_shard_set(SOURCES[source](), shards)
        for turn in range(runs + 1):
            storage = folder / f"storage-{turn}"
            found.append(first_step(command(storage, preset, shards, workers), storage))
    began, stepped, processor = zip(*found[1:], strict=True)
    rows: list[Row] = [
        {"what": "training begins", "seconds": statistics.median(began)},
        {
            "what": "first step recorded",
            "seconds": statistics.median(stepped),
            "target": f"<= {TARGET_S:g}",
        },
        {"what": "all processes", "processor s": statistics.median(map(_total, processor))},
    ]
    names: dict[str, Any] = {name: None for one in processor for name in one}
    rows += [
        {
            "what": f"of which {name}",
            "processor s": statistics.median(one.get(name, 0.0) for one in processor),
        }
        for name in names
    ]
    write_result(
        "start",
        rows,
        [f"Preset {preset}, {workers} ranks on Ray, no evaluation; medians of {runs} starts."],
    )


def _total(one: dict[str, float]) -> float:
    return sum(one.values())


if __name__ == "__main__":
    tyro.cli(main)
