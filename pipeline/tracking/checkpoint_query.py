"""What a scheduler of evaluations asks MLflow: which checkpoints there are, which are evaluated."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.tracking.client import connect, model_of_version, pages, quoted

logger = logging.getLogger(__name__)

_RATIO = re.compile(r"\d+/\d+")
_PAGE = 1000
_MODELS_PER_PAGE = 50  # what every MLflow store allows


@dataclass(frozen=True)
class Checkpoint:
    """An exported checkpoint, as MLflow knows it.

    Attributes:
        model_id: its LoggedModel.
        experiment: name of the experiment.
        run_id: training run, empty if there is none.
        run_name: name of that run.
        step: training step.
        artifact_url: where the model artifact lies.
        artifact_digest: digest of its weights.
        created_s: when it was recorded, seconds since the epoch.
        training: the run is in progress and certifies its checkpoints itself.
        split: split on which the run certifies its checkpoints.
        eps: ratios at which it does; empty if it does not say.
    """

    model_id: str
    experiment: str
    run_id: str
    run_name: str
    step: int
    artifact_url: str
    artifact_digest: str
    created_s: float
    training: bool
    split: str
    eps: tuple[str, ...]


class CheckpointQuery:
    """Read-only view of a store; every answer is a fresh one.

    Args:
        uri: MLflow store, as TrackingConfig has it.
        experiments: names of the experiments whose checkpoints count; none: all of the store.
        models: names of registered models whose versions count as well.
    """

    def __init__(self, uri: str, experiments: Sequence[str], models: Sequence[str] = ()) -> None:
        self._client = connect(uri)
        self._experiments = tuple(experiments)
        self._models = tuple(models)
        self._passed_over: set[str] = set()
        self._names: dict[str, str] = {}

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first; an experiment that does not exist yet has none."""
        found: dict[str, Any] = {}
        named = map(self._experiment, self._experiments)
        every = named if self._experiments else self._client.search_experiments()
        ids = [e.experiment_id for e in every if e]
        if ids:
            for model in self._logged_models(ids):
                found[model.model_id] = model
        for name in self._models:
            for version in self._versions(name):
                known = model_of_version(version) in found
                if not known and (model := self._model_of(version)):
                    found[model.model_id] = model
        runs = self._runs({model.experiment_id for model in found.values()})
        checkpoints = []
        for model in found.values():
            if model.tags.get("artifact_url"):
                try:
                    checkpoints.append(self._checkpoint(model, runs))
                except (ValueError, TypeError) as error:  # one record must not hide all others
                    self._pass_over(model.model_id, error)
        return sorted(checkpoints, key=lambda c: (c.created_s, c.run_name, c.step))

    def _model_of(self, version: Any) -> Any:
        """The LoggedModel of a registered version; None where somebody has deleted it."""
        from mlflow.exceptions import MlflowException

        model_id = model_of_version(version)
        try:
            return self._client.get_logged_model(model_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._pass_over(model_id, error)
            return None

    def _pass_over(self, record: str, error: Exception) -> None:
        if record not in self._passed_over:
            self._passed_over.add(record)
            logger.warning("MLflow record %r is passed over: %s", record, error)

    def recorded(self, run_ids: Iterable[str]) -> set[tuple[str, str]]:
        """Return (eval_key, training run) of the evaluations that are recorded completely.

        Args:
            run_ids: training runs to look at; an empty id stands for evaluations without one.
        """
        wanted = set(run_ids)
        ids = sorted(e.experiment_id for e in self._client.search_experiments())
        condition = "tags.stage = 'cra-eval' and attributes.status = 'FINISHED'"
        if len(wanted) == 1:
            condition += f" and tags.train_run_id = {quoted(*wanted)}"
        recorded = (run.data.tags for run in self._search_runs(ids if wanted else (), condition))
        # One search: one per run would be quadratic.
        found = ((tags.get("eval_key"), tags.get("train_run_id")) for tags in recorded)
        return {(key, run_id) for key, run_id in found if key and run_id in wanted}

    def _checkpoint(self, model: Any, runs: dict[str, Any]) -> Checkpoint:
        run = runs.get(model.source_run_id)
        params = run.data.params if run else {}
        run_id = run.info.run_id if run else ""
        quoted(run_id)  # else `recorded` could not search for it
        return Checkpoint(
            model_id=model.model_id,
            experiment=self._name(model.experiment_id),
            run_id=run_id,
            run_name=run.info.run_name if run else model.name,
            step=int(model.params.get("step", 0)),
            artifact_url=model.tags["artifact_url"],
            artifact_digest=model.tags.get("artifact_digest", ""),
            created_s=model.creation_timestamp / 1000,
            training=run is not None
            and run.info.status == "RUNNING"
            and params.get("checkpoint.evaluate") == "True",
            # What training certifies its kept checkpoints on; the test split is for the result.
            split="validation"
            if params.get("data.train_split") == "fit"
            else params.get("data.test_split", "test"),
            eps=tuple(_RATIO.findall(params.get("checkpoint.evaluate_eps", ""))),
        )

    def _name(self, experiment_id: str) -> str:
        if experiment_id not in self._names:
            self._names[experiment_id] = str(self._client.get_experiment(experiment_id).name)
        return self._names[experiment_id]

    def _experiment(self, name: str) -> Any:
        return self._client.get_experiment_by_name(name)

    def _logged_models(self, experiment_ids: Sequence[str]) -> Iterator[Any]:
        search = self._client.search_logged_models
        yield from pages(search, experiment_ids, max_results=_MODELS_PER_PAGE)

    def _versions(self, name: str) -> Iterator[Any]:
        yield from pages(self._client.search_model_versions, f"name = {quoted(name)}")

    def _runs(self, experiment_ids: Iterable[str]) -> dict[str, Any]:
        found = self._search_runs(sorted(experiment_ids), "tags.stage = 'train'")
        return {run.info.run_id: run for run in found}

    def _search_runs(self, experiment_ids: Sequence[str], condition: str) -> Iterator[Any]:
        if experiment_ids:
            search = self._client.search_runs
            yield from pages(search, experiment_ids, condition, max_results=_PAGE)
