"""Ray Train's elastic scaling for a fixed global batch, without losing a step when it resizes.

Ray starts as many ranks as the cluster has room for. Here it takes the largest number that divides
the batch, and before it ends healthy ranks in order to start more or fewer, these keep a
checkpoint. Below Ray's public interface: `ElasticScalingPolicy`;
`tests/end_to_end/test_elastic.py` notices when it changes.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)

from pipeline.launch.control_actor import PAUSE

RESIZE_S = 30.0
"""Pause between two looks whether the cluster has room for another number of ranks."""
START_TIMEOUT_S = "30"
"""How long Ray waits for the resources of a group before it counts them anew."""


class DividingPolicy(ElasticScalingPolicy):
    """Sizes that divide the batch; healthy ranks are paused before a resize.

    Args:
        scaling_config: Ray's, with (min, max) workers.
        sizes: numbers of ranks that divide the batch, all within (min, max).
        orders: handle of the Orders actor.
        grace_s: how long the ranks may take to pause.
    """

    def __init__(
        self, scaling_config: Any, sizes: Sequence[int], orders: Any, grace_s: float
    ) -> None:
        super().__init__(scaling_config)
        self._sizes, self._orders, self._grace_s = tuple(sizes), orders, grace_s
        self._pending: ResizeDecision | None = None
        self._deadline = 0.0

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= room), default=0)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """See ScalingPolicy: the ranks have ended, so none is left to be paused."""
        self._end_pause()
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """See ScalingPolicy: a resize is decided once and executed when the ranks have paused."""
        if self._pending is None:
            decision = super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
            if isinstance(decision, ResizeDecision):
                self._pending, self._deadline = decision, time.monotonic() + self._grace_s
                ray.get(self._orders.give.remote(PAUSE))
                return NoopDecision()
            return decision
        paused = ray.get(self._orders.paused.remote())
        if paused < worker_group_state.num_workers and time.monotonic() < self._deadline:
            return NoopDecision()
        return self._end_pause()

    def _end_pause(self) -> ResizeDecision | None:
        decision, self._pending = self._pending, None
        if decision is not None:
            ray.get(self._orders.withdraw.remote(PAUSE))
        return decision
