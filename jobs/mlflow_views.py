"""The views of docs/how-to/mlflow.md, saved into an experiment: they open by a link.

    python -m jobs.mlflow_views --tracking.uri sqlite:///runs/mlflow.db --tracking.experiment digits

Columns and axes are the radii at which the experiment was certified and the settings in which its
runs differ, so it is worth running again when there are new ones: the views are replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pydantic
from rich.console import Console

from data_shards.command_line.parsing import parse_words
from jobs.command_line import exit_status
from jobs.reporting.report_data import differing_settings
from model.certification.eps import eps_value
from pipeline.tracking.client import RunReference, TrackingConfig, ui_command
from pipeline.tracking.reader import Reader, TrackedRun, TrackingError
from pipeline.tracking.ui_views import (
    Section,
    View,
    bar,
    line,
    metric,
    parallel,
    param,
    save_views,
    scatter,
)

TRAINING = "tags.stage = 'train'"
EVALUATIONS = "tags.stage = 'cra-eval'"
_CRA = re.compile(r"cra_sound/(\w+)/(\d+)_(\d+)")
_SETTINGS = 6
"""Axes for settings: more are not legible."""
_SOMETHING = 0.01
"""Share of certified samples below which a radius says nothing about a setting."""
_LOOP = (
    "train/loss",
    "train/certified",
    "orthogonality/residual_max",
    "train/images_per_s",
    "perf/mfu",
    "perf/goodput",
    "cost/device_hours",
    "system/cpu_utilization_percentage",
)


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class ViewsConfig:
    """Save the views of docs/how-to/mlflow.md into an experiment and print their links."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store and experiment; an empty experiment: the only one that has training runs."""


@dataclass(frozen=True)
class Radii:
    """Metrics of one norm, smallest radius first.

    Attributes:
        norm: of the radii.
        sound: names of `cra_sound`.
        attack: names of the accuracy under attack at the same radii.
    """

    norm: str
    sound: tuple[str, ...]
    attack: tuple[str, ...]


def certified_radii(names: Iterable[str]) -> list[Radii]:
    """Return the norms and radii of the metrics with these names."""
    found: dict[str, dict[str, float]] = {}
    for match in filter(None, map(_CRA.fullmatch, names)):
        found.setdefault(match[1], {})[match[0]] = eps_value(f"{match[2]}/{match[3]}")
    return [
        Radii(norm, sound, tuple(name.replace("cra_sound", "attack", 1) for name in sound))
        for norm, radii in sorted(found.items())
        for sound in [tuple(sorted(radii, key=lambda name: radii[name]))]
    ]


def views(runs: Sequence[TrackedRun]) -> list[View]:
    """Return the views of an experiment with these training runs.

    Raises:
        TrackingError: none of the runs has been certified.
    """
    radii = certified_radii(name for run in runs for name in run.metrics)
    if not radii:
        raise TrackingError("no training run has been certified: there is nothing to compare yet")
    settings = _numeric(differing_settings([run.params for run in runs]))
    sound = [name for r in radii for name in r.sound]
    attack = [name for r in radii for name in r.attack]
    first = metric(sound[0])
    results = [metric("clean"), *map(metric, sound)]
    training = [*map(param, settings), *results, metric("cost/device_hours")]
    return [
        View("cra-runs", "1 Training runs", TRAINING, first, training),
        View(
            "cra-steps",
            "2 Certified while training",
            TRAINING,
            first,
            training,
            [
                *(
                    Section(f"certified robust accuracy, {r.norm}", _lines(("clean", *r.sound)))
                    for r in radii
                ),
                Section("training", _lines(_LOOP), columns=4),
            ],
        ),
        View(
            "cra-settings",
            "3 What decides it",
            TRAINING,
            first,
            training,
            _what_decides(runs, radii, settings),
        ),
        View(
            "cra-evaluations",
            "4 Evaluations",
            EVALUATIONS,
            first,
            [param("step"), param("attack"), *results, *map(metric, attack)],
        ),
        View(
            "cra-attack",
            "5 Proof and attack",
            f"{EVALUATIONS} and params.attack != 'none'",
            first,
            [param("step"), param("attack"), *results, *map(metric, attack)],
            [
                Section(
                    f"proved and attacked, {name.split('/', 1)[1]}", [bar(name), bar(attacked)], 2
                )
                for r in radii
                for name, attacked in zip(r.sound, r.attack, strict=True)
            ],
        ),
    ]


def _what_decides(
    runs: Sequence[TrackedRun], radii: Sequence[Radii], settings: Sequence[str]
) -> list[Section]:
    """Return parallel coordinates of the settings, then clean against certified accuracy."""
    coordinates = [
        Section(
            f"settings and certified robust accuracy, {r.norm}",
            [parallel(settings, ["clean", *_certifying(runs, r.sound)])],
            columns=1,
            height=340,
        )
        for r in radii
    ]
    trade = [
        Section(f"clean against certified, {r.norm}", [scatter("clean", n) for n in r.sound])
        for r in radii
    ]
    return coordinates + trade


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns 0, 2 for bad input or 1 for a failure."""
    return exit_status(lambda console, _: _save(arguments, console), (TrackingError,))


def _save(arguments: list[str] | None, console: Console) -> int:
    tracking = parse_words(ViewsConfig, arguments, prog="python -m jobs.mlflow_views").tracking
    runs = Reader(tracking).training_runs()
    experiments = sorted({run.experiment for run in runs})
    if len(experiments) != 1:
        raise TrackingError(
            f"training runs in {len(experiments)} experiments ({', '.join(experiments)}): "
            "name one with --tracking.experiment"
        )
    chosen = replace(tracking, experiment=experiments[0])
    paths = save_views(chosen, views(runs))
    address = tracking.uri
    if tracking.uri.startswith("sqlite:"):
        address = "http://127.0.0.1:5000"
        command, _ = ui_command(tracking.uri, RunReference(runs[0].experiment_id, ""))
        console.print(f"MLflow: {command}", soft_wrap=True)
    for name, path in paths.items():
        console.print(f"{name:<28} {address}{path}", soft_wrap=True)
    return 0


def _lines(names: Iterable[str]) -> list[Mapping[str, object]]:
    return [line(name) for name in names]


def _certifying(runs: Sequence[TrackedRun], names: Sequence[str]) -> list[str]:
    """The radii at which some run certifies something: the last axis colours the lines."""
    found = [n for n in names if max(run.metrics.get(n, 0.0) for run in runs) >= _SOMETHING]
    return found or list(names)


def _numeric(settings: Mapping[str, Sequence[str | None]]) -> list[str]:
    """The first settings whose values are all numbers: others make no axis."""
    found = [name for name, values in settings.items() if all(map(_is_number, values))]
    return found[:_SETTINGS]


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
