"""One page that compares training runs by what is proved of them.

    python -m jobs.report [RUN ...] [--tracking.uri URI] [--tracking.experiment NAME] [--out URL]
    python -m jobs.report --verify URL [--verify-samples N] [--out URL]

The first writes ``report.html``, which needs no network and no script, and ``report.md``. Every
number comes from a certificate: an evaluation whose record in MLflow differs from it is listed and
left out. The second writes ``verify.html``, which derives one certificate again in the browser.
"""

from __future__ import annotations

import base64
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import field
from datetime import datetime, timezone
from typing import Annotated, Any

import jinja2
import pydantic
import tyro
from rich.console import Console

from data_shards.command_line.parsing import parse_words
from data_shards.errors import ShardError
from data_shards.storage.store import Store
from data_shards.untrusted.text import code, markdown, shown
from jobs.command_line import exit_status
from jobs.errors import EvaluationError
from jobs.figures.plot_style import run_style
from jobs.reporting.figures import cost_svg, curves_svg, time_unit
from jobs.reporting.per_class import confusion_table, frequent_confusions, worst_classes
from jobs.reporting.report_data import ComparisonGroup, Report, ReportEntry, collect
from jobs.reporting.verify_page import VERIFY_PAGE, locate, page
from model.errors import ModelError
from pipeline.run.wilson_interval import wilson, with_interval
from pipeline.tracking.client import RunReference, TrackingConfig, ui_command
from pipeline.tracking.reader import Reader, TrackedRun, TrackingError

PAGE, TEXT = "report.html", "report.md"
_NONE = "–"


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class ReportConfig:
    """Compare training runs by their certified robust accuracy, their cost and their settings."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names or MLflow ids of training runs; none: all of the experiment."""
    out: str = "report"
    """URL of the folder for report.html and report.md."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store; an empty experiment stands for all of them."""
    verify: str = ""
    """Write verify.html for one LipNeXt instead: URL of a training run (its last evaluated
    artifact), of an artifact (its evaluation of `test`, or its only one), or of an evaluation.
    Empty: report.html."""
    verify_samples: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Images on verify.html, spread evenly over the split; default: all, or as many as fit."""
    verify_artifact: str = ""
    """URL of the artifact of verify.html; default: two folders above the evaluation, or the one
    that its summary names."""
    verify_shards: Annotated[str, tyro.conf.arg(name="data.shards")] = ""
    """URL of the shard set of verify.html; default: the one that the summary names."""

    @pydantic.model_validator(mode="after")
    def _one_page(self) -> ReportConfig:
        if self.verify and self.runs:
            raise ValueError(
                f"verify={self.verify!r} writes a page of one evaluation; it takes no runs, got "
                f"{', '.join(self.runs)}"
            )
        if not self.verify and (self.verify_samples or self.verify_artifact or self.verify_shards):
            raise ValueError("--verify-samples, --verify-artifact and --data.shards need --verify")
        return self


def render(report: Report, *, uri: str, now: datetime | None = None) -> dict[str, str]:
    """Return the texts of report.html and report.md by name.

    Args:
        report: what they show.
        uri: of the MLflow store, for links to the UI.
        now: time of the report; default: the present.
    """
    values: dict[str, Any] = {
        "report": report,
        "places": {reported.run.run_id: at for at, reported in enumerate(report.runs)},
        "made": (now or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M UTC"),
        "link": lambda run: _link(uri, run),
        "ui": ui_command(uri, RunReference(report.runs[0].run.experiment_id, ""))[0],
        "color": lambda place: run_style(place)["color"],
        "curves": lambda group: _image("svg+xml", curves_svg(group, _places(report, group))),
        "costs": lambda group: _image("svg+xml", cost_svg(group, _places(report, group))),
        "png": lambda data: _image("png", data),
        "has_cost": any(reported.cost.hours for reported in report.runs),
        "measured": any(reported.cost.mfu for reported in report.runs),
        "priced": any(reported.cost.total for reported in report.runs),
    }
    environments = {
        PAGE: _environment(autoescape=True, finalize=shown),
        # Jinja escapes HTML alone; here every value of an expression passes through `markdown`.
        TEXT: _environment(autoescape=False, finalize=markdown),
    }
    return {name: e.get_template(f"{name}.j2").render(values) for name, e in environments.items()}


def _environment(**options: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.reporting"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters.update(_FILTERS)
    return environment


def per_point(entry: ReportEntry, ratio: str) -> float | None:
    """Return the device seconds per percentage point of `cra_sound`; None if one is missing."""
    seconds = entry.reported.cost.up_to(entry.chosen.summary.step)
    cra = entry.chosen.summary.columns["sound"].cra.get(ratio)
    return seconds / (100 * cra) if seconds and cra else None


def per_further_point(entry: ReportEntry, at: int, ratio: str) -> float | None:
    """Return the device seconds per point since the checkpoint before; None without a gain."""
    if at == 0:
        return None
    before, after = entry.by_step[at - 1].summary, entry.by_step[at].summary
    start, end = (entry.reported.cost.up_to(s.step) for s in (before, after))
    pair = [s.columns["sound"].cra.get(ratio) for s in (before, after)]
    if start is None or end is None or None in pair:
        return None
    gain = 100 * (pair[1] - pair[0])  # type: ignore[operator]
    return (end - start) / gain if gain > 0 else None


def duration(seconds: float | None) -> str:
    """Return a time in the unit in which it reads well."""
    if seconds is None:
        return _NONE
    scale, unit = time_unit(seconds)
    return f"{seconds / scale:.3g} {unit}"


def percent(value: float | None) -> str:
    """Return a share in per cent."""
    return _NONE if value is None else f"{value:.2%}"


def number(value: float | None) -> str:
    """Return a number with three digits."""
    return _NONE if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


_FILTERS: Mapping[str, Callable[..., object]] = {
    "duration": duration,
    "percent": percent,
    "number": number,
    "interval": wilson,
    "share": with_interval,
    "per_point": per_point,
    "per_further_point": per_further_point,
    "classes": worst_classes,
    "confusion": confusion_table,
    "confused": frequent_confusions,
    "code": code,
    "quoted": shlex.quote,
    "when": lambda ms: datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns 0, 2 for bad input or 1 for a failure."""

    def act(console: Console, errors: Console) -> int:
        config = parse_words(ReportConfig, arguments, prog="python -m jobs.report")
        if config.verify:
            console.print(f"page: {_write_verify_page(config)}", soft_wrap=True)
            return 0
        return _write_report(config, console, errors)

    package = (TrackingError, ShardError, EvaluationError, ModelError)
    return exit_status(act, (*package, FileNotFoundError))


def _write_report(config: ReportConfig, console: Console, errors: Console) -> int:
    report = collect(Reader(config.tracking), config.runs)
    out = Store(config.out)
    for name, text in render(report, uri=config.tracking.uri).items():
        out.write(name, text.encode())
    counted = sum(len(reported.evaluations) for reported in report.runs)
    console.print(f"{len(report.runs)} runs, {counted} evaluations", soft_wrap=True)
    for left in report.left_out:
        errors.print(f"left out: {left.name} of {left.train_run}: {left.reason}", soft_wrap=True)
    where = out.local_path() or out
    console.print(f"report: {where}/{PAGE}, {where}/{TEXT}", soft_wrap=True)
    return 0


def _write_verify_page(config: ReportConfig) -> str:
    """Write verify.html; returns where."""
    located = locate(config.verify, config.verify_artifact, config.verify_shards)
    text = page(located, config.verify_samples)
    out = Store(config.out)
    out.write(VERIFY_PAGE, text.encode())
    return f"{out.local_path() or out}/{VERIFY_PAGE}"


def _places(report: Report, group: ComparisonGroup) -> list[int]:
    order = [reported.run.run_id for reported in report.runs]
    return [order.index(entry.reported.run.run_id) for entry in group.entries]


def _image(kind: str, data: bytes) -> str:
    """An image inside the page: identifiers in one SVG cannot meet those of another."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _link(uri: str, run: TrackedRun) -> str | None:
    """Address of a run in the UI; None where the store has no server."""
    if uri.startswith("sqlite:"):
        return None
    return ui_command(uri, RunReference(run.experiment_id, run.run_id))[1]


if __name__ == "__main__":
    sys.exit(main())
