"""What happens on Ray Train when processes of a run die: one budget for all of them.

Ray charges the ranks that die while they train to `max_failures`. Those that die while they are
started it replaces for ever, or, a moment later, not at all; and it does not replace its own
controller. Here every such death is charged to `cluster.max_failures` and told as an event.

Below Ray's public interface: `FailurePolicy`, the callbacks of the controller and the trainer's
`_initialize_and_run_controller`; `tests/end_to_end/test_deaths.py` notices when they change.
"""

import enum
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import PreemptionError

from pipeline.resilience.oom import TooLargeError
from pipeline.run.events import Emit, GroupFailed

DEATHS = (RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
"""What Ray says of a process that is gone, or that does not answer."""
STARTING = (WorkerGroupStartupFailedError,)
"""What it says of ranks of which one has died while they were started."""
_LINE = 300
"""Characters of an error in one line."""


class Failure(enum.Enum):
    """Why ranks have to be started again."""

    ROOM = "the cluster has no room for the ranks yet"
    PREEMPTED = "a node was taken away"
    STARTING = "the ranks could not all be started"
    TRAINING = "a rank has ended"
    FATAL = "Ray Train cannot start ranks"


def classify(error: TrainingFailedError) -> Failure:
    """What kind of failure Ray reports."""
    if isinstance(error, PreemptionError):
        return Failure.PREEMPTED
    if isinstance(error, WorkerGroupError):
        taken = any(map(_is_preempted, error.worker_failures.values()))
        return Failure.PREEMPTED if taken else Failure.TRAINING
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        return Failure.ROOM
    # The two other errors come from calls to ranks beside those that Ray looks after.
    if isinstance(cause, WorkerGroupStartupFailedError | RayActorError | RayTaskError):
        taken = _is_preempted(cause) or _is_preempted(cause.__cause__)
        return Failure.PREEMPTED if taken else Failure.STARTING
    return Failure.FATAL


def _is_preempted(error: BaseException | None) -> bool:
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    return isinstance(error, RayActorError) and bool(error.preempted)


def describe(error: TrainingFailedError) -> str:
    """One line: which ranks have ended and how, the dead before those that they took along."""
    if isinstance(error, WorkerGroupError):
        found = error.worker_failures
        dead = {rank: e for rank, e in found.items() if isinstance(e, DEATHS)}
        return "; ".join(f"rank {rank}: {one_line(e)}" for rank, e in (dead or found).items())
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    return one_line(cause.__cause__ or cause)


def one_line(error: BaseException) -> str:
    """The line of an error that says most: the first, of a task's traceback the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    if isinstance(error, RayTaskError):
        return lines[-1][:_LINE]
    kind = "" if isinstance(error, DEATHS) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:_LINE]


class BudgetedFailures(FailurePolicy):
    """Starts the ranks again while the budget lasts.

    A group that waits for room waits on: that is no failure.

    Args:
        failure_config: Ray's, with the numbers of failures that are allowed.
        charge: counts a failure of the run; returns how many there were, also of other processes.
        emit: receives GroupFailed.
    """

    def __init__(self, failure_config: Any, charge: Callable[[], int], emit: Emit) -> None:
        super().__init__(failure_config)
        self._charge, self._emit = charge, emit
        self._preemptions = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """See FailurePolicy."""
        failure = classify(training_failed_error)
        if failure is Failure.ROOM:
            return FailureDecision.RETRY
        left = self._left(failure)
        if not _lacks_memory(training_failed_error):  # which whoever starts the job gives back
            error = f"{failure.value}: {describe(training_failed_error)}"
            self._emit(GroupFailed(error, left))
        return FailureDecision.RAISE if left is not None and left < 0 else FailureDecision.RETRY

    def _left(self, failure: Failure) -> int | None:
        """Restarts that are left after this one; None: any number."""
        if failure is Failure.FATAL:
            return -1
        if failure is Failure.PREEMPTED:
            self._preemptions += 1
            limit, count = self.failure_config.max_preemption_failures, self._preemptions
        else:
            limit, count = self.failure_config.max_failures, self._charge()
        return None if limit < 0 else limit - count


def _lacks_memory(error: TrainingFailedError) -> bool:
    failures = getattr(error, "worker_failures", {}).values()
    return any(isinstance(e, TooLargeError) for f in failures for e in (f, f.__cause__))


class GroupKeeper(WorkerGroupCallback):
    """Sees to it that no group of ranks outlives its time, and keeps their room from others.

    Ray forgets a group of which a rank has died late in the start: its room stays taken, and the
    next group waits for it for ever. Where its controller dies, a detached actor of Ray's frees
    the room, which outlives a driver that was killed and needs a dashboard. Here `keep` gets the
    placement group, and who starts the controller frees it.

    Args:
        keep: receives the placement group of a group that has started.
    """

    def __init__(self, keep: Callable[[Any], object]) -> None:
        self._keep = keep
        self._group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """See WorkerGroupCallback: ends what is left of the group before."""
        group, self._group = self._group, None
        if group is not None:
            group.shutdown()

    def after_worker_group_start(self, worker_group: Any) -> None:
        """See WorkerGroupCallback; called before any callback that a dead rank makes fail."""
        self._group = worker_group.get_worker_group_state()
        self._keep(self._group.placement_group_handle.placement_group)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """See WorkerGroupCallback."""
        self._group = None


class BudgetedTrainer(TorchTrainer):
    """Ray's trainer with policies of ours; a trainer is used once.

    Attributes:
        failures: in place of Ray's failure policy.
        keeper: in place of Ray's placement group cleaner.
        scaling: in place of Ray's scaling policy; None: Ray's.
    """

    failures: BudgetedFailures
    keeper: GroupKeeper
    scaling: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        theirs = super()._create_default_callbacks()
        kept = [c for c in theirs if not isinstance(c, PlacementGroupCleanerCallback)]
        return [self.keeper, *kept]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = self.failures
        if self.scaling is not None:
            arguments["scaling_policy"] = self.scaling
        return super()._initialize_and_run_controller(**arguments)


def free(groups: list[Any]) -> None:
    """Give back the room of groups whose controller has died; their ranks end with it."""
    for group in groups:
        ray.util.remove_placement_group(group)
