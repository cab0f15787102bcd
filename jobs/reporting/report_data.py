"""What a report shows, read from MLflow and checked against the certificates it came from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jobs.errors import EvaluationError
from jobs.evaluation.stored_result import certificate_body, contradiction
from jobs.reporting.cost import Cost, training_cost
from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.run.layout import CERTIFICATE, CLOSEST_FIGURE, CRA_FIGURE, RADIUS_FIGURE, SUMMARY
from pipeline.tracking.reader import Reader, TrackedModel, TrackedRun

FIGURES = (CLOSEST_FIGURE, CRA_FIGURE, RADIUS_FIGURE)
NOT_SETTINGS = frozenset(
    {"name", "storage", "tracking.uri", "tracking.experiment", "resume", "extend_to_epochs"}
)
"""Parameters that say which run it is, not how it was trained."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation whose record, summary and certificate agree.

    Attributes:
        run: its run in the store.
        summary: the numbers.
        figures: PNG bytes by name.
    """

    run: TrackedRun
    summary: EvaluationSummary
    figures: Mapping[str, bytes]

    @property
    def attack(self) -> str:
        """Name of the attack suite, or a dash."""
        return self.summary.attack.suite if self.summary.attack else "–"


@dataclass(frozen=True)
class LeftOut:
    """An evaluation that the report does not count, and why."""

    train_run: str
    name: str
    reason: str


@dataclass(frozen=True)
class ReportedRun:
    """A training run with its checkpoints and evaluations.

    Attributes:
        run: the training run.
        models: recorded artifacts by step.
        evaluations: by step, then by time.
        cost: what training took.
    """

    run: TrackedRun
    models: tuple[TrackedModel, ...]
    evaluations: tuple[Evaluated, ...]
    cost: Cost


@dataclass(frozen=True)
class ReportEntry:
    """A run's evaluations on the test set of one group."""

    reported: ReportedRun
    evaluations: tuple[Evaluated, ...]

    @property
    def chosen(self) -> Evaluated:
        """The evaluation in the table: the last step; one with an attack if there is one."""
        return max(
            self.evaluations,
            key=lambda e: (e.summary.step, e.summary.attack is not None, e.run.start_ms),
        )

    @cached_property
    def by_step(self) -> tuple[Evaluated, ...]:
        """One evaluation per checkpoint: they agree in everything but the attack."""
        return tuple({e.summary.step: e for e in self.evaluations}.values())


@dataclass(frozen=True)
class ComparisonGroup:
    """Runs whose numbers can be compared: same test set, same norm.

    Attributes:
        norm: norm of the radii.
        dataset: name of the test set.
        index_digest: digest of its index.
        samples: samples in it.
        entries: one for each run.
    """

    norm: str
    dataset: str
    index_digest: str
    samples: int
    entries: tuple[ReportEntry, ...]

    @cached_property
    def eps(self) -> tuple[str, ...]:
        """The radii of all tables, as ratios, smallest first."""
        ratios = {r for entry in self.entries for r in entry.chosen.summary.columns["sound"].cra}
        return tuple(sorted(ratios, key=eps_value))

    def best(self, ratio: str) -> float:
        """Largest certified robust accuracy at a radius."""
        found = (entry.chosen.summary.columns["sound"].cra.get(ratio) for entry in self.entries)
        return max(value for value in found if value is not None)


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        runs: the training runs.
        groups: comparable groups of their evaluations.
        left_out: evaluations that do not count.
    """

    runs: tuple[ReportedRun, ...]
    groups: tuple[ComparisonGroup, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def uncertified(self) -> tuple[str, ...]:
        """Names of the runs that are in no group."""
        return tuple(reported.run.name for reported in self.runs if not reported.evaluations)

    @cached_property
    def differences(self) -> dict[str, tuple[str | None, ...]]:
        """Settings in which the runs differ: one value per run, None where a run has no such."""
        return differing_settings([reported.run.params for reported in self.runs])


def differing_settings(
    params: Sequence[Mapping[str, str]],
) -> dict[str, tuple[str | None, ...]]:
    """Return the settings in which runs differ: a value for each, None where a run has none."""
    names = sorted(set().union(*params) - NOT_SETTINGS)
    table = {name: tuple(p.get(name) for p in params) for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def collect(reader: Reader, names: Sequence[str]) -> Report:
    """Read the runs with these names (none: all) and everything that belongs to them.

    Args:
        reader: the store.
        names: names or ids of training runs.

    Raises:
        TrackingError: a run is unknown, or there is none.
    """
    runs, left_out = [], []
    trained = reader.training_runs(names)
    tracked_evaluations, models = reader.evaluations(trained), reader.models(trained)
    for run in trained:
        evaluations = []
        for tracked in tracked_evaluations[run.run_id]:
            found = _evaluated(reader, tracked)
            if isinstance(found, str):
                left_out.append(LeftOut(run.name, tracked.name, found))
            else:
                evaluations.append(found)
        evaluations.sort(key=lambda e: (e.summary.step, e.run.start_ms))
        cost = training_cost(reader, run)
        runs.append(ReportedRun(run, tuple(models[run.run_id]), tuple(evaluations), cost))
    return Report(tuple(runs), _groups(runs), tuple(left_out))


def _groups(runs: Iterable[ReportedRun]) -> tuple[ComparisonGroup, ...]:
    groups: dict[tuple[str, str, str, int], list[ReportEntry]] = defaultdict(list)
    for reported in runs:
        mine = defaultdict(list)
        for evaluated in reported.evaluations:
            s = evaluated.summary
            mine[s.norm, s.dataset, s.index_digest, s.samples].append(evaluated)
        for key, found in mine.items():
            groups[key].append(ReportEntry(reported, tuple(found)))
    return tuple(
        ComparisonGroup(*key, entries=tuple(entries)) for key, entries in sorted(groups.items())
    )


def _evaluated(reader: Reader, tracked: TrackedRun) -> Evaluated | str:
    """The evaluation, or why its record cannot be believed."""
    names = reader.file_names(tracked.run_id)
    if missing := {CERTIFICATE, SUMMARY} - names:
        return f"no {' and no '.join(sorted(missing))} in MLflow"
    try:
        summary = EvaluationSummary.from_json(reader.read_file(tracked.run_id, SUMMARY))
        certificate = certificate_body(reader.read_file(tracked.run_id, CERTIFICATE))
        reason = disagreement(tracked, summary, certificate)
    except EvaluationError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SUMMARY} or {CERTIFICATE} cannot be read: {error!r}"
    if reason:
        return reason
    figures = {f: reader.read_file(tracked.run_id, f) for f in FIGURES if f in names}
    return Evaluated(tracked, summary, figures)


def disagreement(
    tracked: TrackedRun, summary: EvaluationSummary, certificate: Mapping[str, Any]
) -> str | None:
    """Return in what a record, its summary and its certificate contradict each other, if they do.

    This finds numbers that were changed in the store. That the certificate itself is right is for
    `model.verify` to say, which needs weights and images.
    """
    digest = certificate["digest"]
    stated = {
        f"the certificate digest in {SUMMARY}": summary.certificate_digest,
        "the parameter certificate_digest": tracked.params.get("certificate_digest"),
    }
    for what, value in stated.items():
        if value != digest:
            return f"{what} is {value}, but {CERTIFICATE} has {digest}"
    if reason := contradiction(summary, certificate):
        return reason
    for name, metric in summary.metrics().items():
        if tracked.metrics.get(name) != metric:
            return f"metric {name} is {tracked.metrics.get(name)}, the certificate says {metric}"
    return None
