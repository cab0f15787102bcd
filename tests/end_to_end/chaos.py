"""Seeded chaos: a digits run on Ray that is killed, stopped, moved, starved of disk and stores.

`python -m tests.end_to_end.chaos --seeds 20` prints one line per seed.
"""

import argparse
import contextlib
import dataclasses
import logging
import random
import resource
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from data_shards.sources.digits import digits
from data_shards.write import write_shard_set
from tests.end_to_end.chaos_run import (
    INTERVAL,
    PATIENCE_S,
    STEPS,
    ChaosError,
    Place,
    Result,
    Run,
    a_run,
)
from tests.end_to_end.ray_cluster import cluster
from tests.faulty_proxy import FaultyProxy, Weather
from tests.object_store import s3_clients, s3_server, upload

HEAD = "ray start --head --num-cpus 4"
_STORM = Weather(unavailable=0.5, reset=0.2, short=0.1)
_SAME_LOSSES = 10
"""Steps after a change of the ranks whose losses must agree; later rounding grows."""
_LOSS_TOLERANCE = 1e-5
_CRA_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Around:
    """What surrounds the runs, beside their place."""

    place: Place
    proxy: FaultyProxy


Fault = Callable[[Run, random.Random, Around], None]


def _signal_driver(number: int) -> Fault:
    def fault(run: Run, rng: random.Random, around: Around) -> None:
        run.driver.send_signal(number)
        run.driver.wait(PATIENCE_S)

    return fault


def _signal_rank(number: int) -> Fault:
    def fault(run: Run, rng: random.Random, around: Around) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(run.workers()).send_signal(number)

    return fault


def _full_disk(run: Run, rng: random.Random, around: Around) -> None:
    """For a while no file of one process, a rank or the driver, may grow beyond 4 kB."""
    pid = rng.choice([run.driver.pid, *(worker.pid for worker in run.workers())])
    with contextlib.suppress(ProcessLookupError):
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, hard))
        time.sleep(rng.uniform(0.5, 3))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _tracker_away(run: Run, rng: random.Random, around: Around) -> None:
    """MLflow's database is locked for a while."""
    with contextlib.closing(sqlite3.connect(run.database, timeout=30)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(rng.uniform(2, 8))
        database.rollback()


def _store_away(run: Run, rng: random.Random, around: Around) -> None:
    """The object store answers nobody for a while, then badly."""
    around.proxy.weather = Weather(unavailable=1.0)
    time.sleep(rng.uniform(2, 6))
    around.proxy.weather = _STORM
    time.sleep(rng.uniform(2, 6))
    around.proxy.weather = Weather()


def _second_submission(run: Run, rng: random.Random, around: Around) -> None:
    """The same command once more while the run is written: refused, and nothing is disturbed."""
    run.submit_beside()


def _death_in_the_start(run: Run, rng: random.Random, around: Around) -> None:
    """A rank is killed, and of those that are started in its place one before its first step."""
    known = {worker.pid for worker in run.workers()}
    _signal_rank(signal.SIGKILL)(run, rng, around)
    begun = run.starts()
    while run.driver.poll() is None and run.starts() == begun:
        started = [worker for worker in run.workers() if worker.pid not in known]
        if started:
            time.sleep(rng.uniform(0, 8))
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(started).kill()
            return
        time.sleep(0.05)


def _other_ranks(run: Run, rng: random.Random, around: Around) -> None:
    """The run goes on with another number of ranks."""
    run.go_on_with(5 - run.ranks)


FAULTS: dict[str, Fault] = {
    "driver SIGKILL": _signal_driver(signal.SIGKILL),
    "driver SIGTERM": _signal_driver(signal.SIGTERM),
    "rank SIGKILL": _signal_rank(signal.SIGKILL),
    "rank SIGTERM": _signal_rank(signal.SIGTERM),
    "rank SIGSTOP": _signal_rank(signal.SIGSTOP),
    "death in the start": _death_in_the_start,
    "second submission": _second_submission,
    "full disk": _full_disk,
    "tracker away": _tracker_away,
    "store away": _store_away,
}


def undisturbed(place: Place, ranks: int) -> tuple[Result, dict[str, float]]:
    """What the run leaves when nothing happens to it, and its certified robust accuracy."""
    with a_run(place, f"calm-{ranks}", ranks) as run:
        result = run.finish()
        if result.codes != (0,) or sorted(result.losses) != list(range(1, STEPS + 1)):
            raise ChaosError(f"the undisturbed run: {result}")
        return result, run.cra()


def disturb(run: Run, seed: int, around: Around) -> Iterator[str]:
    """Let two or three faults happen at random steps; every fifth seed ends with other ranks."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(2, STEPS - 5, 12), rng.choice([2, 3])))
    for step in steps:
        elastic = seed % 5 == 4 and step == steps[-1]
        name = "other ranks" if elastic else rng.choice(list(FAULTS))
        if not run.wait_for(min(step, STEPS - 2 * _SAME_LOSSES) if elastic else step):
            return
        yield f"{name} @ {run.steps()[-1]}"
        {**FAULTS, "other ranks": _other_ranks}[name](run, rng, around)


def check(calm: Result, result: Result, run: Run, faults: list[str]) -> None:
    """The promises of a run whose number of ranks has not changed, or up to its change.

    Raises:
        ChaosError: one is broken.
    """
    last = STEPS if run.changed_at is None else run.changed_at
    wrong = [s for s in range(1, last + 1) if result.losses.get(s) != calm.losses[s]]
    if wrong:
        raise ChaosError(f"losses differ at steps {wrong}")
    common = [step for step in calm.states.keys() & result.states.keys() if step <= last]
    if bad := [step for step in sorted(common) if result.states[step] != calm.states[step]]:
        raise ChaosError(f"the states at steps {bad} differ")
    if run.changed_at is None and result.digest != calm.digest:
        raise ChaosError(f"weights {result.digest}, undisturbed {calm.digest}")
    # The newest interval, and the one whose checkpoint was being written.
    full = any("full disk" in fault for fault in faults)
    if result.repeated >= 2 * INTERVAL and not full:
        raise ChaosError(f"{result.repeated} steps repeated, one interval is {INTERVAL}")


def check_change(calm: Result, cra: dict[str, float], result: Result, run: Run) -> str:
    """The promises after a change of the number of ranks; says how near the run came.

    Raises:
        ChaosError: one is broken.
    """
    first = (run.changed_at or 0) + 1
    after = range(first, first + _SAME_LOSSES)
    apart = max(abs(result.losses[step] / calm.losses[step] - 1) for step in after)
    if apart > _LOSS_TOLERANCE:
        raise ChaosError(f"losses of steps {after} differ by {apart:.1e}")
    for step in calm.states.keys() & result.states.keys():
        if calm.states[step][0] != result.states[step][0]:
            raise ChaosError(f"step {step} is followed by sample {result.states[step][0]}")
    found = run.cra()
    worst = max(abs(found[eps] - value) for eps, value in cra.items())
    if worst > _CRA_TOLERANCE:
        raise ChaosError(f"certified robust accuracy {found}, undisturbed {cra}")
    return (
        f", {run.ranks} ranks from step {first}: the next {_SAME_LOSSES} losses within "
        f"{apart:.0e}, CRA within {100 * worst:.2f} points"
    )


def check_tracker(storage: Path, name: str, result: Result) -> None:
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
    if not {(point.step, point.value) for point in history} >= set(result.losses.items()):
        raise ChaosError(f"{name}: tracked losses are missing")


def one_seed(
    around: Around, seed: int, calm: tuple[Result, dict[str, float]], ranks: int
) -> tuple[bool, str]:
    """Disturb one run; whether all promises were kept, and a line that tells."""
    begin = time.monotonic()
    faults: list[str] = []
    try:
        with a_run(around.place, f"seed-{seed}", ranks) as run:
            faults += disturb(run, seed, around)
            result = run.finish()
            check(calm[0], result, run, faults)
            change = check_change(*calm, result, run) if run.changed_at is not None else ""
        check_tracker(around.place.storage, f"seed-{seed}", result)
        verdict = f"ok, {result.repeated} steps repeated, {result.starts} starts{change}"
    except ChaosError as error:
        verdict = f"BROKEN {error}"
    seconds = time.monotonic() - begin
    line = f"seed {seed}, {ranks} ranks, {seconds:.0f} s: {'; '.join(faults)}: {verdict}"
    return verdict.startswith("ok"), line


@contextlib.contextmanager
def surroundings(home: Path) -> Iterator[Around]:
    """A Ray cluster whose nodes read shards from an object store behind a proxy."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request otherwise
    shards = home / "shards"
    write_shard_set(digits(), str(shards))
    with (
        s3_server() as address,
        FaultyProxy(address) as proxy,
        s3_clients(proxy.url),
        cluster(home, HEAD) as ray,
    ):
        storage = home / "runs"
        storage.mkdir()
        yield Around(Place(ray, storage, upload(shards)), proxy)


def chaos(around: Around, seeds: Iterable[int]) -> Iterator[tuple[bool, str]]:
    """Run the seeds; for each whether all promises were kept, and a line that tells."""
    calm: dict[int, tuple[Result, dict[str, float]]] = {}
    for seed in seeds:
        ranks = 3 if seed % 4 == 3 else 2
        if ranks not in calm:
            calm[ranks] = undisturbed(around.place, ranks)
        yield one_seed(around, seed, calm[ranks], ranks)


def main() -> int:
    """Print one line for each seed; returns how many broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--home", type=Path, help="an empty folder that stays; default: temporary")
    arguments = parser.parse_args()
    failed = 0
    with contextlib.ExitStack() as stack:
        home = arguments.home or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        )
        around = stack.enter_context(surroundings(home))
        for ok, line in chaos(around, range(arguments.first, arguments.first + arguments.seeds)):
            print(line, flush=True)  # noqa: T201
            failed += not ok
        print(f"requests to the store: {dict(around.proxy.seen)}")  # noqa: T201
    return failed


if __name__ == "__main__":
    sys.exit(main())
