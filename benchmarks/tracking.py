"""What recording costs a training step: python -m benchmarks.tracking.

One rank trains `digits` in this process with a record of every step: thrown away, sent to an MLflow
database, to a server that refuses connections, and to one that accepts them and never answers.
"""

import contextlib
import dataclasses
import io
import itertools
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from rich.console import Console

from benchmarks.report import write_result
from pipeline.config import RunConfig
from pipeline.driver.console import RunConsole
from pipeline.driver.event_log import EventLog
from pipeline.driver.goodput import UsageMetrics
from pipeline.driver.monitor import RunMonitor
from pipeline.driver.preflight import PreparedRun, prepare
from pipeline.planner.meta_pass import training_flops
from pipeline.pretrain import parse
from pipeline.resilience.signals import Flag
from pipeline.run.distributed import join_process_group
from pipeline.run.events import Event, Metrics
from pipeline.tracking.spool import Tracker
from pipeline.training.worker import run_rank

_WARM_UP = 5


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Address of a server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def closed_address() -> str:
    """Address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def monitor_at(prepared: PreparedRun, uri: str) -> Iterator[RunMonitor]:
    """The monitor of a run as `pipeline.pretrain` opens it, without evaluations."""
    config = prepared.job.config
    tracking = dataclasses.replace(prepared.tracking, uri=uri)
    tracker = Tracker(tracking, prepared.spool, run_name=config.name, params=prepared.params())
    usage = UsageMetrics(
        config.cluster, config.train.precision, training_flops(config), tracker.last_value
    )
    event_log = EventLog(prepared.spool.parent, prepared.run)
    display = RunConsole(Console(file=io.StringIO()))
    try:
        yield RunMonitor(display, tracker, None, lambda: None, usage, event_log, prepared.run)
    finally:
        tracker.close(1.0)


def seconds_per_step(config: RunConfig, uri: str | None) -> float:
    """Train and return the median wall time from one record to the next."""
    clock: list[float] = []
    with contextlib.ExitStack() as stack:
        prepared = stack.enter_context(prepare(config, world_size=1))
        monitor = stack.enter_context(monitor_at(prepared, uri)) if uri else None

        def emit(event: Event) -> None:
            if monitor is not None:
                monitor.handle(event)
            if isinstance(event, Metrics):
                clock.append(time.perf_counter())

        run_rank(prepared.job, emit, Flag())
    return statistics.median(b - a for a, b in itertools.pairwise(clock[_WARM_UP:]))


def main(steps: int = 60, turns: int = 3) -> None:
    """Measure and write benchmarks/results/tracking.md.

    Args:
        steps: of one training.
        turns: trainings of each kind, in turn.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    config = parse(
        f"digits --cluster.launcher local --cluster.device cpu --train.stop-after {steps}".split()
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        silent_server() as silent,
        join_process_group(config.cluster),  # once: DeepSpeed keeps the first group of a process
    ):
        kinds = {
            "records thrown away": None,
            "MLflow in a database": f"sqlite:///{Path(folder) / 'mlflow.db'}",
            "MLflow refuses connections": closed_address(),
            "MLflow never answers": silent,
        }
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn, (kind, uri) in itertools.product(range(turns), kinds.items()):
            name = f"{len(found[kind])}-{turn}-{kind.replace(' ', '-')}"
            named = dataclasses.replace(config, storage=folder, name=name)
            found[kind].append(seconds_per_step(named, uri))
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    base = medians["records thrown away"]
    rows = [
        {"what": kind, "ms per step": 1e3 * value, "ratio": value / base}
        for kind, value in medians.items()
    ]
    notes = [
        f"Preset digits, one rank, one thread, a record of about 25 metrics per step; medians of "
        f"{turns} trainings of {steps} steps, wall time from one record to the next.",
    ]
    write_result("tracking", rows, notes)


if __name__ == "__main__":
    tyro.cli(main)
