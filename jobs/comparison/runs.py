"""Training runs of a comparison: processes of `python -m pipeline.pretrain`, and what they left."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_shards.command_line.progress import ProgressBar
from data_shards.storage.store import Store
from jobs.child_processes import end_processes
from jobs.comparison.config import CompareConfig
from jobs.evaluation.stored_result import StoredResult, read_result
from model.artifact.artifact import ArtifactInfo, parameter_shapes, read_info
from pipeline.run import layout
from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.run.lease import read_record_object
from pipeline.run.relative_urls import resolve
from pipeline.tracking.spool import read_rows

logger = logging.getLogger(__name__)

_DONE = "done.json"
_TAIL = 1500
_GRACE_S = 60.0
"""A run that is told to stop keeps a checkpoint first."""

_TOLERANCE = 0.03
"""Of a budget of processor time; a run ends with the step nearest to it."""

SHARDS, TRIAL, FINAL = "shards", "trial", "final"
"""What a run is for: to make the shard set, to judge settings, to be compared."""


class TrainingRunError(RuntimeError):
    """A run of the comparison failed, or used more than its budget."""


@dataclass(frozen=True)
class RunRequest:
    """One training run: a preset, changed values and what it is for.

    Attributes:
        preset: name of the preset, and more words of the command line after it.
        role: `SHARDS`, `TRIAL` or `FINAL`.
        values: overrides by setting, such as {"train.seed": 1}.
        certify: whether the run ends with a certified table.
    """

    preset: str
    role: str
    values: Mapping[str, Any]
    certify: bool = True

    def name(self, config: CompareConfig) -> str:
        """Name of the run: the same for the same order under the same machine settings."""
        parts = [self.values, config.shards, config.workers, config.threads, config.extra]
        name, *more = shlex.split(self.preset)
        if more:
            parts.append(more)
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return f"{name}-{self.role}-{digest[:10]}"

    def words(self, config: CompareConfig) -> list[str]:
        """The command line after `python`."""
        tracking = config.store()
        values = {
            "storage": f"{config.out}/runs",
            "name": self.name(config),
            "tracking.uri": tracking.uri,
            "tracking.experiment": tracking.experiment,
            "cluster.launcher": "local" if config.workers == 1 else "ray",
            **({"cluster.workers": config.workers} if config.workers > 1 else {}),
            "cluster.cpus-per-worker": config.threads,
            "checkpoint.every-steps": 0,
            **({"data.shards": config.shards} if config.shards else {}),
            **self.values,
        }
        words = [f"--{name}={value}" for name, value in values.items()]
        if not self.certify:
            words.append("--checkpoint.no-evaluate")
        return ["-m", "pipeline.pretrain", *shlex.split(self.preset), *words, *config.extra]


@dataclass(frozen=True)
class Outcome:
    """What a finished run left in its folder.

    Attributes:
        order: what was asked for.
        folder: its run folder.
    """

    order: RunRequest
    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration, nested."""
        return read_record_object(Store(self.folder), layout.CONFIG) or {}

    def setting(self, name: str) -> Any:
        """A value of the resolved configuration by its dotted name; None if there is none."""
        value: Any = self.settings
        for part in name.replace("-", "_").split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @cached_property
    def artifact(self) -> Path:
        """Folder of the last artifact."""
        folders = (self.folder / layout.ARTIFACTS).iterdir()
        return max(folders, key=lambda folder: layout.step_of(folder.name) or 0)

    @cached_property
    def info(self) -> ArtifactInfo:
        """Description of the last artifact."""
        return read_info(Store(str(self.artifact)).open)

    @property
    def parameters(self) -> int:
        """Trained values of the network."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.info.network).values())

    @cached_property
    def result(self) -> StoredResult:
        """The evaluation of the last artifact, which its certificate and samples bear out."""
        split = self.setting("data.test_split")
        return read_result(Store(str(self.artifact / layout.evaluation(split))))

    @property
    def summary(self) -> EvaluationSummary:
        """The certified table of the last artifact."""
        return self.result.summary

    @property
    def shards_url(self) -> str:
        """The shard set that it was trained on."""
        return resolve(self.info.context["shards_url"], base=str(self.artifact))

    @cached_property
    def _used(self) -> tuple[int, float]:
        """Steps and processor seconds that the records of the loop came to."""
        steps, seconds, before = 0, 0.0, 0.0
        for row in read_rows(self.folder / layout.TRACKING / layout.SPOOL, "metrics"):
            now = row["values"].get("train/processor_s")
            if now is not None and row["step"] > steps:
                # A run that was continued counts from 0 again.
                seconds += now - before if now >= before else now
                steps, before = row["step"], now
        return steps, seconds

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._used[0]

    @property
    def seconds(self) -> float:
        """Processor seconds of the training loop, over all ranks and threads."""
        return self._used[1]

    @property
    def budget(self) -> float:
        """Processor seconds that it was given; 0: any number."""
        return float(self.order.values.get("train.processor-seconds", 0))

    @property
    def held(self) -> bool:
        """Whether it used its budget of time and no more."""
        return not self.budget or abs(self.seconds / self.budget - 1) <= _TOLERANCE


class Runs:
    """Runs orders as processes, `parallel` at a time; finished ones are read, not repeated.

    Args:
        config: the comparison.
    """

    def __init__(self, config: CompareConfig) -> None:
        self._config = config
        self._root = Path(config.out).absolute()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, orders: Sequence[RunRequest]) -> Iterator[Outcome]:
        """Outcomes in the order of the orders.

        Raises:
            TrainingRunError: a run failed; the others that are under way end first.

        When the comparison is told to stop, it stops them.
        """
        what = " and ".join(dict.fromkeys(order.role for order in orders))
        with (
            concurrent.futures.ThreadPoolExecutor(self._config.parallel) as pool,
            ProgressBar(f"{what} runs", len(orders), unit="runs") as bar,
        ):
            try:
                for outcome in pool.map(self._one, orders):
                    bar.advance()
                    yield outcome
            except (KeyboardInterrupt, SystemExit):
                self._stopped = True
                end_processes(list(self._running), _GRACE_S)
                raise

    def _one(self, order: RunRequest) -> Outcome:
        folder = self._root / "runs" / order.name(self._config)
        outcome = Outcome(order, folder)
        if (folder / _DONE).exists():
            return outcome
        words = order.words(self._config)
        # What a run has used of a budget of time is not known to the one that would continue it.
        continues = "train.processor-seconds" not in order.values
        if continues and list(folder.glob(f"{layout.CHECKPOINTS}/*/*/{layout.COMMIT}")):
            words.append("--resume")
        elif folder.exists():
            shutil.rmtree(folder)
        logs = self._root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{order.name(self._config)}.log"
        logger.info("%s %s: %s", order.preset, order.role, dict(order.values))
        began = time.monotonic()
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(self._config.threads)},
            )
            self._running.add(process)
            if self._stopped:
                process.terminate()
            code = process.wait()
            self._running.discard(process)
        if code:
            tail = log.read_text(errors="replace")[-_TAIL:]
            raise TrainingRunError(
                f"{order.preset} ({order.role}) ended with exit code {code}; the end of "
                f"{log}:\n{tail}"
            )
        if order.certify:
            outcome.summary  # noqa: B018  a run without a table must not count as finished
        if order.role == FINAL and not outcome.held:
            raise TrainingRunError(
                f"{order.preset} ({order.role}) used {outcome.seconds:.2f} processor seconds of a "
                f"budget of {outcome.budget:g}, beyond {_TOLERANCE:.0%}: a step is too long for it"
            )
        (folder / _DONE).write_text(json.dumps({"seconds": time.monotonic() - began}))
        return outcome
