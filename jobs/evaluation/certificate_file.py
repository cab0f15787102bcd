"""certificate.json: what a third party needs to check it (docs/explanation/certificate.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from data_shards.format.shard_index import ShardIndex
from data_shards.untrusted.json_input import canonical_json
from model.artifact.artifact import ArtifactInfo, head_rule
from model.artifact.package_version import release
from model.certification.matrix_bounds import MatrixBound
from model.certify import SLACK_OF_RADII
from model.networks.base import LipschitzBound
from pipeline.run.evaluation_summary import ColumnScores

SCHEMA = "certified-radius/2"
PERTURBATION = "exact real norm, any real vector"


def certificate(
    *,
    info: ArtifactInfo,
    index: ShardIndex,
    split: str,
    eps: Sequence[str],
    matrices: Sequence[MatrixBound],
    bound: LipschitzBound,
    largest_factor: float,
    observed_lipschitz: float,
    columns: Mapping[str, ColumnScores],
    samples: int,
    samples_sha256: str,
) -> dict[str, Any]:
    """Return the body of certificate.json with its digest; section 7 names every field."""
    body = {
        "schema": SCHEMA,
        "norm": info.norm,
        "pixel_unit": info.pixel_unit,
        "perturbation": PERTURBATION,
        "native_shape": info.native_input_shape,
        "network_shape": info.network_input_shape,
        "model": {
            "digest": info.digest,
            "weights_sha256": info.weights_sha256,
            "weight_dtype": "float32",
            "network": TypeAdapter(type(info.network)).dump_python(info.network, mode="json"),
        },
        "shards": {
            "name": index.header.name,
            "index_digest": index.digest,
            "split": split,
            "samples": samples,
        },
        "eps": list(eps),
        "slack": SLACK_OF_RADII,
        "layers": [asdict(matrix) for matrix in matrices],
        "parts": dict(bound.parts),
        "network_bound": bound.value,
        "head": {"kind": head_rule(info.network), "largest_factor": largest_factor},
        "observed_lipschitz": observed_lipschitz,
        "columns": {name: column_body(scores) for name, scores in columns.items()},
        "samples_sha256": samples_sha256,
        "code_version": release(),
    }
    return {**body, "digest": hashlib.sha256(canonical_json(body)).hexdigest()}


def to_json(body: Mapping[str, Any]) -> bytes:
    """Return the bytes of certificate.json."""
    return json.dumps(body, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def column_body(scores: ColumnScores) -> dict[str, Any]:
    """What certificate.json says of one column."""
    fields = asdict(scores)
    del fields["curve"]  # drawn from samples.parquet
    return fields
