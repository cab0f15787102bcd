"""A finished evaluation, read back: its certificate and samples say what it found, by digest.

`summary.json` is a convenience beside them. No number of it is used that they contradict; what
neither of them holds (where the files lie, the step, accuracy under attack) cannot be derived.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.storage.store import Store
from data_shards.untrusted.json_input import canonical_json, parse_object
from data_shards.untrusted.parquet import read_table, require_rows
from jobs.errors import EvaluationError
from jobs.evaluation.certificate_file import column_body
from jobs.evaluation.sample_records import (
    COLUMNS,
    ColumnRecords,
    confusions,
    per_class_scores,
    scores,
)
from jobs.evaluation.suites import ATTACK_SUITES
from model.artifact.artifact import ArtifactInfo
from model.certification.matrix_bounds import MatrixBound
from model.empirical_lipschitz import refute
from model.networks.base import CertifiedNetwork
from pipeline.run.evaluation_summary import MOST_CONFUSIONS, EvaluationSummary, LayerRow
from pipeline.run.layout import CERTIFICATE, SAMPLES, SUMMARY


@dataclass(frozen=True)
class StoredResult:
    """Summary, certificate and samples of one evaluation, which agree.

    Attributes:
        summary: every number of it that the others hold was derived from them.
        body: the content of certificate.json.
        keys: (shard, sample key) in stored order.
        label: true classes.
        sound: what is proved of every sample, column `sound`.
    """

    summary: EvaluationSummary
    body: Mapping[str, Any]
    keys: tuple[tuple[str, str], ...]
    label: np.ndarray
    sound: ColumnRecords

    @property
    def radius(self) -> np.ndarray:
        """Sound certified radius of every sample; -1 where the prediction is wrong."""
        return np.where(self.sound.prediction == self.label, self.sound.radius, -1.0)


def read_result(out: Store) -> StoredResult:
    """The finished evaluation at a URL.

    Raises:
        EvaluationError: a file is missing or damaged, or one contradicts another.
    """
    try:
        data = evaluation_files(out)
        body = certificate_body(data[CERTIFICATE])
        summary = EvaluationSummary.from_json(data[SUMMARY]).found_at(out.url)
        if body["samples_sha256"] != hashlib.sha256(data[SAMPLES]).hexdigest():
            raise EvaluationError(f"{SAMPLES} is not the one of {CERTIFICATE}")
        table = read_table(data[SAMPLES], SAMPLES)
        result = _derived(summary, body, table)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise EvaluationError(f"no finished evaluation at {out}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException) as error:
        raise EvaluationError(f"the evaluation at {out} cannot be used: {error}") from error
    return result


def evaluation_files(folder: Store) -> dict[str, bytes]:
    """The files of an evaluation by name, none of them larger than it may be.

    Raises:
        FileNotFoundError: one is missing.
        ValueError, KeyError, TypeError: too large, or no certificate at all.
    """
    files = {name: folder.read(name, limit="json_bytes") for name in (CERTIFICATE, SUMMARY)}
    rows = parse_object(files[CERTIFICATE], CERTIFICATE)["shards"]["samples"]
    require_rows(folder.size(SAMPLES), rows, f"{folder}/{SAMPLES}")
    return {**files, SAMPLES: folder.read(SAMPLES, limit="table_bytes")}


def certificate_body(data: bytes) -> dict[str, Any]:
    """Content of certificate.json, after checking its own digest.

    Raises:
        EvaluationError: another digest.
        ValueError, KeyError, TypeError, AttributeError: no certificate at all.
    """
    body = parse_object(data, CERTIFICATE)
    content = {key: value for key, value in body.items() if key != "digest"}
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    if body["digest"] != digest:
        raise EvaluationError(
            f"the digest in {CERTIFICATE} is {body['digest']}, but {CERTIFICATE} has {digest}"
        )
    return body


def contradiction(summary: EvaluationSummary, body: Mapping[str, Any]) -> str | None:
    """In what a summary contradicts its certificate, if it does; needs no samples.

    Curves and scores by class are held against the certified shares, of which they are parts.

    Args:
        summary: the summary.
        body: content of certificate.json, see `certificate_body`.
    """
    count = body["shards"]["samples"]
    stated = {
        "certificate_digest": body["digest"],
        "norm": body["norm"],
        "artifact_digest": body["model"]["digest"],
        "family": body["model"]["network"]["kind"],
        "dataset": f"{body['shards']['name']}-{body['shards']['split']}",
        "index_digest": body["shards"]["index_digest"],
        "split": body["shards"]["split"],
        "samples": count,
        "network_bound": body["network_bound"],
        "observed_lipschitz": body["observed_lipschitz"],
        "layers": tuple(LayerRow(m["name"], m["upper"], m["lower"]) for m in body["layers"]),
    }
    for name, value in stated.items():
        if getattr(summary, name) != value:
            return f"{name} of {SUMMARY} is not the one of {CERTIFICATE}"
    if list(summary.columns) != list(COLUMNS) or set(body["columns"]) != set(COLUMNS):
        return f"{SUMMARY} and {CERTIFICATE} have other columns than {', '.join(COLUMNS)}"
    for name, column in summary.columns.items():
        if column_body(column) != body["columns"][name]:
            return f"column {name} of {SUMMARY} is not the one of {CERTIFICATE}"
        shares = [share for _, share in column.curve]
        if shares != sorted(shares, reverse=True) or max(shares) > column.clean:
            return f"the curve of column {name} of {SUMMARY} is not one of its radii"
    sound = summary.columns["sound"]
    for name, share in {"clean": sound.clean, **sound.cra}.items():
        parts = math.fsum(row[name] * row["samples"] for row in summary.per_class)
        if not math.isclose(parts, share * count, rel_tol=1e-9, abs_tol=1e-9):
            return f"{name} by class in {SUMMARY} does not sum up to that of {CERTIFICATE}"
    return _of_classes(summary, body) or _of_attack(summary)


def _of_classes(summary: EvaluationSummary, body: Mapping[str, Any]) -> str | None:
    """Names and confusions, as far as they can be held against the certificate."""
    classes, names = body["model"]["network"]["num_classes"], summary.class_names
    if names and len(names) != classes:
        return f"{SUMMARY} names {len(names)} classes of {classes}"
    wrong = round((1 - summary.columns["sound"].clean) * summary.samples)
    pairs = summary.confusions
    confused = sum(count for _, _, count in pairs)
    outside = any(not 0 <= label < classes for pair in pairs for label in pair[:2])
    if outside or confused > wrong or (len(pairs) < MOST_CONFUSIONS and confused != wrong):
        return f"the confusions of {SUMMARY} are not those of {CERTIFICATE}"
    return None


def _of_attack(summary: EvaluationSummary) -> str | None:
    """What is known of an accuracy under attack: no more than that it lies between two others."""
    attack = summary.attack
    if attack is None:
        return None
    suite = ATTACK_SUITES.get(attack.suite)
    if suite is None or (attack.samples, attack.inside_radius_flips) != (summary.samples, 0):
        return f"the attack of {SUMMARY} is none of these samples"
    for ratio, certified in summary.columns["sound"].cra.items():
        if not certified <= attack.accuracy.get(ratio, -1.0) <= 1:
            return f"accuracy under attack at {ratio} in {SUMMARY} lies below the certified one"
    return None


def _derived(summary: EvaluationSummary, body: Mapping[str, Any], table: pa.Table) -> StoredResult:
    """Derive every number again that the samples hold."""
    if reason := contradiction(summary, body):
        raise EvaluationError(reason)
    if len(table) != summary.samples:
        raise EvaluationError(f"{SAMPLES} has {len(table)} rows for {summary.samples} samples")
    label = table["label"].to_numpy()
    records = {name: _records(table, name, body["columns"][name]) for name in COLUMNS}
    columns = {
        name: scores(
            records[name],
            label,
            body["eps"],
            program=body["columns"][name]["program"],
            lipschitz=1.0 if name == "nominal" else body["network_bound"],
            unit_roundoff=body["columns"][name]["unit_roundoff"],
            norm=body["norm"],
        )
        for name in COLUMNS
    }
    classes = body["model"]["network"]["num_classes"]
    again = dataclasses.replace(
        summary,
        samples=len(label),
        columns=columns,
        per_class=per_class_scores(records["sound"], label, body["eps"], classes),
        confusions=confusions(records["sound"], label),
    )
    for field in dataclasses.fields(again):
        if getattr(again, field.name) != getattr(summary, field.name):
            raise EvaluationError(f"{field.name} of {SUMMARY} does not follow from {SAMPLES}")
    keys = tuple(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))
    return StoredResult(summary, body, keys, label, records["sound"])


def _records(table: pa.Table, name: str, stated: Mapping[str, Any]) -> ColumnRecords:
    """One column of the samples; errors are known by their largest alone."""
    stored = ("prediction", "rival", "margin", "radius")
    values = {field: table[f"{name}_{field}"].to_numpy() for field in stored}
    largest = {
        field: math.inf if stated[f"largest_{field}"] is None else stated[f"largest_{field}"]
        for field in ("error", "error_ball")
    }
    count = len(table)
    return ColumnRecords(
        **values, **{field: np.full(count, value) for field, value in largest.items()}
    )


def require_bound(result: StoredResult, info: ArtifactInfo, network: CertifiedNetwork) -> None:
    """The stored constant is what the artifact's network makes of the stored bounds.

    Args:
        result: the evaluation.
        info: the artifact's description.
        network: on the meta device, with its stored statistics.

    Raises:
        EvaluationError: it is not, or the certificate is of another artifact.
        ModelError: an observation refutes it.
    """
    body = result.body
    if body["model"]["weights_sha256"] != info.weights_sha256:
        raise EvaluationError(f"{CERTIFICATE} is of other weights")
    names = [field.name for field in dataclasses.fields(MatrixBound)]
    matrices = [MatrixBound(**{name: row[name] for name in names}) for row in body["layers"]]
    if [matrix.name for matrix in matrices] != list(network.bounded_matrices):
        raise EvaluationError(f"the layers of {CERTIFICATE} are not those of the network")
    bound = network.lipschitz_upper_bound({matrix.name: matrix for matrix in matrices})
    if (bound.value, dict(bound.parts)) != (body["network_bound"], body["parts"]):
        raise EvaluationError(f"network_bound of {CERTIFICATE} does not follow from its layers")
    refute(bound, body["observed_lipschitz"])
