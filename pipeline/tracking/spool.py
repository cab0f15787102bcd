"""The record of one training run: written locally first, shipped to MLflow in the background.

Every record (start, metrics, checkpoints, evaluations, finish) goes to a local JSONL spool at once;
one background thread ships the spool and stores the offset that the server has acknowledged. A
server that is away delays the shipping and nothing else.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from data_shards.untrusted.json_input import parse_object, read_object
from data_shards.untrusted.limits import UntrustedError, limits, require
from data_shards.untrusted.text import printable
from pipeline.run.append_log import AppendLog
from pipeline.run.layout import SPOOL
from pipeline.run.relative_urls import relative, resolve
from pipeline.tracking.client import (
    METRICS_PER_CALL,
    EvaluationRecord,
    MlflowConnection,
    RunReference,
    TrackingConfig,
    flatten_params,
    now_ms,
)

logger = logging.getLogger(__name__)

_FIELDS = {
    "start": {"run_key", "run_id", "run_name", "params", "tags", "timestamp_ms"},
    "metrics": {"step", "values", "timestamp_ms"},
    "checkpoint": {"step", "artifact_url", "digest", "params"},
    "evaluation": {"record"},
    "tags": {"tags"},
    "finish": {"status", "timestamp_ms"},
}
"""What a record of each kind has."""
_LONGEST_REASON = 300
"""Characters of what a server answers that reach the log."""
_METRIC_NAME = re.compile(r"[\w\-. :/]{1,250}")


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
        run_key: by which the server knows the run, for the same purpose; a spool has its own.
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
        run_key: str = "",
        wait_seconds: float = 10.0,
    ) -> None:
        self._config = config
        self._server: MlflowConnection | None = None
        self._spool = _Spool(spool, f"{config.uri} {config.experiment}", run_key)
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
        self._start: dict[str, Any] = {
            "run_key": self._spool.run_key,
            "run_id": run_id,
            "run_name": run_name,
            "params": flatten_params(params or {}),
            "tags": dict(tags or {}),
            "timestamp_ms": now_ms(),
        }
        offset = self._append("start", **self._start)
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
            timestamp_ms=now_ms() if timestamp_ms is None else timestamp_ms,
        )

    def log_checkpoint(
        self,
        step: int,
        artifact_url: str,
        digest: str,
        params: Mapping[str, Any] | None = None,
        wait_seconds: float = 5.0,
    ) -> str | None:
        """Record an exported artifact as an external LoggedModel (address and digest only).

        Returns:
            The model id, or None when the server did not answer within `wait_seconds`; the
            record then follows later and evaluations find the model by its digest. One that the
            server has is not recorded again.
        """
        if digest in self._spool.models:
            return self._spool.models[digest]
        offset = self._append(
            "checkpoint",
            step=step,
            artifact_url=self._spool.written(artifact_url),
            digest=digest,
            params=flatten_params(params or {}),
        )
        self._wait_for(offset, wait_seconds)
        return self._spool.models.get(digest)

    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Record an evaluation of this run (as `log_evaluation` of the module, by the spool).

        One that the spool holds is not added again.
        """
        if record.eval_key in self._spool.evaluations():
            return
        row = asdict(record)
        row["artifact_url"] = self._spool.written(record.artifact_url)
        row["artifacts"] = {
            name: base64.b64encode(data).decode() for name, data in record.artifacts.items()
        }
        self._append("evaluation", record=row)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._append("tags", tags=dict(tags))

    def last_value(self, name: str, until: int | None = None) -> float | None:
        """The newest value of a metric that this spool holds, from earlier executions as well.

        Args:
            name: of the metric.
            until: values of later steps are left out.
        """
        return self._spool.last_value(name, until)

    def recorded(self, records: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of some metrics, by step and time, that this spool holds."""
        return self._spool.recorded(set(records))

    def finish(self, status: str = "FINISHED") -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"run status {status!r} is not FINISHED, FAILED or KILLED")
        self._append("finish", status=status, timestamp_ms=now_ms())

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
                failures, pause, lacking = 0, 1.0, False
            except Exception as error:  # whatever the server does, training goes on
                failures = self._failures + 1
                pause = min(2.0 ** min(self._failures, 10), 30.0)
                lacking = isinstance(error, ImportError)  # no waiting at the end brings it
                if failures == 1:
                    why = printable((str(error) or repr(error)).splitlines()[0])[:_LONGEST_REASON]
                    logger.warning("MLflow %s: %s; will retry", self._config.uri, why)
            with self._condition:
                self._spool.flush()
                self._failures = failures
                self._condition.notify_all()
                done = self._spool.acknowledged == self._spool.end
                if self._deadline is not None:
                    if done or lacking or time.monotonic() >= self._deadline:
                        return
                    pause = min(pause, 0.5)
                self._condition.wait(pause)

    def _ship_pending(self) -> None:
        server = self._server = self._server or MlflowConnection(self._config)
        while rows := self._spool.read(limit=METRICS_PER_CALL):
            for is_metrics, group in groupby(rows, key=lambda item: item[0]["kind"] == "metrics"):
                items = list(group)
                if is_metrics:
                    server.log_metrics(self._run_id(server), [row for row, _ in items])
                    self._spool.acknowledge(items[-1][1])
                    continue
                for row, end in items:
                    self._ship_row(server, row)
                    self._spool.acknowledge(end)

    def _ship_row(self, server: MlflowConnection, row: dict[str, Any]) -> None:
        row = dict(row)
        kind = row.pop("kind")
        if kind == "start":
            known = self._spool.run
            row["run_id"] = row["run_id"] or (known.run_id if known else None)
            self._spool.run = server.start_run(**row)
        elif kind == "checkpoint":
            row["artifact_url"] = self._spool.read_address(row["artifact_url"])
            self._spool.models[row["digest"]] = server.find_or_create_model(
                self._run_id(server), **row
            )
        elif kind == "evaluation":
            record = row["record"]
            record["artifacts"] = {
                name: base64.b64decode(text) for name, text in record["artifacts"].items()
            }
            record["train_run_id"] = self._run_id(server)
            record["artifact_url"] = self._spool.read_address(record["artifact_url"])
            server.log_evaluation(EvaluationRecord(**record))
        elif kind == "tags":
            server.tag_run(self._run_id(server), row["tags"])
        elif kind == "finish":
            server.finish_run(self._run_id(server), **row)

    def _run_id(self, server: MlflowConnection) -> str:
        # The first line of the spool is damaged: by its key the run is found all the same.
        if self._spool.run is None:
            self._spool.run = server.start_run(**self._start)
        return self._spool.run.run_id


@dataclass(frozen=True)
class _State:
    """What one server has acknowledged."""

    acknowledged: int = 0
    run: RunReference | None = None
    models: dict[str, str] = field(default_factory=dict)


_STATE = TypeAdapter(_State)
_DAMAGED: dict[str, Any] = {"kind": "damaged", "values": {}}


def _row(line: bytes) -> dict[str, Any]:
    """The record of a line; `_DAMAGED`, which nobody ships, for anything else."""
    try:
        row = parse_object(line, SPOOL)
    except UntrustedError:
        return _DAMAGED
    fields = _FIELDS.get(str(row.get("kind")))
    return row if fields and fields <= row.keys() else _DAMAGED


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The whole lines from here on; an empty one for each that no record can be as long as.

    A machine that went down may have left any number of NUL bytes without a newline.
    """
    most = limits().json_bytes + len(b"\n")
    while line := file.readline(most):
        while not line.endswith(b"\n"):
            line = file.readline(most)
            if not line:
                return  # it is being written
            line = line[-1:]  # of what is too long only the end counts
        yield line


def read_rows(spool: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Records of one kind, one at a time: a spool may be larger than the memory.

    Args:
        spool: the file.
        kind: "metrics", "evaluation" and so on; damaged lines are passed over.
    """
    begin = json.dumps({"kind": kind}).encode()[:-1]
    with spool.open("rb") as file:
        for line in _lines(file):
            row = _row(line) if line.startswith(begin) else _DAMAGED
            if row is not _DAMAGED:
                yield row


class _Spool:
    """Append-only JSON lines, and per server the acknowledged offset and the ids received."""

    def __init__(self, folder: Path, server: str, run_key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.absolute()
        self.path = folder / SPOOL
        self._lines = AppendLog(self.path)
        self._name_damage()
        self._state = folder / f"server-{sha256(server.encode()).hexdigest()[:12]}.json"
        self.run_key = self._first_run_key() or run_key or uuid.uuid4().hex
        state = self._read_state()
        self.acknowledged = state.acknowledged
        self.run = state.run
        self.models = state.models

    @property
    def end(self) -> int:
        """Bytes of all records, those that wait for the disk included."""
        return self._lines.end

    def written(self, address: str) -> str:
        """An address as the spool has it, which is copied and moved with its run."""
        return relative(address, base=str(self._folder), within=str(self._folder.parent))

    def read_address(self, address: str) -> str:
        """Inverse of `written`, where the spool lies now."""
        return resolve(address, base=str(self._folder))

    def append(self, row: dict[str, Any]) -> int:
        line = json.dumps(row).encode()
        require(len(line), "json_bytes", f"a record for {self.path} has")  # else it is never read
        return self._lines.append(line + b"\n")

    def flush(self) -> None:
        self._lines.flush()

    def read(self, limit: int) -> list[tuple[dict[str, Any], int]]:
        """Return up to `limit` rows that are not acknowledged, each with its end offset."""
        with self.path.open("rb") as file:
            file.seek(self.acknowledged)
            return [(_row(line), file.tell()) for line in islice(_lines(file), limit)]

    def last_value(self, name: str, until: int | None) -> float | None:
        quoted = json.dumps(name).encode()
        found = None
        with self.path.open("rb") as file:
            for line in _lines(file):
                if quoted in line:
                    row = _row(line)
                    if until is None or row.get("step", 0) <= until:
                        found = row.get("values", {}).get(name, found)
        return found

    def recorded(self, records: set[tuple[int, int]]) -> set[tuple[int, int]]:
        rows = read_rows(self.path, "metrics")
        return {found for row in rows if (found := (row["step"], row["timestamp_ms"])) in records}

    def evaluations(self) -> set[str]:
        """Keys of all evaluations."""
        return {row["record"]["eval_key"] for row in read_rows(self.path, "evaluation")}

    def _read_state(self) -> _State:
        """What the server has; nothing if a machine that went down has left a state beyond reason.

        All lines are then shipped once more, which leaves no trace.
        """
        try:
            with self._state.open("rb") as file:
                state = _STATE.validate_python(read_object(file, self._state))
        except (FileNotFoundError, ValueError):
            return _State()
        return state if state.acknowledged <= self.end else _State()

    def acknowledge(self, end: int) -> None:
        state = {"acknowledged": end, "run": self.run, "models": self.models}
        draft = self._state.with_suffix(".tmp")
        draft.write_text(json.dumps(state))
        draft.replace(self._state)
        self.acknowledged = end

    def _first_run_key(self) -> str | None:
        with self.path.open("rb") as file:
            keys = (_row(line).get("run_key") for line in _lines(file))
            return next((str(key) for key in keys if key), None)

    def _name_damage(self) -> None:
        """Say how many lines are passed over, so that nobody looks for their records in vain."""
        with self.path.open("rb") as file:
            lines = enumerate(_lines(file), 1)
            damaged = [number for number, line in lines if _row(line) is _DAMAGED]
        if damaged:
            logger.warning(
                "%s: %d damaged lines are not recorded, first line %d",
                self.path,
                len(damaged),
                damaged[0],
            )
