"""MLflow's model registry: versions with their evidence, aliases, and what makes them loadable.

A registered version is the LoggedModel of a checkpoint, to which `package` adds a loader (models
from code, nothing pickled) and the certificate on which decisions rest. The weights stay where they
are: the loader gets their address and digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.limits import require
from pipeline.run.layout import SUMMARY
from pipeline.tracking.client import (
    MlflowConnection,
    RunReference,
    TrackingConfig,
    flatten_params,
    missing_store,
    now_ms,
    pages,
    quoted,
    read_file,
)
from pipeline.tracking.relocation import follow
from pipeline.tracking.untrusted_server import AddressError

_EVIDENCE = "evidence"
_DIGEST = re.compile("[0-9a-f]{64}")
_PAGE = 1000
_GATE = "gate"
"""Experiment of what the gate does, where none is named."""


class RegistryError(ValueError):
    """The registry does not hold what was asked for; the message is all the user needs."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model.

    Attributes:
        name: the registered model.
        number: counts from 1.
        aliases: aliases that point here.
        tags: of the version.
    """

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


@dataclass(frozen=True)
class RecordedEvaluation:
    """What an evaluation run holds beside its metrics."""

    run_id: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    summary: Mapping[str, Any]


class Predictor(Protocol):
    """What `serve` wraps."""

    def predict(self, images: npt.NDArray[np.uint8], eps: str | None) -> Mapping[str, Any]:
        """Columns of the answer for images (B, C, H, W)."""
        ...


class Registry(MlflowConnection):
    """The registry of one MLflow store.

    What the gate does is recorded in the experiment of the config, without one in `gate`; what was
    evaluated and compared is looked for in that of the config, without one in all.

    Raises:
        RegistryError: there is no such store.
    """

    def __init__(self, config: TrackingConfig) -> None:
        if missing := missing_store(config.uri):
            raise RegistryError(missing)
        super().__init__(dataclasses.replace(config, experiment=config.experiment or _GATE))
        self._everywhere = not config.experiment

    def _searched(self) -> list[str]:
        """Ids of the experiments that are looked at."""
        if not self._everywhere:
            return [self._experiment_id]
        return [e.experiment_id for e in pages(self._client.search_experiments)]

    def require_address(self, address: str) -> str:
        """Return an address that a version or an evaluation names, if it may be opened.

        Raises:
            RegistryError: see `TrackingConfig.require_address`.
        """
        try:
            return self._config.require_address(address)
        except AddressError as error:
            raise RegistryError(str(error)) from error

    def located(self, address: str) -> str:
        """Where something lies that a recorded file names, also after the store was moved."""
        return follow(self._config.uri, address)

    # Registered models

    def model_tags(self, name: str) -> dict[str, str] | None:
        """Tags of a registered model; None if there is none of this name."""
        model = self._found(lambda: self._client.get_registered_model(name))
        return dict(model.tags) if model else None

    def set_model_tags(self, name: str, tags: Mapping[str, str]) -> None:
        """Set tags of a registered model, which is created if there is none."""
        if self.model_tags(name) is None:
            self._client.create_registered_model(name, tags=dict(tags))
            return
        for key, value in tags.items():
            self._client.set_registered_model_tag(name, key, value)

    def versions(self, name: str) -> list[Version]:
        """All versions, oldest first."""
        found, token = [], None
        while True:
            page = self._client.search_model_versions(f"name = {quoted(name)}", page_token=token)
            # A search leaves the aliases out.
            found += [self._client.get_model_version(name, v.version) for v in page]
            token = page.token
            if not token:
                return sorted(map(_version, found), key=lambda version: version.number)

    def version(self, name: str, number: int) -> Version:
        """One version.

        Raises:
            RegistryError: there is none.
        """
        found = self._found(lambda: self._client.get_model_version(name, str(number)))
        if found is None:
            raise RegistryError(f"registered model {name!r} has no version {number}")
        return _version(found)

    def aliased(self, name: str, alias: str) -> Version | None:
        """The version to which an alias points."""
        found = self._found(lambda: self._client.get_model_version_by_alias(name, alias))
        return _version(found) if found else None

    def resolve(self, uri: str) -> Version:
        """The version that ``models:/name@alias`` or ``models:/name/3`` names.

        Raises:
            RegistryError: no such address, alias or version.
        """
        path = uri.removeprefix("models:/")
        name, at, alias = path.rpartition("@")
        if at:
            found = self.aliased(name, alias)
            if found is None:
                raise RegistryError(f"registered model {name!r} has no alias {alias!r}")
            return found
        name, _, number = path.rpartition("/")
        if path == uri or not name or not number.isdecimal():
            raise RegistryError(f"{uri!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
        return self.version(name, int(number))

    def add_version(
        self, name: str, *, model_id: str, run_id: str, tags: Mapping[str, str]
    ) -> Version:
        """Register a LoggedModel as the next version, with a link to a run."""
        source = f"models:/{model_id}"
        if self._config.uri.startswith("sqlite:"):  # would look for it in the global active store
            source = self._client.get_logged_model(model_id).artifact_location
        made = self._client.create_model_version(
            name, source, run_id=run_id, tags={**tags, "model_id": model_id}, model_id=model_id
        )
        return _version(made)

    def tag_version(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self._client.set_model_version_tag(version.name, str(version.number), key, value)

    def point(self, alias: str, version: Version) -> None:
        """Let an alias point to a version; a version that had it loses it."""
        self._client.set_registered_model_alias(version.name, alias, str(version.number))

    def drop_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self._client.delete_registered_model_alias(name, alias)

    # What a version consists of

    def package(
        self,
        model_id: str,
        *,
        code: Path,
        settings: Mapping[str, Any],
        input_shape: Sequence[int],
        evidence: Mapping[str, bytes],
        evidence_key: str,
    ) -> None:
        """Make a LoggedModel loadable by ``mlflow.pyfunc`` and lay its evidence beside.

        Args:
            model_id: the LoggedModel.
            code: script that calls `serve` (models from code).
            settings: arguments of the script's predictor, JSON values; `eps` is the default radius.
            input_shape: (C, H, W) of an image.
            evidence: small files by name.
            evidence_key: folder of the evidence, so that later evidence replaces nothing.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, "model")
            _save_pyfunc(folder, code, settings, input_shape)
            place = folder / _EVIDENCE / evidence_key
            place.mkdir(parents=True)
            for name, data in evidence.items():
                (place / name).write_bytes(data)
            location = self._client.get_logged_model(model_id).artifact_location
            self._files(location).log_artifacts(str(folder))
        external = "mlflow.model.isExternal"
        if external in self._client.get_logged_model(model_id).tags:  # it can be loaded now
            self._client.delete_logged_model_tag(model_id, external)

    def evidence(self, version: Version, key: str) -> dict[str, bytes]:
        """Files that `package` laid beside a version, by name.

        Raises:
            RegistryError: there are none.
        """
        from mlflow.exceptions import MlflowException

        model_id = version.tags.get("model_id")
        if model_id is None or not _DIGEST.fullmatch(key):  # it becomes a path
            raise RegistryError(f"{version} carries no certificate: the gate did not register it")
        location = self._client.get_logged_model(model_id).artifact_location
        try:
            with tempfile.TemporaryDirectory() as folder:
                files = self._files(location)
                place = Path(files.download_artifacts(f"{_EVIDENCE}/{key}", folder))
                found = sorted(place.iterdir())
                for path in found:
                    require(path.stat().st_size, "answer_bytes", f"{path.name} has")
                return {path.name: path.read_bytes() for path in found}
        except (MlflowException, OSError, ValueError) as error:
            raise RegistryError(f"the evidence of {version} cannot be read: {error}") from error

    # Runs

    def recorded_evaluation(self, run_id: str) -> RecordedEvaluation:
        """An evaluation run, by its id.

        Raises:
            RegistryError: there is none of this id, or it is no finished evaluation.
        """
        from mlflow.exceptions import MlflowException

        run = self._found(lambda: self._client.get_run(run_id))
        if run is None or run.data.tags.get("stage") != "cra-eval":
            raise RegistryError(f"run {run_id} is no evaluation in this MLflow store")
        try:
            data = read_file(self._files(run.info.artifact_uri), SUMMARY)
            summary = parse_object(data, SUMMARY)
        except (MlflowException, OSError, ValueError) as error:
            raise RegistryError(f"run {run_id} has no readable {SUMMARY}: {error}") from error
        return RecordedEvaluation(run_id, run.data.tags, run.data.params, summary)

    def evaluation_with(self, certificate_digest: str) -> str | None:
        """Id of the evaluation run that recorded a certificate, if one is found."""
        condition = f"params.certificate_digest = {quoted(certificate_digest)}"
        runs = self._client.search_runs(self._searched(), condition, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def comparisons(self, index_digest: str) -> list[str]:
        """Keys of the comparisons that the gate made on a test set, by time, whatever came out."""
        condition = (
            "tags.stage = 'gate' and tags.`gate.action` = 'promote' and "
            f"tags.`gate.index_digest` = {quoted(index_digest)}"
        )
        runs = pages(self._client.search_runs, self._searched(), condition, max_results=_PAGE)
        finished = [run for run in runs if run.info.status == "FINISHED"]
        finished.sort(key=lambda run: (run.info.start_time, run.info.run_id))
        keys = (run.data.tags.get("gate.comparison", run.info.run_id) for run in finished)
        return list(dict.fromkeys(key for key in keys if key))

    @contextlib.contextmanager
    def gate_run(self, run_name: str, tags: Mapping[str, str]) -> Iterator[RunReference]:
        """The run that records one act of the gate; it ends as FAILED if the act raises."""
        tags = {**tags, "stage": "gate"}
        run = self._create_run(self._experiment_id, run_name=run_name, tags=tags)
        status = "FAILED"
        try:
            yield RunReference(run.info.experiment_id, run.info.run_id)
            status = "FINISHED"
        finally:
            self.finish_run(run.info.run_id, status, now_ms())

    def fill_run(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        files: Mapping[str, bytes],
    ) -> None:
        """Record parameters, metrics and files of a run."""
        self._log_params(run_id, flatten_params(params), known={})
        self.log_metrics(run_id, [{"values": metrics, "timestamp_ms": now_ms(), "step": 0}])
        self._log_files(run_id, files)

    @staticmethod
    def _found(ask: Callable[[], Any]) -> Any:
        """The answer, or None where MLflow says that there is no such thing."""
        from mlflow.exceptions import MlflowException

        try:
            return ask()
        except MlflowException as error:
            # A missing alias is an invalid parameter to MLflow's SQL store.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def serve(make: Callable[..., Predictor]) -> None:
    """Hand a predictor to MLflow; called by the script of `Registry.package`.

    Args:
        make: gets the settings of `Registry.package` as keyword arguments when a model is loaded.
    """
    import pandas as pd
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel

    # MLflow warns that it derives no schema of arrays from type hints; ours is explicit. It also
    # lets these warnings pass an "ignore", but not a record.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore", UserWarning)

        class Served(PythonModel):
            def load_context(self, context: Any) -> None:
                self._predictor = make(**context.model_config)

            def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
                eps = (params or {}).get("eps")
                return pd.DataFrame(self._predictor.predict(np.asarray(model_input), eps))

    set_model(Served())


def _save_pyfunc(
    folder: Path, code: Path, settings: Mapping[str, Any], input_shape: Sequence[int]
) -> None:
    from importlib.metadata import version

    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    answer = {"label": "long", "class": "string", "radius": "double", "eps": "string"}
    answer["certified"] = "boolean"
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, *input_shape))]),
        outputs=Schema([ColSpec(kind, name) for name, kind in answer.items()]),
        params=ParamSchema([ParamSpec("eps", "string", settings["eps"])]),
    )
    with warnings.catch_warnings(record=True):  # as in `serve`
        warnings.simplefilter("ignore", UserWarning)
        save_model(
            folder,
            python_model=str(code),
            model_config=dict(settings),
            signature=signature,
            pip_requirements=[f"certified-pretrain=={version('certified-pretrain')}"],
        )


def _version(found: Any) -> Version:
    return Version(found.name, int(found.version), tuple(found.aliases), dict(found.tags))
