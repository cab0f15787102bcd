"""The read side of MLflow: runs, checkpoints, evaluations and their files, as plain values."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.tracking.client import (
    TrackingConfig,
    connect,
    missing_store,
    model_of_version,
    open_files,
    pages,
    quoted,
    read_file,
)

logger = logging.getLogger(__name__)

_RUNS_PER_PAGE = 1000
_MODELS_PER_PAGE = 50  # what every MLflow store allows


class TrackingError(LookupError):
    """The store does not hold what was asked for; the message is all the user needs."""


class Point(NamedTuple):
    """One recorded value of a metric."""

    step: int
    value: float
    timestamp_ms: int


@dataclass(frozen=True)
class TrackedRun:
    """A training run or an evaluation.

    Attributes:
        run_id: its id in the store.
        name: name shown in the UI.
        experiment: name of its experiment.
        experiment_id: id of it.
        status: RUNNING, FINISHED, FAILED or KILLED.
        start_ms: when it began, milliseconds since the epoch.
        params: settings by dotted name, as text.
        metrics: the last value of every metric.
        tags: tags by name.
    """

    run_id: str
    name: str
    experiment: str
    experiment_id: str
    status: str
    start_ms: int
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class TrackedModel:
    """A checkpoint's exported artifact as the store knows it (a LoggedModel).

    Attributes:
        model_id: its id.
        name: name shown in the UI.
        step: training step.
        artifact_url: where the artifact lies.
        artifact_digest: digest of its weights.
        params: further facts recorded with it.
        registered: registered versions of it, e.g. ``digits v3 @champion``.
    """

    model_id: str
    name: str
    step: int
    artifact_url: str
    artifact_digest: str
    params: Mapping[str, str]
    registered: tuple[str, ...]


class Reader:
    """Read-only view of a store: it creates no experiment, every answer is a fresh one.

    Args:
        config: the store; an empty name of the experiment stands for all experiments.

    Raises:
        TrackingError: there is no such store or no such experiment.
    """

    def __init__(self, config: TrackingConfig) -> None:
        if missing := missing_store(config.uri):  # else connecting would make an empty one
            raise TrackingError(missing)
        self._config = config
        self._client = connect(config.uri)
        names = {e.experiment_id: str(e.name) for e in pages(self._client.search_experiments)}
        self.experiments: dict[str, str] = {
            key: name for key, name in names.items() if config.experiment in ("", name)
        }
        if not self.experiments:
            raise TrackingError(
                f"{config.uri} has no experiment {config.experiment!r}; it has "
                f"{', '.join(sorted(names.values()))}"
            )

    def training_runs(self, names: Sequence[str] = ()) -> list[TrackedRun]:
        """Return the training runs with these names or ids, in this order.

        Args:
            names: names or run ids; none: all training runs, oldest first.

        Raises:
            TrackingError: there is no run, a name is unknown, or several runs have it.
        """
        known = self._runs("tags.stage = 'train'")
        if not known:
            where = ", ".join(sorted(self.experiments.values()))
            raise TrackingError(f"there is no training run in experiment {where}")
        if not names:
            return known
        return [_one(name, known) for name in dict.fromkeys(names)]

    def evaluations(self, train_runs: Sequence[TrackedRun]) -> dict[str, list[TrackedRun]]:
        """Return the finished evaluations of some training runs by run id, oldest first."""
        condition = "tags.stage = 'cra-eval' and attributes.status = 'FINISHED'"
        if len(train_runs) == 1:
            condition += f" and tags.train_run_id = {quoted(train_runs[0].run_id)}"
        found: dict[str, list[TrackedRun]] = {run.run_id: [] for run in train_runs}
        for evaluation in self._runs(condition):  # one search: one per run would be quadratic
            found.get(evaluation.tags.get("train_run_id", ""), []).append(evaluation)
        return found

    def models(self, train_runs: Sequence[TrackedRun]) -> dict[str, list[TrackedModel]]:
        """Return the recorded artifacts of some training runs by run id, each by step."""
        one = {}
        if len(train_runs) == 1:
            one = {"filter_string": f"source_run_id = {quoted(train_runs[0].run_id)}"}
        listed = pages(
            self._client.search_logged_models,
            sorted({run.experiment_id for run in train_runs}),
            max_results=_MODELS_PER_PAGE,
            **one,
        )
        registered = self._registered()
        found: dict[str, list[TrackedModel]] = {run.run_id: [] for run in train_runs}
        for model in listed:
            if model.source_run_id not in found:
                continue
            try:
                step = int(model.params.get("step", 0))
            except (ValueError, TypeError) as error:  # one record must not hide all others
                logger.warning("MLflow record %r is passed over: %s", model.model_id, error)
                continue
            found[model.source_run_id].append(
                TrackedModel(
                    model_id=model.model_id,
                    name=model.name,
                    step=step,
                    artifact_url=model.tags.get("artifact_url", ""),
                    artifact_digest=model.tags.get("artifact_digest", ""),
                    params=dict(model.params),
                    registered=tuple(registered.get(model.model_id, ())),
                )
            )
        for models in found.values():
            models.sort(key=lambda model: model.step)
        return found

    def series(self, run_id: str, metric: str) -> list[Point]:
        """Return all values of a metric in the order in which they were recorded."""
        points = self._client.get_metric_history(run_id, metric)
        return sorted(
            (Point(p.step, p.value, p.timestamp) for p in points),
            key=lambda point: (point.timestamp_ms, point.step),
        )

    def file_names(self, run_id: str) -> set[str]:
        """Return the names of the files logged with a run."""
        return {file.path for file in self._files(run_id).list_artifacts() if not file.is_dir}

    def read_file(self, run_id: str, name: str) -> bytes:
        """Return a file logged with a run.

        Raises:
            UntrustedError: it is over the limit of an answer.
            AddressError: it lies where nothing of this server may be opened.
            Exception: what the artifact store raises when it cannot be read.
        """
        return read_file(self._files(run_id), name)

    def _files(self, run_id: str) -> Any:
        return open_files(self._config, self._client.get_run(run_id).info.artifact_uri)

    def _runs(self, condition: str) -> list[TrackedRun]:
        found = pages(
            self._client.search_runs,
            sorted(self.experiments),
            condition,
            max_results=_RUNS_PER_PAGE,
            order_by=["attributes.start_time ASC"],
        )
        return [
            TrackedRun(
                run_id=run.info.run_id,
                name=run.info.run_name,
                experiment=self.experiments[run.info.experiment_id],
                experiment_id=run.info.experiment_id,
                status=run.info.status,
                start_ms=run.info.start_time,
                params=dict(run.data.params),
                metrics=dict(run.data.metrics),
                tags=dict(run.data.tags),
            )
            for run in found
        ]

    def _registered(self) -> dict[str, list[str]]:
        """Registered versions by the id of their LoggedModel."""
        # A search of versions leaves the aliases out.
        named = {m.name: m.aliases for m in pages(self._client.search_registered_models)}
        found: dict[str, list[str]] = {}
        for version in pages(self._client.search_model_versions):
            number = str(version.version)
            aliases = sorted(a for a, v in named.get(version.name, {}).items() if str(v) == number)
            text = f"{version.name} v{number}{''.join(f' @{alias}' for alias in aliases)}"
            found.setdefault(model_of_version(version), []).append(text)
        return found


def _one(name: str, known: Sequence[TrackedRun]) -> TrackedRun:
    found = [run for run in known if name in (run.name, run.run_id)]
    if len(found) > 1:
        ids = ", ".join(run.run_id for run in found)
        raise TrackingError(f"{len(found)} training runs are called {name!r}; give an id: {ids}")
    if not found:
        names = ", ".join(dict.fromkeys(run.name for run in known))
        raise TrackingError(f"there is no training run {name!r}; there are {names}")
    return found[0]
