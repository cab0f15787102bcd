"""What a report says of single classes, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.run.evaluation_summary import EvaluationSummary

_MOST_ROWS = 20
_MOST_COLUMNS = 12
_PAIRS = 10


class ClassRow(NamedTuple):
    """Proved shares of the samples of one class."""

    name: str
    samples: int
    shares: tuple[float, ...]
    """Clean accuracy, then cra_sound at each radius."""


class ConfusionRow(NamedTuple):
    """How often the samples of one class are taken for each class."""

    name: str
    counts: tuple[int, ...]
    right: int
    """Place of the class itself among the counts."""


def worst_classes(summary: EvaluationSummary, eps: Sequence[str]) -> list[ClassRow]:
    """All classes in their order; of more than 20 those with the least at the first radius."""
    rows = sorted(summary.per_class, key=lambda row: row.get(eps[0], row["clean"]))
    rows = sorted(rows[:_MOST_ROWS], key=lambda row: row["label"])
    return [
        ClassRow(
            summary.class_name(int(row["label"])),
            int(row["samples"]),
            tuple(row[name] for name in ("clean", *eps) if name in row),
        )
        for row in rows
    ]


def confusion_table(summary: EvaluationSummary) -> list[ConfusionRow]:
    """The table of labels and predictions; empty for more than 12 classes."""
    labels = {int(row["label"]) for row in summary.per_class}
    classes = sorted(labels | {said for _, said, _ in summary.confusions})
    if len(classes) > _MOST_COLUMNS:
        return []
    wrong = {(label, said): count for label, said, count in summary.confusions}
    samples = {int(row["label"]): int(row["samples"]) for row in summary.per_class}
    rows = []
    for place, label in enumerate(classes):
        counts = [wrong.get((label, said), 0) for said in classes]
        counts[place] = samples.get(label, 0) - sum(counts)
        rows.append(ConfusionRow(summary.class_name(label), tuple(counts), place))
    return rows


def frequent_confusions(summary: EvaluationSummary) -> list[tuple[str, str, int]]:
    """The most frequent wrong predictions: name of the label, of the prediction, samples."""
    return [
        (summary.class_name(label), summary.class_name(said), count)
        for label, said, count in summary.confusions[:_PAIRS]
    ]
