"""Out of memory: a run starts again with smaller micro-batches and remembers what did not fit.

The first step is the probe: it needs what every later one needs. A rank that runs out of memory
writes the size of its micro-batch into the run's folder and ends; whoever starts the ranks again
starts them with half of it. The global batch, its samples and their order stay; the sums over it
are rounded in another order. Centred layers take their means over a micro-batch, so over fewer
samples, as they do on more ranks.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

import torch

from data_shards.storage.store import Store
from pipeline.config import RunConfig
from pipeline.errors import PipelineError

RECORD = "memory.json"
_TEXTS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How allocators that have no type of their own say it."""


class TooLargeError(RuntimeError):
    """A micro-batch does not fit into the memory of a rank; a smaller one is left to be tried."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error of an allocator, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def too_large(run: Store) -> list[int]:
    """Samples per rank and backward pass that did not fit, in the order in which they were tried.

    Args:
        run: folder of the run.
    """
    if not run.exists(RECORD):
        return []
    return [int(size) for size in json.loads(run.read(RECORD))["too_large"]]


def fitting(config: RunConfig, sizes: Sequence[int], world_size: int) -> RunConfig:
    """The configuration with as many more backward passes per step as the memory asks for.

    Args:
        config: the run as it was asked for.
        sizes: micro-batches that did not fit.
        world_size: number of ranks, which share the global batch.

    Returns:
        `config` with the smallest `train.accumulation`, at least its own, that divides a rank's
        share into micro-batches of at most half of the smallest of `sizes`.
    """
    if not sizes:
        return config
    share = config.train.global_batch // world_size
    counts = range(config.train.accumulation, share + 1)
    most = max(min(sizes) // 2, 1)
    fits = (n for n in counts if share % n == 0 and share // n <= most)
    parts = next(fits, config.train.accumulation)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=parts))


@contextlib.contextmanager
def recorded(
    run: Store, sizes: Sequence[int], micro_batch: int, *, where: Callable[[], str]
) -> Iterator[None]:
    """Write down that a micro-batch does not fit, if the block runs out of memory.

    Several ranks may do so at the same time; all write the same.

    Args:
        run: folder of the run.
        sizes: what did not fit before.
        micro_batch: samples per rank and backward pass in this block.
        where: step and rank.

    Raises:
        TooLargeError: half of it can be tried.
        PipelineError: there is nothing smaller to try.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tried = [*sizes, micro_batch]
        run.write(RECORD, json.dumps({"too_large": tried}).encode())
        reason = f"{where()}: out of memory with {{}} samples per backward pass; {{}} ({error})"
        if micro_batch > 1:
            half = "the next execution of this run tries half of them"
            raise TooLargeError(reason.format(micro_batch, half)) from None
        help_ = "use more ranks, --train.activation-checkpointing or a smaller network"
        raise PipelineError(reason.format(", ".join(map(str, tried)), help_)) from None
