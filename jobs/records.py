"""Per-sample records of an evaluation, their merge and their summary: pure functions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.config import eps_value

CURVE_EPS = tuple(i / 100 for i in range(151))
_NUMBERS = ("label", "prediction", "rival", "margin", "radius")


class EvaluationError(ValueError):
    """An input of the evaluation is wrong; the message is all the user needs."""


@dataclass(frozen=True)
class ShardRecords:
    """What one task found in one shard, one row per sample in index order.

    Attributes:
        shard: name of the shard.
        key: sample keys.
        label: true classes.
        prediction: predicted classes.
        rival: the class that limits the radius.
        margin: logit of the prediction minus logit of the rival.
        radius: certified l2 radius of the prediction, whether it is right or not.
    """

    shard: str
    key: tuple[str, ...]
    label: np.ndarray
    prediction: np.ndarray
    rival: np.ndarray
    margin: np.ndarray
    radius: np.ndarray


@dataclass(frozen=True)
class EvaluationSummary:
    """The result of an evaluation; the same for every number of tasks.

    Attributes:
        column: certificate column: ``cra_nominal`` is the float32 program with layers taken as
            exactly orthogonal (L = 1) and no rounding term.
        cra: certified robust accuracy by eps ratio.
        curve: (eps, certified robust accuracy) over a grid.
        mean_radius: average certified radius; a wrong prediction counts as 0.
        per_class: clean and certified accuracy by true class.
        orthogonality_residual: the artefact's largest ``‖XᵀX - I‖``.
        lipschitz_upper_bound: the artefact's proved bound (not used by ``cra_nominal``).
    """

    column: str
    norm: str
    eval_key: str
    artifact_url: str
    artifact_digest: str
    shards_url: str
    dataset: str
    index_digest: str
    split: str
    out_url: str
    step: int
    samples: int
    clean: float
    cra: dict[str, float]
    mean_radius: float
    curve: tuple[tuple[float, float], ...]
    per_class: tuple[dict[str, float], ...]
    orthogonality_residual: float
    lipschitz_upper_bound: float

    def metric_name(self, ratio: str) -> str:
        """Return the metric of an eps ratio: ``cra_nominal/l2/36_255``."""
        return f"{self.column}/{self.norm}/{ratio.replace('/', '_')}"

    def metrics(self) -> dict[str, float]:
        """Return the scalars by metric name."""
        cra = {self.metric_name(ratio): value for ratio, value in self.cra.items()}
        return {"clean": self.clean, **cra, "mean_radius": self.mean_radius}

    def to_json(self) -> bytes:
        """Return the bytes of ``summary.json``."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> EvaluationSummary:
        """Read the bytes of ``summary.json``."""
        fields = json.loads(data)
        fields["curve"] = tuple((eps, value) for eps, value in fields["curve"])
        fields["per_class"] = tuple(fields["per_class"])
        return cls(**fields)


def merge(
    parts: Sequence[ShardRecords], expected: Mapping[str, Sequence[str]]
) -> list[ShardRecords]:
    """Return the parts in index order after checking that every sample is there exactly once.

    Args:
        parts: records in any order.
        expected: sample keys by shard name, both in index order.

    Raises:
        EvaluationError: a missing, double or unknown shard, or other samples than expected.
    """
    by_shard: dict[str, ShardRecords] = {}
    for part in parts:
        if part.shard in by_shard:
            raise EvaluationError(f"shard {part.shard} was evaluated twice")
        by_shard[part.shard] = part
    for shard, keys in expected.items():
        if shard not in by_shard:
            raise EvaluationError(f"shard {shard} was not evaluated")
        found = by_shard[shard].key
        if found != tuple(keys):
            raise EvaluationError(
                f"shard {shard}: {len(found)} samples ({len(set(found))} different) were "
                f"evaluated, but the index lists {len(keys)} others or in another order"
            )
    if unknown := by_shard.keys() - expected.keys():
        raise EvaluationError(f"shards {sorted(unknown)} are not in the index")
    return [by_shard[shard] for shard in expected]


def scores(parts: Sequence[ShardRecords], eps: Sequence[str], num_classes: int) -> dict[str, Any]:
    """Return the numeric fields of `EvaluationSummary`.

    A sample counts at eps when its prediction is right and its certified radius exceeds eps.

    Args:
        parts: merged records.
        eps: ratios such as ``36/255``.
        num_classes: number of classes; a class without samples is left out of `per_class`.
    """
    label = np.concatenate([part.label for part in parts])
    correct = label == np.concatenate([part.prediction for part in parts])
    radius = np.concatenate([part.radius for part in parts])
    certified = np.where(correct, radius, 0.0)

    def table(rows: np.ndarray) -> dict[str, float]:
        return {ratio: float(np.mean(certified[rows] > eps_value(ratio))) for ratio in eps}

    classes = [(index, np.flatnonzero(label == index)) for index in range(num_classes)]
    return {
        "samples": int(label.size),
        "clean": float(np.mean(correct)),
        "cra": table(np.arange(label.size)),
        "mean_radius": float(np.mean(certified)),
        "curve": tuple((at, float(np.mean(certified > at))) for at in CURVE_EPS),
        "per_class": tuple(
            {
                "label": index,
                "samples": int(rows.size),
                "clean": float(np.mean(correct[rows])),
                **table(rows),
            }
            for index, rows in classes
            if rows.size
        ),
    }


def samples_parquet(parts: Sequence[ShardRecords]) -> bytes:
    """Return the bytes of ``samples.parquet``: shard, key, label, prediction, rival, ..."""
    columns = {
        "shard": [part.shard for part in parts for _ in part.key],
        "key": [key for part in parts for key in part.key],
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _NUMBERS},
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()
