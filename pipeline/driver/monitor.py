"""The driver's side of a run: shows, records and certifies what rank 0 reports."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator

from data_shards.storage.store import Store
from model.artifact.artifact import read_info
from pipeline.driver.console import RunConsole
from pipeline.driver.evaluations import Evaluations
from pipeline.driver.event_log import EventLog
from pipeline.driver.goodput import UsageMetrics
from pipeline.run import layout
from pipeline.run.evaluation_summary import local_path
from pipeline.run.events import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    GroupFailed,
    Hung,
    Metrics,
    MetricsReplayed,
    RolledBack,
    Skipped,
    Started,
    Straggling,
)
from pipeline.run.worker_spec import WorkerSpec
from pipeline.tracking.spool import Tracker

_REPROJECTIONS = "orthogonality/reprojections"
_NOT_CERTIFIED = "earlier checkpoints are not certified"
NOT_REMOVED = "surplus checkpoints are not removed"


class RunMonitor:
    """Handles the events of one run in order.

    Args:
        display: what the person sees.
        tracker: the MLflow record.
        evaluations: certification of saved checkpoints; None leaves them uncertified.
        after_saved: called in the background when a checkpoint has been saved.
        usage: counts what the run uses.
        event_log: the run's event log.
        run: folder of the run.
        began: called in the background when the ranks are about to train.

    Attributes:
        step: of the newest record.
        begun: the ranks have begun to train, in this execution.
    """

    def __init__(
        self,
        display: RunConsole,
        tracker: Tracker,
        evaluations: Evaluations | None,
        after_saved: Callable[[], object],
        usage: UsageMetrics,
        event_log: EventLog,
        run: Store,
        began: Callable[[], object] = lambda: None,
    ) -> None:
        self.step = 0
        self.begun = False
        self._run = run
        self._followed: set[int] = set()
        self._following = threading.Lock()
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._began = began
        self._usage = usage
        self._display = display
        self._tracker = tracker
        self._evaluations = evaluations
        self._after_saved = after_saved
        self._event_log = event_log
        self._hangs = 0
        self._reprojections = tracker.last_value(_REPROJECTIONS) or 0.0

    def stamp(self, job: WorkerSpec) -> WorkerSpec:
        """The job with the id of its tracked run, so that artifacts lead back to it.

        Left out when the tracking server has not answered yet.
        """
        if self._tracker.run is None:
            return job
        context = {**job.context, "train_run_id": self._tracker.run.run_id}
        return dataclasses.replace(job, context=context)

    def handle(self, event: Event) -> None:
        """Show and record one event; waits for no server and no task."""
        self._event_log.add(event)
        match event:
            case Started():
                self._start(event)
            case Metrics():
                self.step = event.step
                values = {**event.values, **self._usage.values(event)}
                self._display.metrics(dataclasses.replace(event, values=values))
                self._tracker.log_metrics(event.step, values, event.time_ms)
                self._note_repairs(event)
            case MetricsReplayed():
                self._recall(event)
            case CheckpointSaved():
                self._keep(event)
            case CheckpointFailed():
                self._display.message(f" step {event.step}: {event.error}", "not kept", "red")
                self._tracker.log_metrics(event.step, {"checkpoint/failed": 1.0})
            case Straggling():
                self._display.message(
                    f" rank {event.rank} ({event.host}): its forward pass takes "
                    f"{event.ratio:.1f} times the median, at step {event.step}",
                    "slow",
                    "yellow",
                )
                self._tracker.set_tags({"straggler": f"rank {event.rank}, {event.host}"})
            case Hung():
                self._hangs += 1
                self._display.message(
                    f" in step {event.step}: {event.report}; stacks: {local_path(event.url)}",
                    "hung",
                    "red",
                )
                self._tracker.log_metrics(event.step, {"faults/hangs": float(self._hangs)})
            case GroupFailed() | Skipped():
                self._display.message(*_message(event))
            case RolledBack():
                self._go_back(event)

    def _go_back(self, event: RolledBack) -> None:
        self._usage.back_to(event.step)
        self._display.message(
            f" from step {event.given_up} to {event.step}: {event.samples} samples are "
            f"left out, epoch and position {event.first} to {event.next}",
            "rolled back",
            "yellow",
        )
        counts = {
            "train/rollbacks": float(event.rollbacks),
            "train/samples_left_out": float(event.samples_left_out),
        }
        self._tracker.log_metrics(event.step, counts)

    def fail(self) -> None:
        """Give the run its final status at once, for a process that is about to be ended."""
        self._tracker.finish("FAILED")

    def _note_repairs(self, event: Metrics) -> None:
        """Say that matrices were found off the manifold and put back since the last audit."""
        count = event.values.get(_REPROJECTIONS, self._reprojections)
        if count > self._reprojections:
            found = {
                "step": event.step,
                "matrices": int(count - self._reprojections),
                "residual": event.values["orthogonality/residual_max"],
            }
            self._event_log.note("Reprojected", **found)
            self._display.message(
                f" step {event.step}: {found['matrices']} matrices were off the manifold, residual "
                f"up to {found['residual']:.1e}",
                "re-projected",
                "yellow",
            )
        self._reprojections = count

    def _start(self, event: Started) -> None:
        self.step, self.begun = event.step, True
        self._in_background(self._began, "changed settings are not kept")
        if event.step:
            self._in_background(functools.partial(self._catch_up, event.step), _NOT_CERTIFIED)
        self._display.started(event)
        batch = event.micro_batch
        self._tracker.set_tags({**self._usage.started(event), "micro_batch": str(batch)})
        sizes = {
            "train/micro_batch": float(batch),
            "train/recomputed_blocks": float(event.recomputed_blocks),
        }
        self._tracker.log_metrics(event.step, sizes)

    def _recall(self, event: MetricsReplayed) -> None:
        """Record what an execution that was killed has not."""
        known = self._tracker.recorded((record.step, record.time_ms) for record in event.records)
        for record in event.records:
            if (record.step, record.time_ms) not in known:
                self._tracker.log_metrics(record.step, record.values, record.time_ms)

    def _keep(self, event: CheckpointSaved) -> None:
        self._display.message(
            f" step {event.step}: {local_path(event.checkpoint_url)}, "
            f"artifact {event.digest[:12]}, orthogonality residual <= {event.residual:.1e}; "
            f"training waited {event.stall_s:.2f} s",
            "kept",
            "green",
        )
        times = {"checkpoint/stall_s": event.stall_s, "checkpoint/write_s": event.seconds}
        self._tracker.log_metrics(event.step, times)
        self._follow(event.step, event.artifact_url, event.digest, event.checkpoint_url)
        self._in_background(self._after_saved, NOT_REMOVED)

    def wait(self) -> None:
        """Wait for the tasks in the background; no more events come."""
        self._background.shutdown(wait=True)

    def _in_background(self, task: Callable[[], object], what: str) -> None:
        """Do something that asks a store, without keeping the events waiting."""

        def run() -> None:
            with self.saying(what):
                task()

        self._background.submit(run)

    @contextlib.contextmanager
    def saying(self, what: str) -> Iterator[None]:
        """Show what the block raises, and go on."""
        try:
            yield
        except Exception as error:  # whatever a client of a store raises
            self._display.message(f": {error}", what, "red")

    def _catch_up(self, until: int) -> None:
        """Record and certify artifacts up to a step of which no event has come."""
        for name in self._run.child(layout.ARTIFACTS).ls():
            with self.saying(_NOT_CERTIFIED):
                step = layout.step_of(name)
                if step is not None and step <= until and step not in self._followed:
                    artifact = self._run.child(layout.artifact(step))
                    checkpoint = self._run.child(layout.checkpoint(step))
                    digest = read_info(artifact.open).digest
                    self._follow(step, artifact.url, digest, checkpoint.url)

    def _follow(self, step: int, artifact_url: str, digest: str, checkpoint_url: str) -> None:
        """Record an artifact and have it certified; what was done before leaves no trace."""
        with self._following:
            self._followed.add(step)
            where = {"checkpoint_url": checkpoint_url}
            self._tracker.log_checkpoint(step, artifact_url, digest, where, wait_seconds=0)
            if self._evaluations is not None:
                self._evaluations.submit(artifact_url, step)


def _message(event: GroupFailed | Skipped) -> tuple[str, str, str]:
    """Line, label and its style."""
    if isinstance(event, Skipped):
        return f" step {event.step}: a loss or gradient is not finite", "skipped", "yellow"
    left = event.restarts_left
    if left is not None and left < 0:
        return f" {event.error}; no restart is left", "died", "red"
    restarts = "any number of" if left is None else left
    return f" {event.error}; started again, {restarts} restarts left", "died", "red"
