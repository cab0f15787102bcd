"""Processor time of the training loop: in every record, and where it is the budget, its end."""

import dataclasses
import time
from collections.abc import Callable, Mapping

from pipeline.training.hooks import Hook, Record
from pipeline.training.metrics import Metric, Reduction
from pipeline.training.schedules import StepContext


class ProcessorTimeHook(Hook):
    """Sums the processor seconds of all ranks and threads since training began here.

    All ranks read the same sum, so they end after the same step, at the first record beyond the
    budget, with a checkpoint.

    Args:
        budget: seconds over all ranks; 0: none.
    """

    SECONDS = "train/processor_s"
    metrics = (Metric(SECONDS, Reduction.SUM),)

    def __init__(self, budget: float) -> None:
        self._budget, self._share = budget, 0.0
        self._began = time.process_time()

    def local_metrics(self) -> Mapping[str, float]:
        """Seconds of this rank."""
        return {self.SECONDS: time.process_time() - self._began}

    def on_record(self, record: Record) -> None:
        """Every rank comes to the same answer."""
        if self._budget:
            self._share = record.reduced.values[self.SECONDS] / self._budget
            record.stop |= self._share >= 1
            record.save |= self._share >= 1

    def scheduled(
        self, context_at: Callable[[int], StepContext], total: int
    ) -> Callable[[int], StepContext]:
        """Schedules that follow the share of the budget which the last record has seen.

        Args:
            context_at: schedules of a run of `total` steps; returned as it is without a budget.
            total: its steps.
        """
        if not self._budget:
            return context_at

        def by_time(step: int) -> StepContext:
            now = context_at(min(total - 1, int(self._share * total)))
            return dataclasses.replace(now, step=step)

        return by_time
