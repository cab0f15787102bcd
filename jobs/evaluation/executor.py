"""Tasks and jobs on Ray, or tasks in this process: where the jobs meet Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.run.ray_session import ray_session

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskLostError(RuntimeError):
    """A task's worker died more often than the retries allow."""


def map_inline(
    fn: Callable[[Item], Result],
    items: Sequence[Item],
    on_done: Callable[[Result], object] | None = None,
) -> list[Result]:
    """Apply `fn` to every item in this process (Ray is not imported)."""
    results = []
    for item in items:
        results.append(fn(item))
        if on_done:
            on_done(results[-1])
    return results


def map_shards(
    fn: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    max_in_flight: int,
    max_retries: int = 2,
    num_gpus: float = 0.0,
    placement: Mapping[str, str] | None = None,
    on_done: Callable[[Result], object] | None = None,
) -> list[Result]:
    """Apply `fn` to every item as Ray tasks of one CPU each.

    Takes the Ray of the session around it, else joins or starts one for the duration of the call.

    After an error no task is cancelled: those under way end with the session, or by themselves.
    Ray kills the worker of a cancelled task even if that task has ended and the worker runs another
    one by then, which is charged with the loss (seen with Ray 2.60).

    Args:
        fn: importable function (a function of ``__main__`` would be sent by value).
        items: one task each.
        max_in_flight: tasks under way at the same time.
        max_retries: how often a task is started again after its worker died.
        num_gpus: GPUs, or a fraction of one, per task.
        placement: labels of the nodes that may run the tasks, as Ray writes label selectors.
        on_done: called in this thread with the result of every task that has ended.

    Returns:
        The results in the order of the items.

    Raises:
        TaskLostError: a worker died too often.
        Exception: the first exception raised by `fn`, with its own type.
    """
    with ray_session() as ray:
        # A process that Ray keeps for the next task would keep its context and cached blocks on the
        # GPU, while Ray gives the GPU to others.
        task = ray.remote(max_calls=1 if num_gpus else 0)(fn).options(
            num_cpus=1,
            num_gpus=num_gpus,
            max_retries=max_retries,
            label_selector=dict(placement or {}),
            name=fn.__name__,
        )
        results: list[Any] = [None] * len(items)
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < max_in_flight:
                index, item = waiting.pop()
                running[task.remote(item)] = index
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            results[index] = _result(ray, done, index, max_retries)
            if on_done:
                on_done(results[index])
    return results


def _result(ray: Any, reference: Any, index: int, max_retries: int) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise TaskLostError(
            f"task {index} lost its worker {max_retries + 1} times: {type(error).__name__}"
        ) from None


def job_client(address: str) -> Any:
    """Client of the job service of a Ray cluster.

    Args:
        address: http(s) address of its dashboard.

    Raises:
        ConnectionError: nobody answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)
