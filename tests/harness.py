"""Run a function in several gloo processes and bring results or tracebacks back to the test.

The processes are forked from a server that has imported what they need, which takes longer than
most of what they do. They inherit modules and nothing else: environment, random numbers and working
folder are those of a process that was started for the test.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

# Python ignores here what cannot be imported; tests/test_harness.py looks what ranks find.
PRELOADED = ("pytest", "hypothesis", "ray.train", "deepspeed.ops", "mlflow", "pipeline.pretrain",
             "tests.pipeline.small_runs")  # fmt: skip
# Of the time before any test changed it. One thread: none may run when the server forks.
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def forking_context() -> SpawnContext | ForkServerContext:
    """Context of `multiprocessing` whose processes have the heavy libraries imported already.

    One server per test process; it ends with it. Where there is a GPU, processes are started anew:
    the libraries look for one, and CUDA does not survive a fork.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    return context


class RankError(AssertionError):
    """A rank failed, died or did not finish; carries the tracebacks of all that did."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    fresh: bool = False,
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` gloo processes.

    `fn` must be importable, its arguments and results picklable. One thread per rank; the process
    group is ready when `fn` is called. Returns the results in the order of the ranks.

    With `fresh` every rank is an interpreter of its own: slow, and no two of them iterate over a
    set of strings in the same order.

    Raises:
        RankError: A rank raised, died, or the timeout (seconds) passed.
    """
    context: Any = multiprocessing.get_context("spawn") if fresh else forking_context()
    with tempfile.TemporaryDirectory() as directory:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(
                    fn,
                    rank,
                    world_size,
                    f"{directory}/store",
                    timeout,
                    sender,
                    {**os.environ},
                    args,
                ),
                daemon=True,
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect(ranks, time.monotonic() + timeout)
        finally:
            for process, receiver in ranks:
                process.kill()
                process.join()
                receiver.close()


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = dict(enumerate(receiver for _, receiver in ranks))
    while waiting:
        # After a failure the others are stuck in a collective: give them a moment to report too.
        limit = min(deadline, time.monotonic() + 1.0) if failures else deadline
        ready = multiprocessing.connection.wait(
            list(waiting.values()), timeout=max(0.0, limit - time.monotonic())
        )
        if not ready:
            failures.append(f"no answer from ranks {sorted(waiting)}")
            break
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                ok, answer = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                ok, answer = False, "the process died without an answer"
            if ok:
                results[rank] = answer
            else:
                failures.append(f"rank {rank}:\n{answer}")
    if failures:
        raise RankError("\n\n".join(failures))
    for process, _ in ranks:
        process.join(timeout=10.0)
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    sender: Connection,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        # Nobody has seeded these in a new process, so no two ranks draw the same numbers.
        np.random.seed()  # noqa: NPY002 - it is the global generator that is inherited
        torch.seed()
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # Plain pickle: the pipe's own would pass tensors as handles that die with this process.
        answer = pickle.dumps((True, fn(rank, world_size, *args)))
        dist.barrier()
        sender.send_bytes(answer)
        code = 0
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    if code == 0:
        dist.destroy_process_group()
    # gloo's threads abort an interpreter that exits in the ordinary way (pytorch issue 190489).
    sys.stdout.flush()
    sys.stderr.flush()
    sender.close()
    os._exit(code)
