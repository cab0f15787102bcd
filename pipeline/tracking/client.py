"""MLflow: what is recorded of runs and evaluations, and the connection to its server.

Every call is idempotent: runs, models and evaluations are found again by a key in
their tags, and MLflow keeps one point per (name, step, timestamp, value).

MLflow itself is imported inside functions: a process that never tracks never pays for it.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from data_shards.untrusted.limits import require
from pipeline.run.ray_job import default_storage
from pipeline.tracking.relocation import SQLITE, relocate
from pipeline.tracking.relocation import location as artifact_location
from pipeline.tracking.untrusted_server import (
    bound_answers,
    listed_addresses,
    require_address,
    require_answer,
    require_location,
)

logger = logging.getLogger(__name__)

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
PARAM_CHARACTERS = 6000
DATASET_DIGEST_CHARACTERS = 36
_ENVIRONMENT = {  # defaults; what the user has set wins
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",  # a server would choose where to we send requests
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def default_uri() -> str:
    """The store of the runs that name none: beside them, in the default storage."""
    return f"{SQLITE}{default_storage() / 'mlflow.db'}"


@pydantic.dataclasses.dataclass(
    frozen=True,
    kw_only=True,
    config=pydantic.ConfigDict(extra="forbid", validate_default=True),
)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = field(default_factory=default_uri)
    """MLflow store: sqlite:///path/mlflow.db (embedded) or the http(s) address of a server.
    Default: `mlflow.db` beside the runs."""
    experiment: str = ""
    """MLflow experiment, one per shard set. Empty: all of them, or the one that it is about."""
    addresses: tuple[str, ...] = field(default_factory=listed_addresses)
    """URL prefixes under which an MLflow server may name artifacts and files of runs; what it keeps
    itself needs none. Default: those of CERTIFIED_PRETRAIN_ADDRESSES, separated by blanks."""

    def require_address(self, address: str) -> str:
        """Return an address that the store names, if it may be opened.

        Raises:
            AddressError: the store is a server, and the address lies under no listed prefix.
        """
        return require_address(self.uri, self.addresses, address)

    @pydantic.field_validator("uri")
    @classmethod
    def _supported_uri(cls, uri: str) -> str:
        """Make sqlite paths absolute: workers run in other directories.

        Empty is left to who knows what it is about.
        """
        if uri.startswith(SQLITE):
            return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
        if not uri:
            return uri
        if uri.startswith(("http://", "https://")):
            return uri.rstrip("/")
        raise ValueError(f"tracking uri {uri!r} must start with sqlite:/// or http(s)://")


class QuoteError(ValueError):
    """A text that no MLflow search can hold."""


class RunReference(NamedTuple):
    """A run on the MLflow server."""

    experiment_id: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One evaluation of one artifact as MLflow shows it.

    Attributes:
        eval_key: identity of the evaluation (artifact digest and evaluation config).
        metrics: scalars by name, e.g. ``cra_nominal/l2/36_255``.
        params: few, mostly numeric values: they become the axes of the compare page.
        artifacts: small files by name (figure, summary).
        tags: what evaluations are filtered by.
        step: training step of the artifact.
        train_run_id: the training run that receives the scalars as series, when known.
        model_id: the LoggedModel of the artifact; found by its digest when absent.
    """

    eval_key: str
    artifact_url: str
    artifact_digest: str
    dataset_name: str
    dataset_digest: str
    dataset_url: str
    metrics: Mapping[str, float]
    params: Mapping[str, Any]
    artifacts: Mapping[str, bytes]
    step: int = 0
    train_run_id: str | None = None
    model_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    timestamp_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


def log_evaluation(config: TrackingConfig, record: EvaluationRecord) -> RunReference:
    """Record an evaluation at once (no spool); safe to repeat.

    Raises:
        Exception: what MLflow raises when the server is away or refuses.
    """
    return MlflowConnection(config).log_evaluation(record)


def log_comparison(
    config: TrackingConfig,
    *,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Mapping[str, bytes],
) -> RunReference:
    """Record a comparison of training runs as a run of its own.

    Raises:
        Exception: what MLflow raises when the server is away or refuses.
    """
    return MlflowConnection(config).log_comparison(name, params, metrics, artifacts)


def ui_command(uri: str, run: RunReference) -> tuple[str, str]:
    """Return the shell command that opens the MLflow UI, and the address of a run in it."""
    path = f"/#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"
    if uri.startswith("sqlite:"):
        # Job execution off: its helper processes outlive the UI server.
        switches = "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
        python = shlex.quote(sys.executable)  # works without an activated environment
        store = shlex.quote(uri)
        where = f"--backend-store-uri {store} --host 127.0.0.1 --port 5000"
        return f"{switches} {python} -m mlflow ui {where}", f"http://127.0.0.1:5000{path}"
    return f"python -m webbrowser -t {shlex.quote(uri + path)}", uri + path


class MlflowConnection:
    """Synchronous MLflow calls by explicit ids, each safe to repeat."""

    def __init__(self, config: TrackingConfig) -> None:
        self._config = config
        self._client = connect(config.uri)

    @functools.cached_property
    def _experiment_id(self) -> str:
        """The experiment of the config, made when something is first recorded in it."""
        return self._find_or_create_experiment(self._config)

    def start_run(
        self,
        run_key: str,
        run_id: str | None,
        run_name: str,
        params: dict[str, str],
        tags: dict[str, str],
        timestamp_ms: int,
    ) -> RunReference:
        """Create a training run, or open it again by its id or key."""
        run = self._run(run_id) if run_id else self._find_run(run_key=run_key)
        if run is None:
            run = self._create_run(
                self._experiment_id,
                start_time=timestamp_ms,
                run_name=run_name,
                tags={**tags, "run_key": run_key, "stage": "train"},
            )
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
            for tag, value in tags.items():  # of the submission that goes on with it
                self._client.set_tag(run.info.run_id, tag, value)
        self._log_params(run.info.run_id, params, known=run.data.params)
        return RunReference(run.info.experiment_id, run.info.run_id)

    def log_metrics(self, run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows of `step`, `timestamp_ms` and `values`."""
        from mlflow.entities import Metric

        points = [
            Metric(name, value, row["timestamp_ms"], row["step"])
            for row in rows
            for name, value in row["values"].items()
        ]
        for chunk in _chunks(points, METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=chunk)

    def find_or_create_model(
        self,
        run_id: str,
        *,
        step: int,
        artifact_url: str,
        digest: str,
        params: Mapping[str, Any],
    ) -> str:
        """As mlflow.create_external_model, which only works on the global active store."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models.utils import get_external_mlflow_model_spec
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

        run = self._run(run_id)
        known = {"artifact_digest": digest}
        if run.data.tags.get("stage") == "train":
            known["source_run"] = run_id  # two training runs may end in the same weights
        found = self._client.search_logged_models(
            [run.info.experiment_id],
            filter_string=" and ".join(f"tags.{k} = {quoted(v)}" for k, v in known.items()),
            max_results=1,
        )
        if found:
            return str(found[0].model_id)
        name = re.sub(r"[^\w\-]", "-", f"{run.info.run_name}-step{step}")
        model = self._client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=run_id,
            tags={
                MLFLOW_MODEL_IS_EXTERNAL: "true",
                "artifact_digest": digest,
                "artifact_url": artifact_url,
                "source_run": run_id,
            },
            params={"step": str(step), **flatten_params(params)},
            model_type="certified-classifier",
        )
        require_answer(model.model_id, None, "the model that it created", self._config.uri)
        with tempfile.TemporaryDirectory() as folder:  # lets the model registry accept it
            get_external_mlflow_model_spec(model).save(str(Path(folder, "MLmodel")))
            self._files(model.artifact_location).log_artifacts(folder)
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        return str(model.model_id)

    def log_evaluation(self, record: EvaluationRecord) -> RunReference:
        """Record one evaluation as a flat run, and as series in its training run."""
        if record.train_run_id is None:
            record = replace(record, train_run_id=self._source_run(record.artifact_digest))
        train_run = self._existing_run(record.train_run_id)
        # Two training runs may end in the same weights; each shows its own evaluations.
        run = self._find_run(eval_key=record.eval_key, train_run_id=record.train_run_id or "")
        if run is None:
            origin = train_run.info.run_name if train_run else record.artifact_digest[:8]
            run = self._create_run(
                train_run.info.experiment_id if train_run else self._experiment_id,
                start_time=record.timestamp_ms,
                run_name=f"cra-{origin}-step{record.step}",
                tags={
                    **record.tags,
                    "stage": "cra-eval",
                    "eval_key": record.eval_key,
                    "artifact_url": record.artifact_url,
                    "train_run_id": record.train_run_id or "",
                },
            )
        if run.info.status != "FINISHED":
            self._fill_evaluation(run, record, train_run)
        if train_run:  # the time of the first recording: repeating adds no point
            # Two series: those by which checkpoints are chosen are no results.
            chosen_by = "validation/" if record.params.get("split") == "validation" else ""
            row = {
                "values": {f"{chosen_by}{name}": v for name, v in record.metrics.items()},
                "timestamp_ms": run.info.start_time,
                "step": record.step,
            }
            self.log_metrics(train_run.info.run_id, [row])
        return RunReference(run.info.experiment_id, run.info.run_id)

    def _fill_evaluation(self, run: Any, record: EvaluationRecord, train_run: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, Metric

        run_id = run.info.run_id
        model_id = record.model_id or self.find_or_create_model(
            train_run.info.run_id if train_run else run_id,
            step=record.step,
            artifact_url=record.artifact_url,
            digest=record.artifact_digest,
            params={},
        )
        name, digest = record.dataset_name, record.dataset_digest[:DATASET_DIGEST_CHARACTERS]
        dataset = Dataset(name, digest, "shards", json.dumps({"uri": record.dataset_url}))
        self._client.log_inputs(run_id, [DatasetInput(dataset)], [LoggedModelInput(model_id)])
        self._client.set_tag(run_id, "model_id", model_id)
        self._log_params(run_id, flatten_params(record.params), known=run.data.params)
        metrics = [
            Metric(key, value, run.info.start_time, record.step, model_id, name, digest, run_id)
            for key, value in record.metrics.items()
        ]
        self._client.log_batch(run_id, metrics=metrics)
        self._log_files(run_id, record.artifacts)
        self.finish_run(run_id, "FINISHED", now_ms())

    def log_comparison(
        self,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        artifacts: Mapping[str, bytes],
    ) -> RunReference:
        """Record scalars and small files as one run."""
        started = now_ms()
        run = self._create_run(
            self._experiment_id, start_time=started, run_name=name, tags={"stage": "compare"}
        )
        run_id = run.info.run_id
        self._log_params(run_id, flatten_params(params), known={})
        self.log_metrics(run_id, [{"values": metrics, "timestamp_ms": started, "step": 0}])
        self._log_files(run_id, artifacts)
        self.finish_run(run_id, "FINISHED", now_ms())
        return RunReference(run.info.experiment_id, run_id)

    def _log_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for file, data in files.items():
                Path(folder, file).write_bytes(data)
            self._files(self._run(run_id).info.artifact_uri).log_artifacts(folder)

    def tag_run(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value)

    def finish_run(self, run_id: str, status: str, timestamp_ms: int) -> None:
        """Set the final status of a run.

        Raises:
            AnswerError: the run does not have it afterwards.
        """
        self._client.set_terminated(run_id, status, timestamp_ms)
        found = self._run(run_id).info.status
        require_answer(found, status, f"the status of run {run_id}", self._config.uri)

    def _log_params(self, run_id: str, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Log new parameters; MLflow's are immutable, so a changed one is reported and kept."""
        from mlflow.entities import Param

        for name in params.keys() & known.keys():
            if params[name] != known[name]:
                logger.warning(
                    "run %s keeps %s = %s, now %s", run_id, name, known[name], params[name]
                )
        new = [Param(name, value) for name, value in params.items() if name not in known]
        for chunk in _chunks(new, PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=chunk)

    def _create_run(self, experiment_id: str, **fields: Any) -> Any:
        run = self._client.create_run(experiment_id, **fields)
        require_answer(run.info.run_id, None, "the run that it created", self._config.uri)
        return run

    def _run(self, run_id: str) -> Any:
        run = self._client.get_run(run_id)
        require_answer(run.info.run_id, run_id, "a run", self._config.uri)
        return run

    def _files(self, location: str) -> Any:
        """The files at an address that the store has named; this very address is opened.

        Raises:
            AddressError: it may not be opened.
        """
        return open_files(self._config, location)

    def _find_run(self, **tags: str) -> Any:
        condition = " and ".join(f"tags.{tag} = {quoted(value)}" for tag, value in tags.items())
        runs = self._client.search_runs([self._experiment_id], condition, max_results=1)
        return runs[0] if runs else None

    def _source_run(self, artifact_digest: str) -> str | None:
        """The training run of an artifact that was exported while the server was away.

        None if no training run, or more than one, ended in these weights.
        """
        models = self._client.search_logged_models(
            [self._experiment_id], filter_string=f"tags.artifact_digest = {quoted(artifact_digest)}"
        )
        sources = {model.source_run_id for model in models if model.source_run_id}
        runs = [self._run(source) for source in sources]
        training = [run.info.run_id for run in runs if run.data.tags.get("stage") == "train"]
        return training[0] if len(training) == 1 else None

    def _existing_run(self, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("run %s is not in this MLflow store: no series for it", run_id)
            return None

    def _find_or_create_experiment(self, config: TrackingConfig) -> str:
        from mlflow.exceptions import MlflowException

        location = None  # a server knows its own
        if config.uri.startswith("sqlite:"):  # else ./mlruns of whoever comes first
            location = artifact_location(Path(config.uri.removeprefix(SQLITE)))
        for attempt in (1, 2):
            experiment = self._client.get_experiment_by_name(config.experiment)
            what = f"experiment {config.experiment!r}"
            if experiment is not None:
                require_answer(experiment.name, config.experiment, what, config.uri)
                return require_answer(experiment.experiment_id, None, what, config.uri)
            try:
                made = self._client.create_experiment(config.experiment, location)
                return require_answer(made, None, what, config.uri)
            except MlflowException as error:  # somebody else created it in between
                if attempt == 2 or error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise AssertionError("unreachable")


def missing_store(uri: str) -> str:
    """What to say of an embedded store that is not there; empty for every other one."""
    database = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or database.is_file():
        return ""
    return f"there is no MLflow store {database}: give --tracking.uri"


def import_mlflow(uri: str) -> Any:
    """Import what a client of `uri` needs: seconds that a thread can spend ahead; its class."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    if uri.startswith(SQLITE):  # else the client does so when it connects
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Logs what it raises, each time with its trace: who calls it says it once.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return MlflowClient


def connect(uri: str) -> Any:
    """Return a client of `uri`; one process at a time creates an sqlite schema."""
    client = import_mlflow(uri)
    if not uri.startswith("sqlite:"):
        bound_answers()
        return client(uri)
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        relocate(database)
        return client(uri)


def open_files(config: TrackingConfig, location: str) -> Any:
    """The files that lie at an address which the store has named.

    The address that was checked is the one that is opened: a server that is asked twice may answer
    twice.

    Raises:
        AddressError: it may not be opened.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    require_location(config.uri, config.addresses, location)
    return get_artifact_repository(location, tracking_uri=config.uri)


def read_file(files: Any, name: str) -> bytes:
    """One file of `open_files`.

    Raises:
        UntrustedError: it is over the limit of an answer.
        Exception: what the artifact store raises when it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(files.download_artifacts(name, folder))
        require(path.stat().st_size, "answer_bytes", f"{name} has")
        return path.read_bytes()


def model_of_version(version: Any) -> str:
    """LoggedModel of a registered version; a registry in an embedded store knows a tag only."""
    known = version.model_id or version.tags.get("model_id")
    return str(known or (version.source or "").rpartition("/")[2])


def pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Yield the results of an MLflow search from all of its pages."""
    token = None
    while True:
        items = search(*arguments, **options, page_token=token)
        yield from items
        token = items.token
        if not token:
            return


def quoted(text: str) -> str:
    """A text as a value of an MLflow search, which knows no escapes.

    Raises:
        QuoteError: it holds both kinds of quotes, or a backslash.
    """
    for quote in "'\"":
        if quote not in text and "\\" not in text:
            return f"{quote}{text}{quote}"
    raise QuoteError(f"MLflow cannot search for {text!r}: both kinds of quotes, or a backslash")


def flatten_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings to dotted names; other values as text within MLflow's limit."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten_params(value, f"{prefix}{key}."))
            continue
        text = str(value)
        if len(text) > PARAM_CHARACTERS:
            notice = f" ... (truncated, {len(text)} characters)"
            text = text[: PARAM_CHARACTERS - len(notice)] + notice
        flat[f"{prefix}{key}"] = text
    return flat


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def now_ms() -> int:
    """Wall clock in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000
