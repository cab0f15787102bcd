"""Entry: `python -m jobs.compare --presets digits digits-sll --seeds 0 1 2 --trials 5`.

Trains the presets under an equal budget and writes one table and one figure per norm to a folder
and to MLflow. Exit codes: 0 done, 1 a run failed, 2 refused.
"""

from __future__ import annotations

import datetime
import logging
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from data_shards.command_line.parsing import parse_words
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from jobs.child_processes import exit_on_sigterm
from jobs.command_line import exit_status
from jobs.comparison.config import CompareConfig
from jobs.comparison.figures import comparison_png
from jobs.comparison.runs import FINAL, SHARDS, TRIAL, RunRequest, Runs
from jobs.comparison.table import (
    System,
    by_norm,
    markdown,
)
from jobs.comparison.trials import Search, preset_config
from jobs.errors import EvaluationError
from model.networks.registry import parameter_count
from pipeline.config import RunConfig
from pipeline.tracking.client import log_comparison, ui_command

TABLE = "compare.md"
_TUNING = {"data.train-split": "fit", "data.test-split": "validation"}
_FINAL = {"data.train-split": "train", "data.test-split": "test"}
"""Settings were chosen before, and a final run has one checkpoint: nothing is left to choose."""


def compare(config: CompareConfig) -> list[System]:
    """Run everything that is not there yet.

    Raises:
        EvaluationError: no such preset or radius, or a network is larger than the budget allows.
        TrainingRunError: a run failed or missed the budget.
    """
    presets = {name: preset_config(name) for name in config.presets}
    _require_size(config, presets)
    _require_radii(config, presets)
    runs = Runs(config)
    samples = _samples(config, runs)
    changes, scores = _tune(config, runs, presets, samples)
    finals = [
        RunRequest(
            preset,
            FINAL,
            {
                **_FINAL,
                **_length(config, presets[preset], config.amount, samples("train")),
                **changes[preset],
                "train.seed": seed,
            },
        )
        for preset in presets
        for seed in config.seeds
    ]
    outcomes = list(runs.run(finals))
    each = len(config.seeds)
    return [
        System(preset, changes[preset], tuple(scores[preset]), tuple(outcomes[i : i + each]))
        for preset, i in zip(presets, range(0, len(outcomes), each), strict=True)
    ]


def _require_size(config: CompareConfig, presets: Mapping[str, RunConfig]) -> None:
    if config.budget != "parameters":
        return
    for name, preset in presets.items():
        size = parameter_count(preset.model)
        if size > config.amount:
            raise EvaluationError(
                f"{name} has {size:,} parameters, the budget allows {config.amount:,.0f}"
            )


def _require_radii(config: CompareConfig, presets: Mapping[str, RunConfig]) -> None:
    for name, preset in presets.items():
        known = preset.checkpoint.evaluate_eps
        for radius in config.judge_by:
            if radius not in known:
                raise EvaluationError(
                    f"--judge-by {radius}: {name} is certified at {', '.join(known)}"
                )


def _samples(config: CompareConfig, runs: Runs) -> Callable[[str], int]:
    """Samples of a split of the shard set, which the first run makes where none is given."""
    url = config.shards
    if not url:
        # Several runs at once would each write it.
        first = RunRequest(config.presets[0], SHARDS, {"train.stop-after": 1}, certify=False)
        [made] = runs.run([first])
        url = made.shards_url
    index = load_index(url)
    return lambda split: len(index.select(split))


def _length(
    config: CompareConfig, preset: RunConfig, amount: float, samples: int
) -> dict[str, Any]:
    """Overrides that make a run as long as the budget, with the preset's share of warm-up."""
    if config.budget == "time":
        return {"train.processor-seconds": amount}
    if config.budget == "parameters":
        return {}
    # Half a step less: the number of steps is rounded up.
    epochs = (max(1, round(amount)) - 0.5) * preset.train.global_batch / samples
    share = preset.train.warmup_epochs / preset.train.epochs
    return {"train.epochs": epochs, "train.warmup-epochs": share * epochs}


def _tune(
    config: CompareConfig,
    runs: Runs,
    presets: Mapping[str, RunConfig],
    samples: Callable[[str], int],
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Values that were best on validation, and the scores of all trials, by preset."""
    scores: dict[str, list[float]] = {name: [] for name in presets}
    if not config.trials:
        return {name: {} for name in presets}, scores
    most = config.amount if config.budget == "parameters" else None
    searches = {name: Search(preset, most) for name, preset in presets.items()}
    amount = config.trial_amount or config.amount
    for _ in range(config.trials):
        asked = {name: search.ask() for name, search in searches.items()}
        orders = [
            RunRequest(
                name,
                TRIAL,
                {**_TUNING, **_length(config, presets[name], amount, samples("fit")), **values},
            )
            for name, (_, values) in asked.items()
        ]
        for (name, (number, _)), outcome in zip(asked.items(), runs.run(orders), strict=True):
            # A network whose step is too long for the budget would be judged after another one.
            cra = outcome.summary.columns["sound"].cra
            judged = [cra[radius] for radius in config.judge_by or cra]
            score = statistics.fmean(judged) if outcome.held else math.nan
            scores[name].append(score)
            searches[name].tell(number, score)
    return {name: search.best for name, search in searches.items()}, scores


def write(config: CompareConfig, systems: Sequence[System]) -> str:
    """Write table and figures to the folder and record them in MLflow; returns the page."""
    out = Path(config.out)
    context = [run.info.context for system in systems for run in system.finals]
    versions = {facts.get("code", {}).get("commit", "unknown") for facts in context}
    now = datetime.datetime.now(datetime.timezone.utc)
    page = markdown(config, systems, date=f"{now:%Y-%m-%d}", code=", ".join(sorted(versions)))
    files = {TABLE: page.encode()}
    for norm, group in by_norm(systems).items():
        files[f"compare-{norm}.png"] = comparison_png(group)
    for name, data in files.items():
        (out / name).write_bytes(data)
    metrics = {name: value for system in systems for name, value in system.metrics().items()}
    run = log_comparison(
        config.store(),
        name=f"compare-{now:%Y%m%d-%H%M%S}",
        params={
            "budget": config.budget,
            "amount": config.amount,
            "trial_amount": config.trial_amount or config.amount,
            "seeds": config.seeds,
            "trials": config.trials,
            "judge_by": config.judge_by,
            "presets": config.presets,
        },
        metrics=metrics,
        artifacts=files,
    )
    command, address = ui_command(config.store().uri, run)
    return f"{page}\nFiles: `{out}`. In MLflow: `{command}`, then `{address}`\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the entry; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    exit_on_sigterm()
    config = parse_words(CompareConfig, arguments, prog="python -m jobs.compare")

    def act(console: Console, errors: Console) -> int:
        console.print(write(config, compare(config)), soft_wrap=True)
        return 0

    try:
        return exit_status(act, (EvaluationError, ShardError))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
