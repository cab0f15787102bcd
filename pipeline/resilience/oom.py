"""Out of memory: a run starts again with less in memory and remembers what did not fit.

The first step is the probe: it needs what every later one needs. A rank that runs out of memory
writes the size of its micro-batch into the run's folder and ends; whoever starts the ranks again
starts them with all blocks recomputed in the backward pass, which changes no number, and then
with half of the micro-batch. So nothing is recomputed that fits. The global batch, its samples and
their order stay; of half a micro-batch the sums over it are rounded in another order, and centred
layers take their means over fewer samples, as they do on more ranks.
"""

import contextlib
import dataclasses
import gc
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter

from data_shards.storage.store import Store
from pipeline.config import TrainConfig
from pipeline.errors import PipelineError, RunFailedError
from pipeline.resilience.signals import Interruption
from pipeline.run import layout
from pipeline.run.lease import read_record_object, write_record
from pipeline.run.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

_SIZES = TypeAdapter(list[Annotated[int, Field(ge=1)]])
_TEXTS = (
    "can't allocate memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "triton error [cuda]: out of memory",
    # NCCL, at its first collective and whenever it needs a buffer.
    "cuda failure 2 ",
    "failed to cuda calloc",
    "failed to cuda host alloc",
    # A handle and its workspace are made at the first product of a thread.
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cusolver_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cufft_alloc_failed",
)
"""How allocators and libraries that have no type of their own say it, in small letters."""


class TooLargeError(RuntimeError):
    """A micro-batch does not fit into the memory of a rank; a smaller one is left to be tried."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error of an allocator, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(text in said for text in _TEXTS)


def too_large(run: Store) -> list[int]:
    """Samples per rank and backward pass that did not fit, in the order in which they were tried.

    Args:
        run: folder of the run.
    """
    try:
        found = read_record_object(run, layout.OUT_OF_MEMORY)
        return [] if found is None else _SIZES.validate_python(found.get("too_large"))
    except ValueError as error:  # what does not fit is found once more
        logger.warning("%s/%s is not used: %s", run, layout.OUT_OF_MEMORY, error)
        return []


def fitting(train: TrainConfig, sizes: Sequence[int], world_size: int) -> TrainConfig:
    """The loop with as many more backward passes per step as the memory asks for.

    Args:
        train: the loop as it was asked for, and `auto` decided.
        sizes: micro-batches that did not fit.
        world_size: number of ranks, which share the global batch.

    Returns:
        `train` with all blocks recomputed. If that was tried, with the smallest `accumulation`, at
        least its own, that divides a rank's share into micro-batches of at most half of the
        smallest of `sizes`.
    """
    if not sizes:
        return train
    # In the first attempt some blocks were kept, unless all are to be recomputed.
    tried = sizes if train.activation_checkpointing == "all" else sizes[1:]
    train = dataclasses.replace(train, activation_checkpointing="all")
    share = train.global_batch // world_size
    counts = range(train.accumulation, share + 1)
    # Samples of one rank decide, so what failed counts on any number of ranks.
    most = max(min(tried) // 2, 1) if tried else min(sizes)
    # Equal micro-batches only: their mean is the mean of the batch.
    fits = (n for n in counts if share % n == 0 and share // n <= most)
    return dataclasses.replace(train, accumulation=next(fits, train.accumulation))


@contextlib.contextmanager
def holding(what: str) -> Iterator[None]:
    """Name what a rank has no memory for where the size of a micro-batch makes no difference.

    Args:
        what: the block does.

    Raises:
        PipelineError: the block runs out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PipelineError(
            f"out of memory while {what}, which smaller micro-batches would not change: use more "
            f"ranks, or a smaller network ({error})"
        ) from None


@contextlib.contextmanager
def recorded(
    run: Store,
    sizes: Sequence[int],
    micro_batch: int,
    *,
    recomputes: bool,
    where: Callable[[], str],
    writer: int = 0,
) -> Iterator[None]:
    """Write down that a micro-batch does not fit, if the block runs out of memory.

    Several ranks may do so at the same time; all write the same.

    Args:
        run: folder of the run.
        sizes: what did not fit before.
        micro_batch: samples per rank and backward pass in this block.
        recomputes: whether all blocks are recomputed in the backward pass.
        where: step and rank.
        writer: number of the run's lease.

    Raises:
        TooLargeError: blocks that are recomputed, or half of it, can be tried.
        PipelineError: there is nothing smaller to try.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tried = [*sizes, micro_batch]
        # Before anything else: once a rank has failed, the others may be ended at any time.
        body = json.dumps({"too_large": tried}).encode()
        write_record(run, layout.OUT_OF_MEMORY, writer, body)
        reason = f"{where()}: out of memory with {{}} samples per backward pass; {{}} ({error})"
        if not recomputes:
            again = "the next execution of this run recomputes all blocks in the backward pass"
            raise TooLargeError(reason.format(micro_batch, again)) from None
        if micro_batch > 1:
            half = "the next execution of this run tries half of them"
            raise TooLargeError(reason.format(micro_batch, half)) from None
        help_ = "use more ranks or a smaller network"
        raise PipelineError(reason.format(", ".join(map(str, tried)), help_)) from None


def fit_in_memory(fit: Callable[[WorkerSpec], None], job: WorkerSpec, stop: Interruption) -> None:
    """Call `fit` until its ranks have the memory for their micro-batches.

    Ray counts such an end among `cluster.max_failures` and may have started the ranks again
    itself. When it gives up it has seen one failure more than it was allowed. Lack of memory does
    not count: the next call is allowed `max_failures` less the other failures.

    Args:
        fit: trains a job on the ranks of a cluster; raises RuntimeError when it fails.
        job: the run.
        stop: a run that is asked to stop is not started again.

    Raises:
        RuntimeError: the run failed for another reason.
    """
    run = Store(job.run_url)
    while True:
        before = len(too_large(run))
        try:
            return fit(job)
        except RuntimeError:
            lacking = len(too_large(run)) - before
            if not lacking or stop.stop_requested():
                raise
        if job.config.cluster.max_failures >= 0:
            cluster = dataclasses.replace(job.config.cluster, max_failures=lacking - 1)
            job = dataclasses.replace(job, config=dataclasses.replace(job.config, cluster=cluster))


def fit_here(fit: Callable[[], None], *, ranks: int) -> None:
    """The same without Ray: one rank tries again in this process, several are started from outside.

    Args:
        fit: trains as a rank of this process.
        ranks: how many there are.

    Raises:
        RunFailedError: this is one of several ranks, which cannot begin again alone.
    """
    while True:
        try:
            return fit()
        except TooLargeError as error:
            if ranks > 1:
                raise RunFailedError(
                    f"{error}: start it again with --start-or-resume and the same --name"
                ) from None
        # Out of the except block, whose error still holds tensors of the failed step.
        gc.collect()
        torch.cuda.empty_cache()  # what the next attempt cannot use is in pieces of the wrong size
