"""Processor time of the training loop: in every record, and where it is the budget, its end."""

import dataclasses
import time
from collections.abc import Callable, Mapping

from pipeline.training.hooks import Hook, Record
from pipeline.training.metric_reducer import Metric, Reduction
from pipeline.training.schedules import StepContext


class ProcessorTimeHook(Hook):
    """Sums the processor seconds of all ranks and threads since training began here.

    A budget, which only a run of one rank has, ends training with a record and a checkpoint after
    the step that ends nearest to it: another one would overshoot by more than this one falls short.

    Args:
        budget: processor seconds; 0: none.
    """

    SECONDS = "train/processor_s"
    metrics = (Metric(SECONDS, Reduction.SUM),)

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._began = time.process_time()
        self._before_step = 0.0

    def _spent(self) -> float:
        return time.process_time() - self._began

    def local_metrics(self) -> Mapping[str, float]:
        """Seconds of this rank."""
        return {self.SECONDS: self._spent()}

    def before_step(self, step: int) -> None:
        """See Hook."""
        self._before_step = self._spent()

    def wants_record(self) -> bool:
        """When another step would end farther from the budget."""
        return self._ends(self._spent())

    def _ends(self, spent: float) -> bool:
        return 0 < self._budget <= spent + (spent - self._before_step) / 2

    def on_record(self, record: Record) -> None:
        """The last record is followed by the end."""
        ends = self._ends(record.reduced.values[self.SECONDS])
        record.stop |= ends
        record.save |= ends

    def scheduled(
        self, context_at: Callable[[int], StepContext], total: int
    ) -> Callable[[int], StepContext]:
        """Schedules that follow the share of the budget which is spent.

        Args:
            context_at: schedules of a run of `total` steps; returned as it is without a budget.
            total: its steps.
        """
        if not self._budget:
            return context_at

        def by_time(step: int) -> StepContext:
            share = self._spent() / self._budget
            now = context_at(min(total - 1, int(share * total)))
            return dataclasses.replace(now, step=step)

        return by_time
