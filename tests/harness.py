"""Run a function in several gloo processes and bring results or tracebacks back to the test.

The processes are forked from a server that has imported what they need, which takes longer than
most of what they do. They inherit modules and nothing else: environment, random numbers and working
folder are those of a process that was started for the test.
"""

import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import torch
import torch.distributed as dist

# Python ignores here what cannot be imported; tests/test_harness.py looks what ranks find.
PRELOADED = ("pytest", "hypothesis", "ray.train", "deepspeed.ops", "torch._dynamo",
             "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject", "mlflow",
             "pipeline.pretrain", "tests.pipeline.small_runs")  # fmt: skip
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


def run_command(
    module: str, *words: str, stdout: str = "", timeout: float = 200.0, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """`python -m module words` with these variables besides those of this process, but forked.

    For modules whose `main` takes the words. It takes the place of `subprocess.run`, which pays
    for the imports anew, where the test asks nothing of the interpreter itself. With `stdout` the
    output goes to that file and is not in the answer.

    Raises:
        subprocess.TimeoutExpired: The command did not end within `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        outputs = [stdout or f"{directory}/stdout", f"{directory}/stderr"]
        process: Any = forking_context().Process(
            target=_command_main, args=(module, words, {**os.environ, **environment}, outputs)
        )
        process.start()
        process.join(timeout)
        try:
            if process.exitcode is None:
                raise subprocess.TimeoutExpired([module, *words], timeout)
        finally:
            process.kill()
            process.join()
        texts = ["" if output == stdout else Path(output).read_text() for output in outputs]
        return subprocess.CompletedProcess([module, *words], process.exitcode, *texts)


def run_module(module: str, *words: str, timeout: float, **environment: str) -> str:
    """Output of `python -m module words` as a person runs it, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _command_main(
    module: str, words: tuple[str, ...], environment: Mapping[str, str], outputs: list[str]
) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    with contextlib.ExitStack() as files:
        for number, output in enumerate(outputs, start=1):
            os.dup2(files.enter_context(open(output, "wb")).fileno(), number)
    fsspec.config.set_conf_env(fsspec.config.conf)  # read when the server imported it
    sys.argv = [module, *words]
    code = importlib.import_module(module).main(words)
    sys.stdout.flush()  # an interpreter that cannot do so at its end fails, too
    sys.exit(code)


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

    With `fresh` every rank but the first is an interpreter of its own: slow, and no two of them
    iterate over a set of strings in the same order.

    Raises:
        RankError: A rank raised, died, or the timeout (seconds) passed.
    """
    contexts: list[Any] = [forking_context()] * world_size
    if fresh:
        contexts[1:] = [multiprocessing.get_context("spawn")] * (world_size - 1)
    with tempfile.TemporaryDirectory() as directory:
        ranks = []
        for rank, context in enumerate(contexts):
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
        gc.freeze()  # the modules are never garbage, and garbage is collected often
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
