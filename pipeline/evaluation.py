"""The one place where training reaches the evaluation: by name, at run time."""

import concurrent.futures
import importlib
from collections.abc import Callable, Mapping
from typing import Any

ENTRY = "jobs.evaluate_cra:evaluate"


def resolve(entry: str) -> Callable[..., Any]:
    """Function named by `module:function`."""
    module, function = entry.split(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return resolved


class Evaluations:
    """Certifies kept checkpoints one after another beside training, on a thread of the driver.

    The work itself happens in the tasks that the evaluation starts; the thread only waits.

    Args:
        settings: fields of the evaluation's configuration that all checkpoints share.
        log: receives the record of every evaluation.
    """

    def __init__(self, settings: Mapping[str, Any], log: Callable[[Any], object]) -> None:
        self._settings = dict(settings)
        self._log = log
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._pending: list[concurrent.futures.Future[Any]] = []

    def submit(self, artifact_url: str, step: int) -> None:
        """Queue the evaluation of one artefact; returns at once."""
        settings = {**self._settings, "artifact": artifact_url}
        self._pending.append(
            self._pool.submit(lambda: resolve(ENTRY)(settings, step=step, log=self._log))
        )

    @property
    def waiting(self) -> int:
        """Evaluations that are not finished."""
        return sum(not future.done() for future in self._pending)

    def results(self) -> list[Any]:
        """Wait for all evaluations; their summaries in the order of submission.

        Raises:
            Exception: the first evaluation that failed, after all others have ended.
        """
        self._pool.shutdown(wait=True)
        return [future.result() for future in self._pending]

    def cancel(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)
