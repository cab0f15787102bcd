"""Certified robust accuracy of a model artefact on a shard set.

    python -m jobs.evaluate_cra --artifact URL --shards URL

Writes samples.parquet, summary.json and cra.png to the output URL and records the result in
MLflow. The trainer calls `evaluate` by name, in a thread, while training runs on the same Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import tyro
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_shards.errors import ShardError
from data_shards.index import ShardIndex, load_index
from data_shards.store import Store
from jobs.cluster import map_inline, map_shards
from jobs.config import EvaluationConfig
from jobs.figure import cra_png
from jobs.records import (
    EvaluationError,
    EvaluationSummary,
    merge,
    samples_parquet,
    scores,
)
from jobs.shard_task import (
    ArtifactTask,
    BoundTask,
    ShardTask,
    load,
    run_task,
    shard_tasks,
)
from model.artifact import ArtifactInfo, read_info
from model.errors import ModelError
from pipeline.tracking import EvaluationRecord, RunReference, log_evaluation, ui_command

logger = logging.getLogger(__name__)

COLUMN = "cra_nominal"
SAMPLES, SUMMARY, FIGURE = "samples.parquet", "summary.json", "cra.png"
OnProgress = Callable[[int, int], object]


def evaluate(
    config: EvaluationConfig | Mapping[str, Any],
    *,
    train_run_id: str | None = None,
    step: int | None = None,
    model_id: str | None = None,
    log: Callable[[EvaluationRecord], object] | None = None,
    on_progress: OnProgress | None = None,
) -> EvaluationSummary:
    """Evaluate an artefact, write the result and record it.

    The result does not depend on the launcher or on the number of tasks. A result of the same
    artefact, shards and config that already lies at the output URL is used as it is. Failing to
    record is logged and raises nothing: evaluating again then only records.

    Args:
        config: the config, or its fields as plain values.
        train_run_id: MLflow run of the training; default: what the artefact's context says.
        step: training step of the artefact; default: what its context says, else 0.
        model_id: LoggedModel of the artefact; default: found by digest.
        log: receives the record, e.g. `Tracker.log_evaluation`; default: `config.tracking`.
        on_progress: called with (tasks done, tasks) in this thread.

    Raises:
        EvaluationError: artefact and shard set do not fit each other, or records are missing.
        ModelError: the artefact is damaged.
        ShardError: the shard set is damaged.
        FileNotFoundError: the artefact or the shard set is not there.
    """
    if not isinstance(config, EvaluationConfig):
        config = TypeAdapter(EvaluationConfig).validate_python(dict(config))
    summary = compute(config, step=step, on_progress=on_progress)
    if config.record or log:
        try:
            record(config, summary, train_run_id=train_run_id, model_id=model_id, log=log)
        except Exception as error:
            logger.warning("%s is evaluated but not recorded: %s", config.artifact, error)
    return summary


def compute(
    config: EvaluationConfig, *, step: int | None = None, on_progress: OnProgress | None = None
) -> EvaluationSummary:
    """Evaluate an artefact and write the result; see `evaluate`."""
    info = _artifact_info(config.artifact)
    index = _fitting_index(config, info)
    out = _out(config)
    key = _eval_key(config, info, index)
    if out.exists(SUMMARY):
        present = EvaluationSummary.from_json(out.read(SUMMARY))
        if present.eval_key == key:
            return present
    artifact = ArtifactTask(
        url=Store(config.artifact).url, digest=info.digest, device=_device(config)
    )
    tasks = shard_tasks(artifact, index, config.split, config.batch_size)
    *parts, bound = _run([*tasks, BoundTask(artifact=artifact)], config, on_progress)
    expected = {task.shard.file: task.keys for task in tasks}
    records = merge(parts, expected)
    summary = EvaluationSummary(
        column=COLUMN,
        norm=info.norm,
        eval_key=key,
        artifact_url=str(Store(config.artifact)),
        artifact_digest=info.digest,
        shards_url=str(index.store),
        dataset=f"{index.header.name}-{config.split}",
        index_digest=index.digest,
        split=config.split,
        out_url=str(out),
        step=int(info.context.get("step") or 0) if step is None else step,
        orthogonality_residual=info.largest_residual,
        lipschitz_upper_bound=bound,
        **scores(records, config.eps, index.num_classes),
    )
    out.write(SAMPLES, samples_parquet(records))
    out.write(FIGURE, cra_png(summary))
    out.write(SUMMARY, summary.to_json())  # last: it says that the others are complete
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
    context = _artifact_info(config.artifact).context
    out = _out(config)
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
            "lipschitz_upper_bound": summary.lipschitz_upper_bound,
        },
        artifacts={name: out.read(name) for name in (FIGURE, SUMMARY)},
        step=summary.step,
        train_run_id=train_run_id or context.get("train_run_id"),
        model_id=model_id,
    )
    if log is None:
        return log_evaluation(config.tracking, row)
    log(row)
    return None


def _artifact_info(url: str) -> ArtifactInfo:
    store = Store(url)
    try:
        return read_info(store.open)
    except FileNotFoundError as error:
        raise EvaluationError(f"no artefact at {store}: there is no artifact.json") from error


def _fitting_index(config: EvaluationConfig, info: ArtifactInfo) -> ShardIndex:
    url = config.shards or info.context.get("shards_url")
    if not url:
        raise EvaluationError(
            f"artefact {config.artifact} does not say which shard set it belongs to: give --shards"
        )
    index = load_index(url)
    index.require(info.native_input_shape, info.network.num_classes)
    return index


def _out(config: EvaluationConfig) -> Store:
    if config.out:
        return Store(config.out)
    return Store(config.artifact).child("evaluation", config.split)


def _eval_key(config: EvaluationConfig, info: ArtifactInfo, index: ShardIndex) -> str:
    """Identify the result: everything that may change a number, and nothing else."""
    parts = {
        "column": COLUMN,
        "artifact": info.digest,
        "index": index.digest,
        "split": config.split,
        "eps": config.eps,
        "batch_size": config.batch_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _device(config: EvaluationConfig) -> str:
    """A Ray task gets the GPUs it asked for; this process may use what it sees."""
    if config.device != "auto":
        return config.device
    has_gpu = config.num_gpus > 0 if config.launcher == "ray" else torch.cuda.is_available()
    return "cuda" if has_gpu else "cpu"


def _run(
    tasks: list[ShardTask | BoundTask], config: EvaluationConfig, on_progress: OnProgress | None
) -> list[Any]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, len(tasks))

    if config.launcher == "ray":
        return map_shards(
            run_task,
            tasks,
            max_in_flight=config.max_in_flight,
            max_retries=config.max_retries,
            num_gpus=config.num_gpus,
            on_done=advance,
        )
    try:
        return map_inline(run_task, tasks, on_done=advance)
    finally:
        load.cache_clear()


def _report(console: Console, config: EvaluationConfig, summary: EvaluationSummary) -> None:
    table = Table(title=f"{summary.column}, {summary.samples} samples of {summary.dataset}")
    table.add_column(f"eps ({summary.norm})")
    table.add_column("certified robust accuracy", justify="right")
    for name, value in {"clean": summary.clean, **summary.cra}.items():
        table.add_row(name, f"{100 * value:.2f} %")
    console.print(table)
    console.print(
        f"mean certified radius {summary.mean_radius:.4f}\n"
        f"artefact {summary.artifact_digest[:12]}, step {summary.step}: largest orthogonality "
        f"residual {summary.orthogonality_residual:.1e}, proved Lipschitz upper bound "
        f"{summary.lipschitz_upper_bound:.8f}"
    )
    console.print(f"figure: {summary.out_url}/{FIGURE}", soft_wrap=True)
    if config.record:
        run = record(config, summary)
        if run is not None:
            command, path = ui_command(config.tracking.uri, run)
            console.print(f"MLflow: {command}\n  then open {path}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns 0, 2 for bad input or 1 for a failure."""
    console = Console(highlight=False, markup=False)
    errors = Console(stderr=True, highlight=False, markup=False)
    try:
        config = tyro.cli(EvaluationConfig, args=arguments, prog="jobs.evaluate_cra")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=errors, transient=True) as progress:
            bar = progress.add_task("shards", total=None)
            summary = compute(
                config,
                on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        _report(console, config, summary)
    except (EvaluationError, ShardError, ModelError, FileNotFoundError) as error:
        errors.print(f"error: {error}", soft_wrap=True)
        return 2
    except Exception as error:
        errors.print(f"failed: {type(error).__name__}: {error}", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
