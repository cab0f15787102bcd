"""What the finished tasks of an evaluation say so far: in the output's folder and to a caller."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_shards.storage.store import Store
from jobs.evaluation.sample_records import ShardRecords
from model.certification.eps import eps_value
from pipeline.run.layout import PROGRESS

_WRITE_EVERY_S = 5.0


@dataclass(frozen=True)
class EvaluationProgress:
    """An evaluation under way.

    Attributes:
        done: tasks that have ended.
        total: tasks of all kinds.
        samples: samples certified so far.
        clean: accuracy on them; None before the first shard.
        cra_sound: certified robust accuracy on them by eps ratio.
    """

    done: int
    total: int
    samples: int = 0
    clean: float | None = None
    cra_sound: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> str:
        """What the samples so far say; empty before the first shard."""
        if self.clean is None:
            return ""
        scores = "  ".join(f"{ratio} {value:.2%}" for ratio, value in self.cra_sound.items())
        return f"{self.samples} samples so far: clean {self.clean:.2%}, cra_sound {scores}"

    def __str__(self) -> str:
        return "; ".join(filter(None, (f"{self.done} of {self.total} tasks", self.scores)))


OnProgress = Callable[[EvaluationProgress], object]


class Counting:
    """Counts what tasks return, tells it to `on_progress` and writes it to the output's folder.

    Partial results are no result: they are removed when the summary is there.

    Args:
        out: folder of the evaluation.
        total: number of tasks.
        eps: ratios of the table.
        on_progress: called in the thread of `add`.
    """

    def __init__(
        self, out: Store, total: int, eps: Sequence[str], on_progress: OnProgress | None
    ) -> None:
        self._out = out
        self._total = total
        self._eps = eps
        self._on_progress = on_progress
        self._done = self._samples = self._correct = 0
        self._certified: Counter[str] = Counter()
        self._written = time.monotonic()

    def add(self, result: Any) -> None:
        """Count the result of one task."""
        self._done += 1
        if isinstance(result, ShardRecords):
            self._count(result)
        now = self.now()
        if self._on_progress:
            self._on_progress(now)
        if time.monotonic() - self._written >= _WRITE_EVERY_S:
            self._out.write(PROGRESS, json.dumps(asdict(now)).encode())
            self._written = time.monotonic()

    def now(self) -> EvaluationProgress:
        """Return the state of the evaluation."""
        if not self._samples:
            return EvaluationProgress(self._done, self._total)
        return EvaluationProgress(
            self._done,
            self._total,
            self._samples,
            self._correct / self._samples,
            {ratio: self._certified[ratio] / self._samples for ratio in self._eps},
        )

    def _count(self, records: ShardRecords) -> None:
        sound = records.columns["sound"]
        correct = sound.prediction == records.label
        self._samples += len(correct)
        self._correct += int(np.sum(correct))
        for ratio in self._eps:
            self._certified[ratio] += int(np.sum(correct & (sound.radius > eps_value(ratio))))
