"""The one place where training reaches the evaluation: by name, at run time."""

import concurrent.futures
import importlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.run.summary import EvaluationSummary
from pipeline.tracking.client import EvaluationRecord

ENTRY = "jobs.evaluate_cra:evaluate"


def resolve(entry: str) -> Callable[..., EvaluationSummary]:
    """Function named by `module:function`."""
    module, function = entry.split(":")
    resolved: Callable[..., EvaluationSummary] = getattr(importlib.import_module(module), function)
    return resolved


class Evaluations:
    """Certifies kept checkpoints one after another, on a thread of the driver.

    The work itself happens in the tasks that the evaluation starts; the thread only waits.

    Args:
        settings: fields of the evaluation's configuration that all checkpoints share.
        log: receives the record of every evaluation.
        beside_training: False holds the evaluations back until `results`, because without Ray they
            would run inside the training process and change its threads and precision.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        log: Callable[[EvaluationRecord], object],
        *,
        beside_training: bool,
    ) -> None:
        self._settings = dict(settings)
        self._log = log
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._submitted: list[tuple[int, concurrent.futures.Future[EvaluationSummary]]] = []
        self._released = threading.Event()
        if beside_training:
            self._released.set()

    def submit(self, artifact_url: str, step: int) -> None:
        """Queue the evaluation of one artefact; returns at once."""
        self._submitted.append((step, self._pool.submit(self._evaluate, artifact_url, step)))

    def _evaluate(self, artifact_url: str, step: int) -> EvaluationSummary:
        self._released.wait()
        settings = {**self._settings, "artifact": artifact_url}
        return resolve(ENTRY)(settings, step=step, log=self._log)

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
        """Wait for all evaluations; their summaries in the order of submission.

        Raises:
            Exception: the first evaluation that failed, after all others have ended.
        """
        self._released.set()
        self._pool.shutdown(wait=True)
        return [future.result() for _, future in self._submitted]

    def cancel(self) -> None:
        """Drop what has not begun, wait for what has."""
        for _, future in self._submitted:
            future.cancel()
        self._released.set()
        self._pool.shutdown(wait=True)
