"""Per-sample records of an evaluation, their merge and their scores: pure functions."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import EvaluationError
from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import MOST_CONFUSIONS, ColumnScores

COLUMNS = ("nominal", "sound", "deployed")
CURVE_EPS = {
    "l2": tuple(i / 100 for i in range(151)),
    "linf": tuple(i / 510 for i in range(256)),
}
"""Grid of the curves by norm, in pixels of [0, 1]; half a grey level apart in l-infinity."""
_STORED = ("prediction", "rival", "margin", "radius")


@dataclass(frozen=True)
class ColumnRecords:
    """Certificates of one column, one row per sample.

    Attributes:
        prediction: predicted classes, int64.
        rival: the class that limits the radius, int64.
        margin: logit of the prediction minus logit of the rival, float64.
        radius: certified radius of the prediction, whether it is right or not, float64.
        error: error of a margin at the sample that was subtracted, float64.
        error_ball: largest error of a margin on the ball that was subtracted, float64.
    """

    prediction: np.ndarray
    rival: np.ndarray
    margin: np.ndarray
    radius: np.ndarray
    error: np.ndarray
    error_ball: np.ndarray


@dataclass(frozen=True)
class ShardRecords:
    """What one task found in one shard, one row per sample in index order.

    Attributes:
        shard: name of the shard.
        key: sample keys.
        pixels_sha256: digests of the decoded images.
        label: true classes.
        columns: certificates by column.
        observed_lipschitz: largest constant that a gradient showed, see model.empirical_lipschitz.
        largest_factor: largest proved margin factor of the head.
    """

    shard: str
    key: tuple[str, ...]
    pixels_sha256: tuple[str, ...]
    label: np.ndarray
    columns: Mapping[str, ColumnRecords]
    observed_lipschitz: float
    largest_factor: float


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


def column_of(parts: Sequence[ShardRecords], name: str) -> ColumnRecords:
    """Return one column of all merged parts."""
    fields = ColumnRecords.__dataclass_fields__
    columns = [part.columns[name] for part in parts]
    return ColumnRecords(**{f: np.concatenate([getattr(c, f) for c in columns]) for f in fields})


def labels_of(parts: Sequence[ShardRecords]) -> np.ndarray:
    """Return the labels of all merged parts."""
    return np.concatenate([part.label for part in parts])


def scores(
    column: ColumnRecords,
    label: np.ndarray,
    eps: Sequence[str],
    *,
    program: str,
    lipschitz: float,
    unit_roundoff: float,
    norm: str = "l2",
) -> ColumnScores:
    """Return the summary of one column.

    A sample counts at eps when its prediction is right and its certified radius exceeds eps.

    Args:
        column: records of all samples.
        label: true classes.
        eps: ratios such as ``36/255``.
        program: see ColumnScores.
        lipschitz: see ColumnScores.
        unit_roundoff: see ColumnScores.
        norm: norm of the radii; says where the curve is sampled.
    """
    correct = label == column.prediction
    certified = np.where(correct, column.radius, 0.0)
    counts = {ratio: int(np.sum(certified > eps_value(ratio))) for ratio in eps}
    has_margin = column.margin > 0
    return ColumnScores(
        program=program,
        lipschitz=lipschitz,
        unit_roundoff=unit_roundoff,
        clean=float(np.mean(correct)),
        certified=counts,
        cra={ratio: count / label.size for ratio, count in counts.items()},
        mean_radius=math.fsum(certified.tolist()) / label.size,
        vacuous=bool(has_margin.any() and not (column.radius[has_margin] > 0).any()),
        largest_error=_finite(column.error.max()),
        largest_error_ball=_finite(column.error_ball.max()),
        curve=tuple((at, float(np.mean(certified > at))) for at in CURVE_EPS[norm]),
    )


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None


def per_class_scores(
    column: ColumnRecords, label: np.ndarray, eps: Sequence[str], num_classes: int
) -> tuple[dict[str, float], ...]:
    """Return clean and certified accuracy by true class; a class without samples is left out."""
    correct = label == column.prediction
    certified = np.where(correct, column.radius, 0.0)
    # Those that occur: a certificate may state any number of classes.
    found = [int(index) for index in np.unique(label) if 0 <= index < num_classes]
    classes = [(index, np.flatnonzero(label == index)) for index in found]
    return tuple(
        {
            "label": index,
            "samples": int(rows.size),
            "clean": float(np.mean(correct[rows])),
            **{ratio: float(np.mean(certified[rows] > eps_value(ratio))) for ratio in eps},
        }
        for index, rows in classes
    )


def confusions(column: ColumnRecords, label: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Return (label, prediction, samples) of wrong predictions, the most frequent first."""
    wrong = label != column.prediction
    pairs = np.stack([label[wrong], column.prediction[wrong]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    rows = np.column_stack([found, counts])[order].tolist()
    return tuple((int(true), int(said), int(count)) for true, said, count in rows)


def samples_parquet(parts: Sequence[ShardRecords]) -> bytes:
    """Return the bytes of ``samples.parquet`` (docs/explanation/certificate.md, section 7)."""
    table: dict[str, Any] = {
        "shard": [part.shard for part in parts for _ in part.key],
        "key": [key for part in parts for key in part.key],
        "pixels_sha256": [digest for part in parts for digest in part.pixels_sha256],
        "label": labels_of(parts),
    }
    for name in parts[0].columns:
        column = column_of(parts, name)
        table |= {f"{name}_{field}": getattr(column, field) for field in _STORED}
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    return buffer.getvalue()
