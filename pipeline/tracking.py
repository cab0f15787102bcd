"""MLflow tracking: the only MLflow import of the project.

A training run writes every record (start, metrics, checkpoints, evaluations, finish) to a local
JSONL spool and goes on; one background thread ships the spool to MLflow and stores the offset
that the server has acknowledged. A server that is away delays the shipping and nothing else, and
every record can be shipped twice without a trace: runs, models and evaluations are found again by
a key in their tags, and MLflow keeps one point per (name, step, timestamp, value).

MLflow itself is imported inside functions: a process that never tracks never pays for it.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import re
import shlex
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

logger = logging.getLogger(__name__)

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
PARAM_CHARACTERS = 6000
DATASET_DIGEST_CHARACTERS = 36
_METRIC_NAME = re.compile(r"[\w\-. :/]{1,250}")
_ENVIRONMENT = {  # defaults; what the user has set wins
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@pydantic.dataclasses.dataclass(
    frozen=True,
    kw_only=True,
    config=pydantic.ConfigDict(extra="forbid", validate_default=True),
)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = "sqlite:///mlflow.db"
    """MLflow store: sqlite:///path/mlflow.db (embedded) or the http(s) address of a server."""
    experiment: str = "certified-pretrain"
    """MLflow experiment; one per dataset."""

    @pydantic.field_validator("uri")
    @classmethod
    def _supported_uri(cls, uri: str) -> str:
        """Make sqlite paths absolute: workers run in other directories."""
        if uri.startswith("sqlite:///"):
            return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
        if uri.startswith(("http://", "https://")):
            return uri.rstrip("/")
        raise ValueError(f"tracking uri {uri!r} must start with sqlite:/// or http(s)://")


class RunReference(NamedTuple):
    """A run on the MLflow server."""

    experiment_id: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One evaluation of one artefact as MLflow shows it.

    Attributes:
        eval_key: identity of the evaluation (artefact digest and evaluation config).
        metrics: scalars by name, e.g. ``cra_nominal/l2/36_255``.
        params: few, mostly numeric values: they become the axes of the compare page.
        artifacts: small files by name (figure, summary).
        step: training step of the artefact.
        train_run_id: the training run that receives the scalars as series, when known.
        model_id: the LoggedModel of the artefact; found by its digest when absent.
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
    timestamp_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


def log_evaluation(config: TrackingConfig, record: EvaluationRecord) -> RunReference:
    """Record an evaluation at once (no spool); safe to repeat.

    Raises:
        Exception: what MLflow raises when the server is away or refuses.
    """
    return _Server(config).log_evaluation(record)


def ui_command(uri: str, run: RunReference) -> tuple[str, str]:
    """Return the shell command that opens the MLflow UI and the URL path of a run in it."""
    path = f"/#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"
    if uri.startswith("sqlite:"):
        # Job execution off: its helper processes outlive the UI server.
        switches = "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
        return f"{switches} mlflow ui --backend-store-uri {shlex.quote(uri)} --port 5000", path
    return f"python -m webbrowser -t {shlex.quote(uri + path)}", path


class Tracker:
    """The record of one training run: write locally, ship in the background.

    Args:
        config: the MLflow store.
        spool: directory of the local record, one per training run; opening it again goes on
            with the same run and ships what was left.
        run_name: name shown in the UI.
        params: resolved config, nested or flat; recorded flat (``optim.lr``).
        tags: tags of the run.
        run_id: the MLflow run to go on with when the spool is not at hand (resume elsewhere).
        wait_seconds: longest wait for the server's first answer, so that `run` is known.
    """

    def __init__(
        self,
        config: TrackingConfig,
        spool: Path,
        *,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
        wait_seconds: float = 10.0,
    ) -> None:
        self._config = config
        self._server: _Server | None = None
        self._spool = _Spool(spool, f"{config.uri} {config.experiment}")
        known = self._spool.run
        if run_id and known and known.run_id != run_id:
            raise ValueError(
                f"{spool} holds the records of run {known.run_id}, not of {run_id}: "
                "give this run another spool directory"
            )
        self._condition = threading.Condition()
        self._failures = 0
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._ship, name="mlflow-shipper", daemon=True)
        offset = self._append(
            "start",
            run_key=self._spool.run_key,
            run_id=run_id,
            run_name=run_name,
            params=_flatten(params or {}),
            tags=dict(tags or {}),
            timestamp_ms=_now_ms(),
        )
        self._thread.start()
        self._wait_for(offset, wait_seconds)

    @property
    def run(self) -> RunReference | None:
        """The MLflow run; None as long as the server has not answered."""
        return self._spool.run

    def log_metrics(
        self, step: int, values: Mapping[str, float], timestamp_ms: int | None = None
    ) -> None:
        """Append scalars of one step to the spool; returns at once.

        Raises:
            ValueError: a name that MLflow would refuse.
        """
        for name in values:
            if not _METRIC_NAME.fullmatch(name):
                raise ValueError(
                    f"metric name {name!r}: 1 to 250 letters, digits, spaces and any of _-.:/"
                )
        self._append(
            "metrics",
            step=step,
            values={name: float(value) for name, value in values.items()},
            timestamp_ms=_now_ms() if timestamp_ms is None else timestamp_ms,
        )

    def log_checkpoint(
        self,
        step: int,
        artifact_url: str,
        digest: str,
        params: Mapping[str, Any] | None = None,
        wait_seconds: float = 5.0,
    ) -> str | None:
        """Record an exported artefact as an external LoggedModel (address and digest only).

        Returns:
            The model id, or None when the server did not answer within `wait_seconds`; the
            record then follows later and evaluations find the model by its digest.
        """
        offset = self._append(
            "checkpoint",
            step=step,
            artifact_url=artifact_url,
            digest=digest,
            params=_flatten(params or {}),
        )
        self._wait_for(offset, wait_seconds)
        return self._spool.models.get(digest)

    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Record an evaluation of this run (as `log_evaluation` of the module, by the spool)."""
        row = asdict(record)
        row["artifacts"] = {
            name: base64.b64encode(data).decode() for name, data in record.artifacts.items()
        }
        self._append("evaluation", record=row)

    def finish(self, status: str = "FINISHED") -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"run status {status!r} is not FINISHED, FAILED or KILLED")
        self._append("finish", status=status, timestamp_ms=_now_ms())

    def close(self, timeout: float = 30.0) -> bool:
        """Ship what is left for at most `timeout` seconds and stop.

        Returns:
            Whether everything has arrived; the rest is shipped when the spool is opened again.
        """
        with self._condition:
            self._deadline = time.monotonic() + timeout
            self._condition.notify_all()
        self._thread.join(timeout)
        done = self._spool.acknowledged == self._spool.end
        if not done:
            logger.warning("MLflow %s: records are left in %s", self._config.uri, self._spool.path)
        return done

    def _append(self, kind: str, **fields: Any) -> int:
        with self._condition:
            if self._deadline is not None:
                raise RuntimeError("this tracker is closed")
            offset = self._spool.append({"kind": kind, **fields})
            if kind != "metrics":  # metrics travel in batches
                self._condition.notify_all()
        return offset

    def _wait_for(self, offset: int, seconds: float) -> None:
        """Wait until `offset` is acknowledged, at most `seconds`; not at all in an outage."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._failures or self._spool.acknowledged >= offset, seconds
            )

    def _ship(self) -> None:
        pause = 0.0
        while True:
            try:
                self._ship_pending()
                failures, pause = 0, 1.0
            except Exception as error:  # whatever the server does, training goes on
                failures, pause = self._failures + 1, min(2.0**self._failures, 30.0)
                if failures == 1:
                    logger.warning("MLflow %s: %s; will retry", self._config.uri, error)
            with self._condition:
                self._failures = failures
                self._condition.notify_all()
                done = self._spool.acknowledged == self._spool.end
                if self._deadline is not None:
                    if done or time.monotonic() >= self._deadline:
                        return
                    pause = min(pause, 0.5)
                self._condition.wait(pause)

    def _ship_pending(self) -> None:
        server = self._server = self._server or _Server(self._config)
        while rows := self._spool.read(limit=METRICS_PER_CALL):
            for is_metrics, group in groupby(rows, key=lambda item: item[0]["kind"] == "metrics"):
                items = list(group)
                if is_metrics:
                    server.log_metrics(self._run_id(), [row for row, _ in items])
                    self._spool.acknowledge(items[-1][1])
                    continue
                for row, end in items:
                    self._ship_row(server, row)
                    self._spool.acknowledge(end)

    def _ship_row(self, server: _Server, row: dict[str, Any]) -> None:
        kind = row.pop("kind")
        if kind == "start":
            known = self._spool.run
            row["run_id"] = row["run_id"] or (known.run_id if known else None)
            self._spool.run = server.start_run(**row)
        elif kind == "checkpoint":
            self._spool.models[row["digest"]] = server.find_or_create_model(self._run_id(), **row)
        elif kind == "evaluation":
            record = row["record"]
            record["artifacts"] = {
                name: base64.b64decode(text) for name, text in record["artifacts"].items()
            }
            record["train_run_id"] = self._run_id()
            server.log_evaluation(EvaluationRecord(**record))
        else:
            server.finish_run(self._run_id(), **row)

    def _run_id(self) -> str:
        if self._spool.run is None:
            raise RuntimeError(f"{self._spool.path} does not begin with a start record")
        return self._spool.run.run_id


class _Spool:
    """Append-only JSON lines, and per server the acknowledged offset and the ids received."""

    def __init__(self, folder: Path, server: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "spool.jsonl"
        self._state = folder / f"server-{sha256(server.encode()).hexdigest()[:12]}.json"
        self._drop_torn_line()
        self.end = self.path.stat().st_size
        self.run_key = self._first_run_key() or uuid.uuid4().hex
        state = json.loads(self._state.read_text()) if self._state.exists() else {}
        self.acknowledged: int = state.get("acknowledged", 0)
        self.run = RunReference(*state["run"]) if state.get("run") else None
        self.models: dict[str, str] = state.get("models", {})

    def append(self, row: dict[str, Any]) -> int:
        line = json.dumps(row).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line)
        self.end += len(line)
        return self.end

    def read(self, limit: int) -> list[tuple[dict[str, Any], int]]:
        """Return up to `limit` rows that are not acknowledged, each with its end offset."""
        rows: list[tuple[dict[str, Any], int]] = []
        with self.path.open("rb") as file:
            end = file.seek(self.acknowledged)
            for line in islice(file, limit):
                if line.endswith(b"\n"):  # else it is being written
                    end += len(line)
                    rows.append((json.loads(line), end))
        return rows

    def acknowledge(self, end: int) -> None:
        state = {"acknowledged": end, "run": self.run, "models": self.models}
        draft = self._state.with_suffix(".tmp")
        draft.write_text(json.dumps(state))
        draft.replace(self._state)
        self.acknowledged = end

    def _drop_torn_line(self) -> None:
        """A process that died while writing leaves half a line; it was never acknowledged."""
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def _first_run_key(self) -> str | None:
        with self.path.open("rb") as file:
            line = file.readline()
        return json.loads(line)["run_key"] if line else None


class _Server:
    """Synchronous MLflow calls by explicit ids, each safe to repeat."""

    def __init__(self, config: TrackingConfig) -> None:
        self._client = _connect(config.uri)
        self._experiment_id = self._find_or_create_experiment(config)

    def start_run(
        self,
        run_key: str,
        run_id: str | None,
        run_name: str,
        params: dict[str, str],
        tags: dict[str, str],
        timestamp_ms: int,
    ) -> RunReference:
        run = self._client.get_run(run_id) if run_id else self._find_run("run_key", run_key)
        if run is None:
            run = self._client.create_run(
                self._experiment_id,
                start_time=timestamp_ms,
                run_name=run_name,
                tags={**tags, "run_key": run_key, "stage": "train"},
            )
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._log_params(run.info.run_id, params, known=run.data.params)
        return RunReference(run.info.experiment_id, run.info.run_id)

    def log_metrics(self, run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
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

        run = self._client.get_run(run_id)
        found = self._client.search_logged_models(
            [run.info.experiment_id],
            filter_string=f"tags.artifact_digest = '{digest}'",
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
            },
            params={"step": str(step), **_flatten(params)},
            model_type="certified-classifier",
        )
        with tempfile.TemporaryDirectory() as folder:  # lets the model registry accept it
            get_external_mlflow_model_spec(model).save(str(Path(folder, "MLmodel")))
            self._client.log_model_artifacts(model.model_id, folder)
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        return str(model.model_id)

    def log_evaluation(self, record: EvaluationRecord) -> RunReference:
        train_run = self._existing_run(record.train_run_id)
        run = self._find_run("eval_key", record.eval_key)
        if run is None:
            run = self._client.create_run(
                train_run.info.experiment_id if train_run else self._experiment_id,
                start_time=record.timestamp_ms,
                run_name=f"cra-{record.artifact_digest[:8]}-step{record.step}",
                tags={
                    "stage": "cra-eval",
                    "eval_key": record.eval_key,
                    "artifact_url": record.artifact_url,
                    "train_run_id": record.train_run_id or "",
                },
            )
        if run.info.status != "FINISHED":
            self._fill_evaluation(run, record, train_run)
        if train_run:  # the time of the first recording: repeating adds no point
            row = {
                "values": record.metrics,
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
        self._log_params(run_id, _flatten(record.params), known=run.data.params)
        metrics = [
            Metric(key, value, run.info.start_time, record.step, model_id, name, digest, run_id)
            for key, value in record.metrics.items()
        ]
        self._client.log_batch(run_id, metrics=metrics)
        with tempfile.TemporaryDirectory() as folder:
            for file, data in record.artifacts.items():
                Path(folder, file).write_bytes(data)
            self._client.log_artifacts(run_id, folder)
        self.finish_run(run_id, "FINISHED", _now_ms())

    def finish_run(self, run_id: str, status: str, timestamp_ms: int) -> None:
        self._client.set_terminated(run_id, status, timestamp_ms)

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

    def _find_run(self, tag: str, value: str) -> Any:
        runs = self._client.search_runs(
            [self._experiment_id], f"tags.{tag} = '{value}'", max_results=1
        )
        return runs[0] if runs else None

    def _existing_run(self, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("run %s is not in this MLflow store: no series for it", run_id)
            return None

    def _find_or_create_experiment(self, config: TrackingConfig) -> str:
        from mlflow.exceptions import MlflowException

        location = None  # a server knows its own
        if config.uri.startswith("sqlite:"):  # else ./mlruns of whoever comes first
            location = Path(config.uri.removeprefix("sqlite:///")).parent.as_uri() + "/mlartifacts"
        for attempt in (1, 2):
            experiment = self._client.get_experiment_by_name(config.experiment)
            if experiment is not None:
                return str(experiment.experiment_id)
            try:
                return str(self._client.create_experiment(config.experiment, location))
            except MlflowException as error:  # somebody else created it in between
                if attempt == 2 or error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise AssertionError("unreachable")


def _connect(uri: str) -> Any:
    """Return a client of `uri`; one process at a time creates an sqlite schema."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not uri.startswith("sqlite:"):
        return MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return MlflowClient(uri)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings to dotted names; other values as text within MLflow's limit."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
            continue
        text = str(value)
        if len(text) > PARAM_CHARACTERS:
            notice = f" ... (truncated, {len(text)} characters)"
            text = text[: PARAM_CHARACTERS - len(notice)] + notice
        flat[f"{prefix}{key}"] = text
    return flat


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
