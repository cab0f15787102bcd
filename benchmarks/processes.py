"""Ranks of a benchmark: processes of this machine, as torchrun would start them."""

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_END_S = 30


def in_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `work(*arguments)` in each of `ranks` processes; what they return, in order.

    Args:
        ranks: Processes. They find their numbers in the environment, for `join_world`.
        work: A function of a module, with picklable arguments and result.
        *arguments: Of every call.

    Raises:
        RuntimeError: A process ended without a result; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, answers = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        target = (environment, work, arguments, sender)
        processes.append(context.Process(target=_rank, args=target))
        processes[-1].start()
        sender.close()
        answers.append(receiver)
    try:
        return [receiver.recv() for receiver in answers]
    except EOFError:
        raise RuntimeError(f"a rank of {work.__name__} has died") from None
    finally:
        for process in processes:
            process.join(_END_S)
            process.kill()


def _rank(
    environment: dict[str, Any],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    answer: Connection,
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    # DeepSpeed on torch >= 2.12 calls collectives under their former names.
    warnings.filterwarnings("ignore", category=FutureWarning)
    answer.send(work(*arguments))
