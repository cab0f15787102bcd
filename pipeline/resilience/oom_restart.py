"""Starting the ranks of a run again with smaller micro-batches after one ran out of memory."""

import dataclasses
import gc
from collections.abc import Callable

import torch

from data_shards.storage.store import Store
from pipeline.errors import PipelineError
from pipeline.resilience.oom import TooLargeError, too_large
from pipeline.resilience.signals import Interruption
from pipeline.training.worker import Job


def fit_in_memory(fit: Callable[[Job], None], job: Job, stop: Interruption) -> None:
    """Call `fit` until its ranks have the memory for their micro-batches.

    Ray counts such an end among `cluster.max_failures` and may have started the ranks again
    itself. When it gives up it has seen one failure more than it was allowed; what of them was
    lack of memory is given back.

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
        PipelineError: this is one of several ranks, which cannot begin again alone.
    """
    while True:
        try:
            return fit()
        except TooLargeError as error:
            if ranks > 1:
                raise PipelineError(
                    f"{error}: start it again with --start-or-resume and the same --name"
                ) from None
        gc.collect()
        torch.cuda.empty_cache()  # what the next attempt cannot use is in pieces of the wrong size
