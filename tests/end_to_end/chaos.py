"""Seeded chaos: a digits run on Ray that is killed, stopped, starved of disk and tracker.

`python -m tests.end_to_end.chaos --seeds 20` prints one line per seed.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from tests.end_to_end.ray_cluster import ROOT, Cluster, cluster

HEAD = "ray start --head --num-cpus 4 --node-ip-address 127.0.0.1"
INTERVAL = 10
"""Steps between checkpoints."""
STEPS = 90
_BATCH = 48  # for two and for three ranks
_OPTIONS = (
    f"--train.global-batch {_BATCH} --train.epochs 3 --train.warmup-epochs 0.5 --model.width 24 "
    f"--model.depth 2 --checkpoint.every-steps {INTERVAL} --checkpoint.no-evaluate "
    "--cluster.device cpu --cluster.max-failures 20 --cluster.hang-timeout-s 30 --start-or-resume"
)
_PATIENCE_S = 1200
_SUBMISSIONS = 12


class ChaosError(AssertionError):
    """A promise was broken."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run left."""

    digest: str
    losses: dict[int, float]
    """By step; of the last time that the step was made."""
    repeated: int
    """Most steps that were made again after one fault."""
    starts: int
    """How often ranks were started."""
    codes: tuple[int, ...]
    """Exit codes of the submissions."""


class Run:
    """One run: its folder, its submissions, its ranks.

    Args:
        ray: the cluster; nothing else runs on it.
        storage: folder of all runs of this test.
        name: of this run.
        ranks: number of workers.
    """

    def __init__(self, ray: Cluster, storage: Path, name: str, ranks: int) -> None:
        self._ray = ray
        self.folder = storage / name
        self.database = storage / "mlflow.db"
        self._log = (storage / f"{name}.log").open("ab")
        self._command = [sys.executable, "-m", "pipeline.pretrain", "digits", *_OPTIONS.split()]
        self._command += ["--storage", str(storage), "--name", name, "--cluster.address", ray.gcs]
        self._command += ["--cluster.workers", str(ranks)]
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
                self._command,
                cwd=ROOT,
                env=self._ray.environment,
                stdout=self._log,
                stderr=self._log,
            )
        return self._driver

    def workers(self) -> list[psutil.Process]:
        """The ranks, the youngest last."""
        found = []
        for process in psutil.Process(self._ray.nodes[0].pid).children(recursive=True):
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
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if self.driver.poll() == 0:
                return False
            if (self.steps() or [0])[-1] >= step and self.workers():
                return True
            time.sleep(0.05)
        raise ChaosError(f"{self.folder.name}: step {step} is not reached in {_PATIENCE_S} s")

    def finish(self) -> Result:
        """Submit until the run has succeeded; what it left."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if self.driver.poll() == 0:
                self.codes.append(0)
                return self._result()
            time.sleep(0.2)
        raise ChaosError(f"{self.folder.name} has not ended in {_PATIENCE_S} s")

    def close(self) -> None:
        """End the submission under way."""
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()
        self._log.close()

    def _result(self) -> Result:
        losses: dict[int, float] = {}
        for row in self.rows("tracking/spool.jsonl"):
            if "train/loss" in row.get("values", {}):
                losses[row["step"]] = row["values"]["train/loss"]
        steps = self.steps()
        repeated = [before + 1 - after for before, after in itertools.pairwise(steps)]
        artifact = json.loads(
            (self.folder / f"artifacts/step-{STEPS:08d}/artifact.json").read_text()
        )
        starts = sum(row["event"] == "Started" for row in self.rows("events.jsonl"))
        return Result(artifact["digest"], losses, max(0, *repeated), starts, tuple(self.codes))


Fault = Callable[[Run, random.Random], None]


def _signal_driver(number: int) -> Fault:
    def fault(run: Run, rng: random.Random) -> None:
        run.driver.send_signal(number)
        run.driver.wait(_PATIENCE_S)

    return fault


def _signal_rank(number: int) -> Fault:
    def fault(run: Run, rng: random.Random) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(run.workers()).send_signal(number)

    return fault


def _full_disk(run: Run, rng: random.Random) -> None:
    """For a while no file of one process, a rank or the driver, may grow beyond 4 kB."""
    pid = rng.choice([run.driver.pid, *(worker.pid for worker in run.workers())])
    with contextlib.suppress(ProcessLookupError):
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, hard))
        time.sleep(rng.uniform(0.5, 3))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _tracker_away(run: Run, rng: random.Random) -> None:
    """MLflow's database is locked for a while."""
    with contextlib.closing(sqlite3.connect(run.database, timeout=30)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(rng.uniform(2, 8))
        database.rollback()


FAULTS: dict[str, Fault] = {
    "driver SIGKILL": _signal_driver(signal.SIGKILL),
    "driver SIGTERM": _signal_driver(signal.SIGTERM),
    "rank SIGKILL": _signal_rank(signal.SIGKILL),
    "rank SIGTERM": _signal_rank(signal.SIGTERM),
    "rank SIGSTOP": _signal_rank(signal.SIGSTOP),
    "full disk": _full_disk,
    "tracker away": _tracker_away,
}


@contextlib.contextmanager
def a_run(ray: Cluster, storage: Path, name: str, ranks: int) -> Iterator[Run]:
    """A run whose processes are ended whatever happens."""
    run = Run(ray, storage, name, ranks)
    try:
        yield run
    finally:
        run.close()


def undisturbed(ray: Cluster, storage: Path, ranks: int) -> Result:
    """What the run leaves when nothing happens to it."""
    with a_run(ray, storage, f"calm-{ranks}", ranks) as run:
        result = run.finish()
    if result.codes != (0,) or sorted(result.losses) != list(range(1, STEPS + 1)):
        raise ChaosError(f"the undisturbed run: {result}")
    return result


def disturbed(ray: Cluster, storage: Path, seed: int, ranks: int) -> tuple[list[str], Result]:
    """The same run with two or three faults at random steps; the faults and what it leaves."""
    rng = random.Random(seed)
    done = []
    with a_run(ray, storage, f"seed-{seed}", ranks) as run:
        for step in sorted(rng.sample(range(2, STEPS - 5, 12), rng.choice([2, 3]))):
            name = rng.choice(list(FAULTS))
            if not run.wait_for(step):
                break
            done.append(f"{name} @ {run.steps()[-1]}")
            FAULTS[name](run, rng)
        return done, run.finish()


def check(calm: Result, result: Result, faults: list[str]) -> None:
    """The promises.

    Raises:
        ChaosError: one is broken.
    """
    if result.digest != calm.digest:
        raise ChaosError(f"{faults}: weights {result.digest}, undisturbed {calm.digest}")
    if result.losses != calm.losses:
        wrong = [s for s in calm.losses if result.losses.get(s) != calm.losses[s]]
        raise ChaosError(f"{faults}: losses differ at steps {wrong}")
    # The newest interval, and the one whose checkpoint was being written.
    full = any("full disk" in fault for fault in faults)
    if result.repeated >= 2 * INTERVAL and not full:
        raise ChaosError(f"{faults}: {result.repeated} steps repeated, one interval is {INTERVAL}")


def check_tracker(storage: Path, name: str, calm: Result) -> None:
    """Every step's loss has arrived, in one run.

    Raises:
        ChaosError: it has not.
    """
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("digits").experiment_id
    runs = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    if [run.info.status for run in runs] != ["FINISHED"]:
        raise ChaosError(f"{name}: tracked runs {[run.info.status for run in runs]}")
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    points = [(point.step, point.timestamp) for point in history]
    if len(set(points)) != len(points):
        raise ChaosError(f"{name}: a metric arrived twice")
    if {(point.step, point.value) for point in history} != set(calm.losses.items()):
        raise ChaosError(f"{name}: the tracked losses differ")


def chaos(ray: Cluster, storage: Path, seeds: Iterable[int]) -> Iterator[tuple[bool, str]]:
    """Run the seeds; for each whether all promises were kept, and a line that tells."""
    calm: dict[int, Result] = {}
    for seed in seeds:
        ranks = 3 if seed % 4 == 3 else 2
        if ranks not in calm:
            calm[ranks] = undisturbed(ray, storage, ranks)
        begin = time.monotonic()
        faults: list[str] = []
        try:
            faults, result = disturbed(ray, storage, seed, ranks)
            check(calm[ranks], result, faults)
            check_tracker(storage, f"seed-{seed}", result)
            verdict = f"ok, {result.repeated} steps repeated, {result.starts} starts"
        except ChaosError as error:
            verdict = f"BROKEN {error}"
        seconds = time.monotonic() - begin
        line = f"seed {seed}, {ranks} ranks, {seconds:.0f} s: {'; '.join(faults)}: {verdict}"
        yield verdict.startswith("ok"), line


def main() -> int:
    """Print one line for each seed; returns how many broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, cluster(folder, HEAD) as ray:
        seeds = range(arguments.first, arguments.first + arguments.seeds)
        for ok, line in chaos(ray, Path(folder), seeds):
            print(line, flush=True)  # noqa: T201
            failed += not ok
    return failed


if __name__ == "__main__":
    sys.exit(main())
