"""One small digits run on Ray that can be hurt: its submissions, its ranks, what it leaves."""

import contextlib
import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from pipeline.checkpoint.reader import committed
from tests.end_to_end.ray_cluster import ROOT, Cluster

INTERVAL = 10
"""Steps between checkpoints."""
STEPS = 90
_BATCH = 48  # for two and for three ranks
_OPTIONS = (
    f"--train.global-batch {_BATCH} --train.epochs 3.75 --train.warmup-epochs 0.5 --model.width 24 "
    f"--model.depth 2 --checkpoint.every-steps {INTERVAL} --checkpoint.keep-last 0 "
    "--checkpoint.no-evaluate --cluster.device cpu --cluster.max-failures 20 "
    # Nothing is kept in memory, so the store is asked in every epoch.
    "--data.stream.cache-bytes 0 --data.stream.read-ahead-bytes 50000 "
    "--cluster.hang-timeout-s 30 --start-or-resume"
)
PATIENCE_S = 1200
_SUBMISSIONS = 12


class ChaosError(AssertionError):
    """A promise was broken."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the runs of one series live."""

    ray: Cluster
    """Nothing else runs on it."""
    storage: Path
    """Folder of the runs."""
    shards: str
    """URL of the shard set."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run left."""

    digest: str
    """Of the last artifact."""
    losses: dict[int, float]
    """By step; of the last time that the step was made."""
    states: dict[int, object]
    """Sample cursor and digests of the ranks' files, by the step of the checkpoint."""
    repeated: int
    """Most steps that were made again after one fault."""
    starts: int
    """How often ranks were started."""
    codes: tuple[int, ...]
    """Exit codes of the submissions."""


class Run:
    """One run: its folder, its submissions, its ranks.

    Args:
        place: where.
        name: of this run.
        ranks: number of workers.

    Attributes:
        ranks: of the next submission.
        changed_at: step of the checkpoint with which another number of ranks began; None: not yet.
    """

    def __init__(self, place: Place, name: str, ranks: int) -> None:
        self._place = place
        self.folder = place.storage / name
        self.database = place.storage / "mlflow.db"
        self.ranks = ranks
        self.changed_at: int | None = None
        self._log = (place.storage / f"{name}.log").open("ab")
        self.codes: list[int] = []
        self._driver: subprocess.Popen[bytes] | None = None

    @property
    def driver(self) -> subprocess.Popen[bytes]:
        """The submission under way, or the one that has succeeded; a new one after a failure."""
        if self._driver is not None and self._driver.poll():
            self.codes.append(self._driver.returncode)
            self._driver = None
        if self._driver is None:
            if len(self.codes) == _SUBMISSIONS:
                raise ChaosError(f"{self.folder.name} does not end: exit codes {self.codes}")
            self._driver = subprocess.Popen(
                self._command(),
                cwd=ROOT,
                env=self._place.ray.environment,
                stdout=self._log,
                stderr=self._log,
            )
        return self._driver

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "pipeline.pretrain", "digits", *_OPTIONS.split()]
        command += ["--storage", str(self._place.storage), "--name", self.folder.name]
        command += ["--cluster.address", self._place.ray.gcs, "--data.shards", self._place.shards]
        return [*command, "--cluster.workers", str(self.ranks)]

    def submit_beside(self) -> None:
        """Submit the run a second time while the first submission holds it.

        Raises:
            ChaosError: it was not refused, although the first has not ended.
        """
        code = subprocess.run(
            self._command(),
            cwd=ROOT,
            env=self._place.ray.environment,
            stdout=self._log,
            stderr=self._log,
            timeout=PATIENCE_S,
        ).returncode
        if code != 2 and self.driver.poll() is None:
            raise ChaosError(f"{self.folder.name}: a second submission ended with {code}, not 2")

    def starts(self) -> int:
        """How often ranks have begun to train."""
        return sum(row["event"] == "Started" for row in self.rows("events.jsonl"))

    def workers(self) -> list[psutil.Process]:
        """The ranks, the youngest last."""
        found = []
        for process in psutil.Process(self._place.ray.nodes[0].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def rows(self, file: str) -> list[dict]:
        """Whole lines of a log of the run, as far as it has got."""
        path = self.folder / file
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def steps(self) -> list[int]:
        """Steps in the order in which they were recorded."""
        rows = self.rows("tracking/spool.jsonl")
        return [row["step"] for row in rows if "train/loss" in row.get("values", {})]

    def wait_for(self, step: int) -> bool:
        """Wait until a step was made, submitting again what has ended; False if the run is done."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.driver.poll() == 0:
                return False
            if (self.steps() or [0])[-1] >= step and self.workers():
                return True
            time.sleep(0.05)
        raise ChaosError(f"{self.folder.name}: step {step} is not reached in {PATIENCE_S} s")

    def go_on_with(self, ranks: int) -> None:
        """End the submission under way with notice; the next one has another number of ranks."""
        self.driver.send_signal(signal.SIGTERM)
        self.driver.wait(PATIENCE_S)
        self.ranks = ranks
        checkpoints = list(committed(Store(self.folder)).values())
        self.changed_at = _commit(checkpoints[0])["step"] if checkpoints else 0

    def finish(self) -> Result:
        """Submit until the run has succeeded; what it left."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.driver.poll() == 0:
                self.codes.append(0)
                return self._result()
            time.sleep(0.2)
        raise ChaosError(f"{self.folder.name} has not ended in {PATIENCE_S} s")

    def close(self) -> None:
        """End the submission under way."""
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()
        self._log.close()

    def cra(self) -> dict[str, float]:
        """Certified robust accuracy of the last artifact on the test split, by radius."""
        summary = evaluate(
            {
                "artifact": str(self.artifact),
                "shards": self._place.shards,
                "launcher": "local",
                "record": False,
                "out": str(self._place.storage / f"{self.folder.name}-cra"),
            }
        )
        return dict(summary.columns["sound"].cra)

    @property
    def artifact(self) -> Path:
        """Folder of the last artifact."""
        return self.folder / f"artifacts/step-{STEPS:08d}"

    def _result(self) -> Result:
        losses: dict[int, float] = {}
        for row in self.rows("tracking/spool.jsonl"):
            if "train/loss" in row.get("values", {}):
                losses[row["step"]] = row["values"]["train/loss"]
        steps = self.steps()
        repeated = [before + 1 - after for before, after in itertools.pairwise(steps)]
        commits = [_commit(folder) for folder in committed(Store(self.folder)).values()]
        return Result(
            digest=json.loads((self.artifact / "artifact.json").read_text())["digest"],
            losses=losses,
            states={commit["step"]: (commit["cursor"], commit["files"]) for commit in commits},
            repeated=max(0, *repeated),
            starts=self.starts(),
            codes=tuple(self.codes),
        )


def _commit(folder: Store) -> dict:
    return json.loads(folder.read("commit.json"))


@contextlib.contextmanager
def a_run(place: Place, name: str, ranks: int) -> Iterator[Run]:
    """A run whose processes are ended whatever happens."""
    run = Run(place, name, ranks)
    try:
        yield run
    finally:
        run.close()
