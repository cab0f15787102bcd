"""The table of a comparison and its paired tests."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from data_shards.untrusted.text import code as code_span
from data_shards.untrusted.text import markdown as markdown_text
from jobs.comparison.config import CompareConfig
from jobs.comparison.runs import Outcome
from jobs.errors import EvaluationError
from model.certification.eps import eps_value
from pipeline.run.wilson_interval import wilson

_NOT_IN_METRICS = re.compile(r"[^\w.:-]+")
"""What MLflow refuses in the name of a metric; a slash stands between its parts."""


@dataclass(frozen=True)
class System:
    """One preset with its final runs.

    Attributes:
        preset: name of the preset, and more words of its command line.
        changes: values that the trials settled on, by setting.
        trials: mean certified accuracy on validation of every trial, in order; NaN where one did
            not hold its budget.
        finals: one run per seed.
    """

    preset: str
    changes: Mapping[str, Any]
    trials: tuple[float, ...]
    finals: tuple[Outcome, ...]

    @property
    def norm(self) -> str:
        """Norm of its certificate."""
        return self.finals[0].summary.norm

    @property
    def eps(self) -> tuple[str, ...]:
        """Radii of its table."""
        return tuple(self.finals[0].summary.columns["sound"].cra)

    def clean(self) -> list[float]:
        """Clean accuracy of every seed."""
        return [run.summary.columns["sound"].clean for run in self.finals]

    def cra(self, ratio: str) -> list[float]:
        """Certified robust accuracy of every seed, column `sound`."""
        return [run.summary.columns["sound"].cra[ratio] for run in self.finals]

    def certified_share(self, ratio: str) -> np.ndarray:
        """Share of the seeds that certify each sample at a radius, shape (samples,)."""
        eps = eps_value(ratio)
        return np.mean([run.result.radius > eps for run in self.finals], axis=0)

    def average(self) -> float:
        """Mean certified accuracy over the table's radii and the seeds: the order of the table."""
        return statistics.fmean(value for ratio in self.eps for value in self.cra(ratio))

    def metrics(self) -> dict[str, float]:
        """Scalars by name, such as `digits-sll/cra_sound/l2/36_255`."""
        found = {"clean": statistics.fmean(self.clean())}
        for ratio in self.eps:
            name = f"cra_sound/{self.norm}/{ratio.replace('/', '_')}"
            found[name] = statistics.fmean(self.cra(ratio))
        found["processor_seconds"] = statistics.fmean(run.seconds for run in self.finals)
        found["parameters"] = float(self.finals[0].parameters)
        system = _NOT_IN_METRICS.sub(" ", self.preset).strip()
        return {f"{system}/{name}": value for name, value in found.items()}


def by_norm(systems: Sequence[System]) -> dict[str, list[System]]:
    """Systems of each norm, best average first."""
    groups: dict[str, list[System]] = {}
    for system in sorted(systems, key=System.average, reverse=True):
        groups.setdefault(system.norm, []).append(system)
    return groups


def markdown(config: CompareConfig, systems: Sequence[System], *, date: str, code: str) -> str:
    """The comparison as a Markdown page, one table per norm."""
    first = systems[0].finals[0].summary
    lines = [
        f"# Comparison on {markdown_text(first.dataset)}, {date}",
        "",
        f"Code {markdown_text(code)}. Budget: {_budget(config)}. "
        f"Seeds {', '.join(map(str, config.seeds))}; "
        f"{config.workers} ranks of {config.threads} threads, {config.parallel} runs at a time. "
        f"Column `sound` on {first.samples} samples of split {code_span(first.split)}: mean ± "
        "sample standard deviation over the seeds, in per cent, ordered by the mean over the "
        f"radii; in brackets the 95 % Wilson interval of the mean as a share of {first.samples} "
        "samples. "
        "Seconds are processor seconds of the training loop, without start-up and certification.",
    ]
    if config.trials:
        lines += [
            "",
            f"Each system had {config.trials} trials of {_amount(config, config.trial_amount)} on "
            "`fit`, judged by the mean certified accuracy on `validation`"
            + (f" at {', '.join(config.judge_by)}" if config.judge_by else "")
            + ": the preset, then what Optuna drew of learning rate, temperature, two sizes and, "
            "where there is one, the pool."
            + "".join(
                f" {count} of {code_span(system.preset)} had steps too long and count as none."
                for system in systems
                if (count := sum(map(math.isnan, system.trials)))
            ),
        ]
    for norm, group in by_norm(systems).items():
        lines += ["", f"## {norm}", "", *_table(group), *_differences(group)]
        lines += ["", f"![{norm}](compare-{norm}.png)"]
    return "\n".join(lines) + "\n"


def _budget(config: CompareConfig) -> str:
    if config.budget == "parameters":
        return f"at most {config.amount:,.0f} parameters each, epochs of the preset"
    return f"{_amount(config, config.amount)} each"


def _amount(config: CompareConfig, amount: float) -> str:
    if config.budget == "parameters":
        return "the preset's epochs"
    unit = "processor seconds of training" if config.budget == "time" else "optimizer steps"
    return f"{amount or config.amount:,.0f} {unit}"


def _differences(group: Sequence[System]) -> list[str]:
    """The first of the table against every other one, on the same samples."""
    if len(group) < 2:
        return []
    first, *others = group
    titles = [f"{code_span(first.preset)} less", *first.eps]
    lines = [
        "",
        "Differences in points; in brackets the p of a paired, exact sign test over the samples: "
        "each counts for the system that certifies it in more of the seeds.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    for other in others:
        cells = [
            f"{100 * difference:+.1f} (p = {p:.2g})"
            for difference, p in (paired(first, other, ratio) for ratio in first.eps)
        ]
        lines.append("| " + " | ".join([code_span(other.preset), *cells]) + " |")
    return lines


def paired(one: System, other: System, ratio: str) -> tuple[float, float]:
    """Certified accuracy of one system less that of another at a radius, and the p of chance.

    Of the seeds of a system, every sample has the share that certifies it. Under the hypothesis
    that the systems are alike a sample that has different shares favours either with probability
    1/2.

    Raises:
        EvaluationError: they were certified on different samples.
    """
    if one.finals[0].result.keys != other.finals[0].result.keys:
        raise EvaluationError(
            f"{one.preset} and {other.preset} were certified on different samples"
        )
    difference = one.certified_share(ratio) - other.certified_share(ratio)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return float(difference.mean()), p


def _table(group: Sequence[System]) -> list[str]:
    radii = list(dict.fromkeys(ratio for system in group for ratio in system.eps))
    titles = ["system", "clean", *radii, "parameters", "steps", "processor s", "images/s", "tuned"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for system in group:
        run = system.finals[0]
        samples = run.summary.samples
        cells = [_spread(system.cra(r), samples) if r in system.eps else "" for r in radii]
        rate = run.steps * run.setting("train.global_batch") / run.seconds
        tuned = ", ".join(f"{name} {_short(value)}" for name, value in system.changes.items())
        row = [
            code_span(system.preset),
            _spread(system.clean(), samples),
            *cells,
            f"{run.parameters:,}",
            f"{run.steps:,}",
            f"{statistics.fmean(final.seconds for final in system.finals):.0f}",
            f"{rate:,.0f}",
            tuned or "preset",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _spread(values: Sequence[float], samples: int) -> str:
    """Mean and deviation over the seeds; the interval is of the mean as a share of the samples."""
    mean = statistics.fmean(values)
    low, high = wilson(round(mean * samples), samples)
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean:.1f}{deviation} ({100 * low:.1f} to {100 * high:.1f})"
