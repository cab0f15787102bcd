"""What a few minutes on a GPU are spent on first, on a machine that has torch and nothing else.

    python -m benchmarks.gpu_day wheels FOLDER    # here: what that machine lacks, to be copied
    python -m pip install --no-index --no-deps FOLDER/*.whl                             # there
    python -m benchmarks.gpu_day run --out DAY                                          # there
    python -m benchmarks.gpu_day take DAY         # here: its tables go to benchmarks/results

Parts run one after the other, each in a process of its own with its own limit, the most important
first. What a part has said and its tables are written when it ends: a machine that is taken away
takes one part with it, and the same command goes on with the parts that have no result yet.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.extras import SubcommandApp

from benchmarks.gpu_wheels import download
from benchmarks.report import RESULTS, Row, here, keep, markdown

_RESULTS = "gpu_day.json"
_SAID = 4000
"""Last characters of its output that a part keeps."""
_BILLION = "imagenet-L32W4096"


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to be measured.

    Attributes:
        name: for `--parts`.
        limit_s: seconds after which it is ended.
        command: words after the interpreter; {out} is the folder, {device} cuda or cpu.
        small: takes the place of the command where there is no GPU, to try the route.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]
    small: tuple[str, ...] = ()


PARTS = (
    Part(
        "kernels", 60, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:randomly", "tests"),
    ),
    Part(
        "digits", 50, ("-m", "benchmarks.train", "digits", "20", "--train.precision", "bf16"),
        ("-m", "benchmarks.train", "digits", "2", "--train.precision", "bf16",
         "--model.depth", "1"),
    ),
    Part(
        "network_step", 60, ("-m", "benchmarks.network_step", "--width", "2048"),
        ("-m", "benchmarks.network_step", "--width", "64", "--depth", "2", "--batch", "4",
         "--repeats", "1", "--gpu-width", "64", "--gpu-tokens", "64"),
    ),
    Part(
        "optimizer_step", 60, ("-m", "benchmarks.optimizer_step", "--width", "4096", "--matrices",
                               "2", "--repeats", "2", "--drift-steps", "200"),
        ("-m", "benchmarks.optimizer_step", "--width", "64", "--matrices", "1", "--repeats", "1",
         "--drift-width", "16", "--drift-steps", "24"),
    ),
    Part(
        "cifar", 80, ("-m", "benchmarks.train", "cifar10-L32W2048", "40"),
        ("-m", "benchmarks.train", "cifar10-L32W2048", "2", "--model.depth", "1", "--model.width",
         "32", "--train.global-batch", "4", "--cluster.device", "cpu"),
    ),
    Part(
        "billion", 80, ("-m", "benchmarks.train", _BILLION, "12", "--model.depth", "8",
                        "--train.global-batch", "128", "--optim.retraction", "fast"),
        ("-m", "benchmarks.train", _BILLION, "2", "--model.depth", "1", "--model.width", "600",
         "--train.global-batch", "4", "--cluster.device", "cpu"),
    ),
    Part(
        "calibrate", 60, ("-m", "benchmarks.calibrate", _BILLION, "--out", "{out}/measured.json",
                          "--cluster.workers", "1", "--optim.retraction", "fast",
                          "--train.activation-checkpointing", "none", "--images", "128"),
        ("-m", "benchmarks.calibrate", "digits", "--out", "{out}/measured.json",
         "--cluster.workers", "1", "--images", "4"),
    ),
    Part(
        "evaluation", 30, ("-m", "benchmarks.float64_pass"),
        ("-m", "benchmarks.float64_pass", "--order", "64", "--width", "32", "--depth", "1",
         "--batch", "1"),
    ),
)  # fmt: skip


class Day:
    """The parts of a folder.

    Args:
        out: where results are kept.
        device: `cuda`, or `cpu` for the small commands.
        parts: what there is.
        clock: seconds.
    """

    def __init__(
        self,
        out: Path,
        device: str,
        parts: Sequence[Part] = PARTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out, self._device, self._parts, self._clock = out, device, parts, clock
        out.mkdir(parents=True, exist_ok=True)

    def results(self) -> dict[str, dict[str, Any]]:
        """Of the parts that have ended, by name."""
        file = self._out / _RESULTS
        return json.loads(file.read_text()) if file.exists() else {}

    def run(self, names: Sequence[str], limit_s: float) -> None:
        """Run the named parts, or those that have no result, until the time is over.

        Raises:
            ValueError: no part has such a name.
        """
        known = {part.name: part for part in self._parts}
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"no parts {', '.join(unknown)}; known: {', '.join(known)}")
        end = self._clock() + limit_s
        for name in names or [name for name in known if name not in self.results()]:
            left = end - self._clock()
            if left <= 0:
                break
            self._keep(name, self._one(known[name], min(left, known[name].limit_s)))

    def _one(self, part: Part, limit_s: float) -> dict[str, Any]:
        words = part.small if self._device == "cpu" and part.small else part.command
        command = [word.format(out=self._out, device=self._device) for word in words]
        begin = self._clock()
        with tempfile.TemporaryDirectory() as tables:
            said, ended = _finished([sys.executable, *command], limit_s, Path(tables))
            found = [json.loads(path.read_text()) for path in sorted(Path(tables).rglob("*.json"))]
        return {
            "device": self._device,
            "where": here(),
            "ended": ended,
            "s": self._clock() - begin,
            "said": said[-_SAID:],
            "tables": found,
        }

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        results = {**self.results(), name: result}
        file = self._out / _RESULTS
        new = file.with_suffix(".new")
        new.write_text(json.dumps(results, indent=1))
        new.replace(file)  # never half of it

    def rows(self) -> list[Row]:
        """Of the table: every part, also those that were not run."""
        results = self.results()
        return [
            {"what": part.name, "seconds": result["s"], "ended": result["ended"]}
            if (result := results.get(part.name))
            else {"what": part.name, "ended": "not run"}
            for part in self._parts
        ]

    def table(self) -> dict[str, Any]:
        """The day as a result of a benchmark, measured when its last part was."""
        ended = [result["where"] for result in self.results().values()]
        where = max(ended, key=lambda found: str(found["date"]), default=here())
        notes = [f"What each part has said, and its tables, are in {_RESULTS}."]
        return {"name": "gpu_day", **where, "rows": self.rows(), "notes": notes}

    def take(self, folder: Path) -> None:
        """Keep the tables of all parts as results of their benchmarks.

        Raises:
            ValueError: there are none, or a part ran without a GPU.
        """
        results = self.results()
        small = [name for name, result in results.items() if result["device"] != "cuda"]
        if small or not results:
            raise ValueError(f"{self._out}: {', '.join(small) or 'no part'} ran, and on no GPU")
        for table in [*(t for result in results.values() for t in result["tables"]), self.table()]:
            keep(table, folder=folder)


def _finished(command: list[str], limit_s: float, tables: Path) -> tuple[str, str]:
    """What a command has said, and how it ended; its own processes end with it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": "1", "BENCHMARK_RESULTS": str(tables)},
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
        return said, f"exit {process.returncode}" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return said, f"ended after {limit_s:.0f} s"


app = SubcommandApp()


@app.command
def run(
    out: Path, parts: tuple[str, ...] = (), device: str = "cuda", limit_s: float = 480.0
) -> None:
    """Run what has no result yet, and write the table of the day.

    What `calibrate` has measured is in `measured.json`, for `pipeline.plan --measured`.

    Args:
        out: folder of the results, three files.
        parts: run these, also those that have a result.
        device: cuda, or cpu to try the route with small sizes.
        limit_s: seconds of all parts together.
    """
    day = Day(out.absolute(), device)
    day.run(parts, limit_s)
    table = markdown(day.table())
    (out / "gpu_day.md").write_text(table)
    print(table)


@app.command
def wheels(folder: tyro.conf.Positional[Path], python: str = "3.12") -> None:
    """Fetch what a machine with torch alone lacks, as wheels.

    Args:
        folder: where they go.
        python: version of that machine's Python.
    """
    print(f"{download(folder, python) / 1e6:.1f} MB of wheels in {folder}")


@app.command
def take(out: tyro.conf.Positional[Path]) -> None:
    """Keep the tables that a GPU has measured in benchmarks/results.

    Args:
        out: folder of the results.
    """
    Day(out, "cuda").take(RESULTS)


def main() -> None:
    """Run the entry."""
    app.cli(prog="python -m benchmarks.gpu_day")


if __name__ == "__main__":
    main()
