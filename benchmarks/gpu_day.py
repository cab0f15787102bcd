"""What a few minutes on a GPU are spent on first: `python -m benchmarks.gpu_day --out FOLDER`.

Parts run one after the other, each in a process of its own with its own limit, the most important
first. What a part has said is written when it ends: a machine that is taken away takes one part
with it, and the same command goes on with the parts that have no result yet. Nothing has to be
installed but what a part itself imports: one whose imports are missing says so in a second.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.report import RESULTS, Row, hardware, write_result

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


def _training(preset: str, steps: int, *more: str) -> tuple[str, ...]:
    return (
        "-m", "pipeline.pretrain", preset, "--cluster.launcher", "local", "--train.precision",
        "bf16", "--train.stop-after", str(steps), "--checkpoint.no-evaluate",
        "--storage", "{out}/runs", *more,
    )  # fmt: skip


PARTS = (
    Part(
        "kernels", 60, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:randomly",
                        "tests/model/test_block_pass.py", "tests/benchmarks/test_network_step.py"),
    ),
    Part("digits", 90, _training("digits", 20), _training("digits", 2)),
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
        "billion", 90, ("-m", "benchmarks.calibrate", _BILLION, "--out", "{out}/measured.json",
                        "--cluster.workers", "1", "--train.precision", "bf16", "--optim.retraction",
                        "fast", "--train.activation-checkpointing", "none", "--images",
                        "128"),
        ("-m", "benchmarks.calibrate", "digits", "--out", "{out}/measured.json",
         "--cluster.workers", "1", "--images", "4"),
    ),
    Part(
        "cifar", 90, _training("cifar10-L32W2048", 40, "--data.source", "synthetic"),
        _training("digits", 2, "--model.depth", "1"),
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
        try:
            done = subprocess.run(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit_s,
                cwd=Path(__file__).parents[1],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            said, ended = done.stdout, f"exit {done.returncode}" if done.returncode else "done"
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            ended = f"ended after {limit_s:.0f} s"
        return {"ended": ended, "s": self._clock() - begin, "said": said[-_SAID:]}

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


def spend(
    out: Path, parts: tuple[str, ...] = (), device: str = "cuda", limit_s: float = 480.0
) -> None:
    """Run what has no result yet and write its table.

    Args:
        out: folder of the results.
        parts: run these, also those that have a result.
        device: cuda, or cpu to try the route with small sizes.
        limit_s: seconds of all parts together.
    """
    day = Day(out, device)
    day.run(parts, limit_s)
    folder = RESULTS if device == "cuda" else out
    notes = [f"{device}; {hardware()}.", "What each part has said is in gpu_day.json."]
    write_result("gpu_day", day.rows(), notes, folder=folder)


def main() -> None:
    """Run the entry."""
    tyro.cli(spend, prog="python -m benchmarks.gpu_day")


if __name__ == "__main__":
    main()
