"""Certified robust accuracy of a model artifact on a shard set.

    python -m jobs.evaluate_cra --artifact URL --data.shards URL [--attack fast]

Writes a certificate that `python -m model.verify` re-derives, its samples, a summary and figures to
the output URL, and records the result in MLflow. The driver of a training calls `evaluate` by
name, in a thread, while training runs on the same Ray.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console

from data_shards.command_line.parsing import parse_words
from data_shards.command_line.progress import ProgressBar
from data_shards.errors import ShardError
from jobs.command_line import exit_status
from jobs.errors import EvaluationError
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.figures import draw_missing
from jobs.evaluation.progress import OnProgress
from jobs.evaluation.runner import (
    artifact_info,
    compute,
    output,
)
from jobs.evaluation.suites import NO_ATTACK
from jobs.evaluation.tracking_uri import record_store
from model.errors import ModelError
from pipeline.run.evaluation_summary import EvaluationSummary, report
from pipeline.run.layout import (
    BOUNDS_FIGURE,
    CERTIFICATE,
    CLOSEST_FIGURE,
    CRA_FIGURE,
    RADIUS_FIGURE,
    SUMMARY,
)
from pipeline.run.malloc import keep_freed_memory
from pipeline.run.server_exposure import ExposureError
from pipeline.tracking.client import EvaluationRecord, RunReference, log_evaluation, ui_command

logger = logging.getLogger(__name__)


def evaluate(
    config: EvaluationConfig | Mapping[str, Any],
    *,
    train_run_id: str | None = None,
    step: int | None = None,
    model_id: str | None = None,
    log: Callable[[EvaluationRecord], object] | None = None,
    on_progress: OnProgress | None = None,
) -> EvaluationSummary:
    """Evaluate an artifact, write the result and record it.

    The result does not depend on the launcher or on the number of tasks. A result of the same
    artifact, shards, config, certifier and kind of device that already lies at the output URL is
    used again, as its certificate and its samples say. Failing to record is logged and raises
    nothing: evaluating again then only records.

    Args:
        config: the config, or its fields as plain values.
        train_run_id: MLflow run of the training; default: what the artifact's context says.
        step: training step of the artifact; default: what its context says, else 0.
        model_id: LoggedModel of the artifact; default: found by digest.
        log: receives the record, e.g. `Tracker.log_evaluation`; default: the store that
            `record_store` says.
        on_progress: called in this thread whenever a task has ended.

    Raises:
        EvaluationError: artifact and shard set do not fit each other, or records are missing.
        ModelError: the artifact is damaged.
        ShardError: the shard set is damaged.
        FileNotFoundError: the artifact or the shard set is not there.
    """
    if not isinstance(config, EvaluationConfig):
        config = TypeAdapter(EvaluationConfig).validate_python(dict(config))
    summary = compute(config, step=step, on_progress=on_progress)
    draw_missing(output(config), summary)
    if config.record or log:
        try:
            if log is None:
                store = record_store(config, artifact_info(config.artifact), summary)
                config = replace(config, tracking=store)
            record(config, summary, train_run_id=train_run_id, model_id=model_id, log=log)
        except Exception as error:
            logger.warning("%s is evaluated but not recorded: %s", config.artifact, error)
    return summary


def record(
    config: EvaluationConfig,
    summary: EvaluationSummary,
    *,
    train_run_id: str | None = None,
    model_id: str | None = None,
    log: Callable[[EvaluationRecord], object] | None = None,
) -> RunReference | None:
    """Hand the result to `log`, or record it in `config.tracking` and return the run."""
    info = artifact_info(config.artifact)
    out = output(config)
    files = [CRA_FIGURE, RADIUS_FIGURE, CLOSEST_FIGURE, CERTIFICATE, SUMMARY]
    files += [BOUNDS_FIGURE] * bool(summary.layers)
    row = EvaluationRecord(
        eval_key=summary.eval_key,
        artifact_url=summary.artifact_url,
        artifact_digest=summary.artifact_digest,
        dataset_name=summary.dataset,
        dataset_digest=summary.index_digest,
        dataset_url=summary.shards_url,
        metrics=summary.metrics(),
        params={
            "step": summary.step,
            "samples": summary.samples,
            "split": summary.split,
            "batch_size": config.batch_size,
            "orthogonality_residual": summary.orthogonality_residual,
            "lipschitz_upper_bound": summary.network_bound,
            "certificate_digest": summary.certificate_digest,
            "attack": config.attack,
            "deployed": config.deployed,
        },
        artifacts={name: out.read(name) for name in files},
        step=summary.step,
        train_run_id=train_run_id or info.context.get("train_run_id"),
        model_id=model_id,
        tags={
            "dataset": summary.dataset,
            "norm": summary.norm,
            "network": info.network.kind,
            "attack": config.attack,
        },
    )
    if log is None:
        return log_evaluation(config.tracking, row)
    log(row)
    return None


def main(
    arguments: list[str] | None = None, *, before_record: Callable[[], object] | None = None
) -> int:
    """Run the job; returns 0, 2 for bad input or 1 for a failure.

    Args:
        arguments: the command line.
        before_record: called when the result is written and before MLflow hears of it.
    """

    def act(console: Console, errors: Console) -> int:
        config = parse_words(EvaluationConfig, arguments, prog="python -m jobs.evaluate_cra")
        keep_freed_memory()
        label = "certifying" if config.attack == NO_ATTACK else "certifying, attacking"
        with _following(errors, label) as on_progress:
            summary = compute(config, on_progress=on_progress)
        report(console, [summary])  # the numbers are there before the pictures
        draw_missing(output(config), summary)
        if before_record:
            before_record()
        if not config.record:
            return 0
        store = record_store(config, artifact_info(config.artifact), summary)
        run = record(replace(config, tracking=store), summary)
        if run is not None:
            command, address = ui_command(store.uri, run)
            console.print(f"MLflow: {command}\n  then open {address}", soft_wrap=True)
        return 0

    package = (EvaluationError, ShardError, ModelError, ExposureError)
    return exit_status(act, (*package, FileNotFoundError, ConnectionError))


@contextlib.contextmanager
def _following(console: Console, label: str) -> Iterator[OnProgress]:
    """Show the tasks that have ended, their scores so far and the time that is left."""
    with ProgressBar(label, 0, unit="tasks", console=console) as bar:
        yield lambda progress: bar.reach(progress.done, progress.total, progress.scores)


if __name__ == "__main__":
    sys.exit(main())
