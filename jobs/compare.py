"""Entry: `python -m jobs.compare --presets digits digits-sll --seeds 0 1 2 --trials 5`.

Trains the presets under an equal budget and writes one table and one figure per norm to a folder
and to MLflow. Exit codes: 0 done, 1 a run failed, 2 refused.
"""

from __future__ import annotations

import datetime
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_shards.command_line.parsing import parse_words
from data_shards.untrusted.terminal import PlainConsole
from jobs.evaluation.sample_records import EvaluationError
from jobs.reporting.comparison_config import CompareConfig, parse_change
from jobs.reporting.comparison_report import System, by_norm, comparison_png, markdown
from jobs.reporting.comparison_runs import Outcome, RunRequest, Runs
from pipeline.tracking.client import log_comparison, ui_command

TABLE = "compare.md"
_TUNING = {"data.train-split": "fit", "data.test-split": "validation"}
_FINAL = {"data.train-split": "train", "data.test-split": "test"}
"""Settings were chosen before, and a final run has one checkpoint: nothing is left to choose."""


def compare(config: CompareConfig) -> list[System]:
    """Run everything that is not there yet.

    Raises:
        EvaluationError: a run failed, or a network is larger than the budget allows.
    """
    runs = Runs(config)
    if not config.shards:
        # The first run makes the shard set; several at once would each write it.
        _ = list(
            runs.run([RunRequest(config.presets[0], "shards", {"train.stop-after": 1}, False)])
        )
    short = {"train.stop-after": config.probe_steps, "train.log-every": 1}
    orders = [RunRequest(preset, "probe", short, certify=False) for preset in config.presets]
    probes = list(runs.run(orders))
    _require_size(config, probes)
    steps = [_steps(config, probe) for probe in probes]
    changes, scores = _tune(config, runs, probes, steps)
    finals = [
        RunRequest(
            probe.order.preset,
            "final",
            {**_FINAL, **_length(probe, count, "train"), **values, "train.seed": seed},
        )
        for probe, count, values in zip(probes, steps, changes, strict=True)
        for seed in config.seeds
    ]
    outcomes = list(runs.run(finals))
    each = len(config.seeds)
    return [
        System(preset, changes[i], tuple(scores[i]), tuple(outcomes[i * each : (i + 1) * each]))
        for i, preset in enumerate(config.presets)
    ]


def _require_size(config: CompareConfig, probes: Sequence[Outcome]) -> None:
    if config.budget != "parameters":
        return
    for probe in probes:
        if probe.parameters > config.amount:
            raise EvaluationError(
                f"{probe.order.preset} has {probe.parameters:,} parameters, the budget allows "
                f"{config.amount:,.0f}"
            )


def _steps(config: CompareConfig, probe: Outcome) -> int | None:
    """Optimizer steps of the budget; None leaves the epochs of the preset."""
    if config.budget == "parameters":
        return None
    if config.budget == "steps":
        return max(1, round(config.amount))
    return max(1, round(config.amount / probe.seconds_per_step()))


def _length(probe: Outcome, steps: int | None, split: str) -> dict[str, Any]:
    """Overrides that make a run on a split this long, with the preset's share of warm-up."""
    if steps is None:
        return {}
    # Half a step less: the number of steps is rounded up.
    epochs = (steps - 0.5) * probe.setting("train.global_batch") / probe.samples(split)
    share = probe.setting("train.warmup_epochs") / probe.setting("train.epochs")
    return {"train.epochs": epochs, "train.warmup-epochs": share * epochs}


def _tune(
    config: CompareConfig, runs: Runs, probes: Sequence[Outcome], steps: Sequence[int | None]
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Values that were best on validation, and the scores of all trials, by preset."""
    best: list[dict[str, Any]] = [{} for _ in probes]
    scores: list[list[float]] = [[] for _ in probes]
    for trial in range(config.trials):
        tried = [
            _changed(probe, values, config.changes[trial - 1] if trial else None)
            for probe, values in zip(probes, best, strict=True)
        ]
        orders = [
            RunRequest(
                probe.order.preset,
                "trial",
                {**_TUNING, **_length(probe, count, "fit"), **values},
            )
            for probe, count, values in zip(probes, steps, tried, strict=True)
        ]
        for i, outcome in enumerate(runs.run(orders)):
            cra = outcome.summary.columns["sound"].cra
            scores[i].append(statistics.fmean(cra.values()))
            if scores[i][-1] >= max(scores[i]):
                best[i] = tried[i]
    return best, scores


def _changed(probe: Outcome, values: dict[str, Any], change: str | None) -> dict[str, Any]:
    """The values with one setting multiplied.

    Raises:
        EvaluationError: the preset has no such number.
    """
    if change is None:
        return values
    name, factor = parse_change(change)
    now = values.get(name, probe.setting(name))
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise EvaluationError(f"change {change}: {probe.order.preset} has no number {name}")
    return {**values, name: now * factor}


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
            "seeds": config.seeds,
            "trials": config.trials,
            "presets": config.presets,
        },
        metrics=metrics,
        artifacts=files,
    )
    command, path = ui_command(config.store().uri, run)
    return f"{page}\nFiles: `{out}`. In MLflow: `{command}`, then `{path}`\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the entry; returns the exit code."""
    console = PlainConsole()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        config = parse_words(CompareConfig, arguments, prog="python -m jobs.compare")
        page = write(config, compare(config))
    except ValidationError as error:
        messages = "; ".join(part["msg"] for part in error.errors())
        PlainConsole(stderr=True).print(f"refused: {messages}", soft_wrap=True)
        return 2
    except EvaluationError as error:
        PlainConsole(stderr=True).print(str(error), soft_wrap=True)
        return 1
    console.print(page, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
