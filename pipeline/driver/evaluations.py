"""The one place where training reaches the evaluation: by name, at run time."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.tracking.client import EvaluationRecord

ENTRY = "jobs.evaluate_cra:evaluate"


@dataclasses.dataclass(frozen=True)
class Splits:
    """What kept checkpoints are certified on, and what the result of the run is.

    A test split that chooses among checkpoints is no test split: it is looked at once, at the end,
    for one checkpoint.

    Attributes:
        selection: split on which every kept checkpoint is certified; None: nothing is held out to
            choose by, so none is certified before the end.
        final: split on which the result is certified.
        best_at: radius (a ratio) at which the result is the checkpoint with the most cra_sound on
            `selection`; None: the result is the newest checkpoint.
    """

    selection: str | None
    final: str
    best_at: str | None = None


class Evaluations:
    """Certifies kept checkpoints one after another, on a thread of the driver.

    The work itself happens in the tasks that the evaluation starts; the thread only waits.

    Args:
        settings: fields of the evaluation's configuration that all checkpoints share.
        log: receives the record of every evaluation.
        splits: what they are certified on.
        beside_training: False holds the evaluations back until `results`, because without Ray they
            would run inside the training process and change its threads and precision.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        log: Callable[[EvaluationRecord], object],
        *,
        splits: Splits,
        beside_training: bool,
    ) -> None:
        self._settings = dict(settings)
        self._splits = splits
        self._kept: dict[int, str] = {}
        self._log = log
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._submitted: list[tuple[int, concurrent.futures.Future[EvaluationSummary]]] = []
        self._released = threading.Event()
        if beside_training:
            self._released.set()

    def submit(self, artifact_url: str, step: int) -> None:
        """Take note of a kept artifact and queue its evaluation; returns at once."""
        self._kept[step] = artifact_url
        if (split := self._splits.selection) is not None:
            future = self._pool.submit(self._evaluate, artifact_url, step, split)
            self._submitted.append((step, future))

    def _evaluate(self, artifact_url: str, step: int, split: str) -> EvaluationSummary:
        self._released.wait()
        settings = {**self._settings, "artifact": artifact_url, "split": split}
        evaluate: Callable[..., EvaluationSummary] = resolve_name(ENTRY)
        return evaluate(settings, step=step, log=self._log)

    @property
    def waiting(self) -> int:
        """Evaluations that are not finished."""
        return sum(not future.done() for _, future in self._submitted)

    def unfinished(self) -> set[int]:
        """Steps whose evaluations are under way beside training, or were dropped."""
        if not self._released.is_set():
            return set()
        return {step for step, f in self._submitted if not f.done() or f.cancelled()}

    def finished(self) -> list[EvaluationSummary]:
        """Summaries of the evaluations that have succeeded so far."""
        ended = [f for _, f in self._submitted if f.done()]
        done = [f for f in ended if not f.cancelled() and not f.exception()]
        return [future.result() for future in done]

    def results(self) -> list[EvaluationSummary]:
        """Wait for all evaluations, then certify the result on the final split.

        Returns:
            Their summaries in the order of submission; that of the result is the last.

        Raises:
            Exception: the first evaluation that failed, after all others have ended.
        """
        self._released.set()
        self._pool.shutdown(wait=True)
        found = [future.result() for _, future in self._submitted]
        if self._splits.final != self._splits.selection and self._kept:
            step = self._result(found)
            found.append(self._evaluate(self._kept[step], step, self._splits.final))
        return found

    def _result(self, found: Sequence[Any]) -> int:
        """Step of the checkpoint that the run results in."""
        radius = self._splits.best_at
        if radius is None or not found:
            return max(self._kept)
        best = max(found, key=lambda s: (s.columns["sound"].cra[radius], s.step))
        return int(best.step)

    def cancel(self) -> None:
        """Drop what has not begun, wait for what has."""
        for _, future in self._submitted:
            future.cancel()
        self._released.set()
        self._pool.shutdown(wait=True)
