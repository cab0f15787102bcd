"""A run as the driver holds it open: tracker, monitor, evaluations, and the results at its end."""

import contextlib
import functools
import shlex
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from data_shards.command_line.parsing import as_typed
from data_shards.command_line.settings import settings
from model.networks.registry import FAMILIES
from pipeline.checkpoint.retention import retain
from pipeline.config import RunConfig
from pipeline.driver.console import RunConsole
from pipeline.driver.evaluations import Evaluations, Splits
from pipeline.driver.event_log import EventLog
from pipeline.driver.goodput import UsageMetrics
from pipeline.driver.monitor import NOT_REMOVED, RunMonitor
from pipeline.driver.preflight import PreparedRun
from pipeline.driver.system_metrics import SystemMetrics
from pipeline.errors import failing
from pipeline.planner.meta_pass import training_flops
from pipeline.run import layout
from pipeline.run.evaluation_summary import EvaluationSummary, local_path, report
from pipeline.run.ray_job import submission_tags
from pipeline.tracking.client import ui_command
from pipeline.tracking.spool import Tracker

_CLOSE_S = 60.0
"""How long the end of a run waits for the tracking server."""


@contextlib.contextmanager
def run_session(prepared: PreparedRun, console: Console) -> Iterator[RunMonitor]:
    """Open the record of a run; at the end wait for its evaluations and show the results.

    The run ends as FINISHED, KILLED (interrupt, SIGTERM) or FAILED.

    Raises:
        RunFailedError: what would refuse a run that has not begun.
    """
    config = prepared.job.config
    tracker = Tracker(
        prepared.tracking,
        prepared.spool,
        run_name=config.name,
        run_key=prepared.run_key,
        params=prepared.params(),
        tags={**_tags(prepared), **submission_tags()},
    )
    evaluations = _evaluations(prepared, tracker) if config.checkpoint.certifies else None
    display = RunConsole(console)
    usage = UsageMetrics(
        config.cluster, config.train.precision, training_flops(config), tracker.last_value
    )
    event_log = EventLog(prepared.spool.parent, prepared.run)
    remove_surplus = functools.partial(_remove_surplus, prepared, evaluations)
    monitor = RunMonitor(
        display,
        tracker,
        evaluations,
        remove_surplus,
        usage,
        event_log,
        prepared.run,
        prepared.accept,
    )
    system = SystemMetrics(
        # With the time, so that a run which then hangs and is killed has lost it.
        lambda values: tracker.log_metrics(monitor.step, {**values, **usage.time()})
    )
    status = "FAILED"
    if evaluations is not None and config.data.selection_split is None:
        display.message(
            f"trains on all training images; the last checkpoint is certified once, on "
            f"{config.data.test_split} (--data.train-split fit holds some out, and chooses the "
            "best checkpoint by them)"
        )
    for notice in prepared.notices:
        display.message(as_typed(notice, settings(RunConfig, config)))
    if prepared.changed:
        display.message("changed: " + "; ".join(f"{k}: {v}" for k, v in prepared.changed.items()))
        event_log.note("Changed", settings=prepared.changed)
    try:
        with failing(lambda: monitor.begun):
            yield monitor
            monitor.wait()
            usage.stop()
            display.close()
            summaries = _results(evaluations, console)
            status = "FINISHED"
            _show(summaries, prepared, tracker, display)
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        display.close()
        system.close()
        tracker.finish(status)  # first: what follows may outlast the time that a stop leaves
        monitor.wait()
        if evaluations is not None:
            evaluations.cancel()
        with monitor.saying(NOT_REMOVED):
            remove_surplus()
        with contextlib.suppress(OSError):  # the file is complete on this machine
            event_log.publish()
        tracker.close(_CLOSE_S)


def _tags(prepared: PreparedRun) -> dict[str, str]:
    """What runs are filtered by."""
    config = prepared.job.config
    return {
        "preset": config.preset,
        "run_url": prepared.job.run_url,
        "dataset": prepared.samples.name,
        "network": config.model.kind,
        "norm": FAMILIES[config.model.kind].network.norm,
        "precision": config.train.precision,
        "code": prepared.job.context["code"]["commit"],
    }


def _remove_surplus(prepared: PreparedRun, evaluations: Evaluations | None) -> None:
    """Remove surplus checkpoints."""
    policy = prepared.job.config.checkpoint
    unfinished: set[int] = set()
    scores: dict[int, float] = {}
    if evaluations is not None:
        unfinished = evaluations.unfinished()  # before the scores: what ends in between has one
        for summary in evaluations.finished():
            scores[summary.step] = summary.columns["sound"].cra[policy.evaluate_eps[0]]
    retain(prepared.run, policy, scores, unfinished)


def _evaluations(prepared: PreparedRun, tracker: Tracker) -> Evaluations:
    config = prepared.job.config
    settings: dict[str, Any] = {
        "shards": prepared.job.shards_url,
        "eps": config.checkpoint.evaluate_eps,
        "launcher": config.cluster.launcher,
        "max_in_flight": config.checkpoint.evaluate_tasks,
        "num_gpus": config.checkpoint.evaluate_gpus,
        "placement": config.checkpoint.evaluate_placement,
        "record": False,
    }
    beside = config.cluster.launcher == "ray"
    best_at = config.checkpoint.evaluate_eps[0] if config.checkpoint.keep_best else None
    splits = Splits(config.data.selection_split, config.data.test_split, best_at)
    return Evaluations(settings, tracker.log_evaluation, splits=splits, beside_training=beside)


def _results(evaluations: Evaluations | None, console: Console) -> list[EvaluationSummary]:
    if evaluations is None:
        return []
    with console.status(f"certifying: {evaluations.waiting} evaluations to go"):
        return evaluations.results()


def _resume_command(config: RunConfig) -> str:
    """The command line that goes on with a run."""
    words = ["python", "-m", "pipeline.pretrain", "--resume", "--name", config.name]
    return shlex.join([*words, *(["--storage", config.storage] if config.storage else [])])


def _show(
    summaries: list[EvaluationSummary],
    prepared: PreparedRun,
    tracker: Tracker,
    display: RunConsole,
) -> None:
    """The final table, where everything lies, and how to open the MLflow UI."""
    if summaries:
        report(display.console, summaries)
    config = prepared.job.config
    stopped, end = prepared.schedule.last_step, prepared.schedule.total_steps
    if stopped < end and config.continuable:
        display.message(
            f"stopped after step {stopped} of {end}, as --train.stop-after says; to go on:\n"
            f"             {_resume_command(config)}"
        )
    if config.checkpoint.none:
        display.message("artifacts:   none, as --checkpoint.none says: nothing can be evaluated")
    else:
        artifacts = f"{local_path(prepared.job.run_url)}/{layout.ARTIFACTS}"
        display.message(f"artifacts:   {artifacts}")
    if tracker.run is not None:
        command, address = ui_command(prepared.tracking.uri, tracker.run)
        display.message(f"MLflow UI:   {command}\n             then open {address}")
