"""The moments of the training loop, and what joins it there.

The loop (`trainer.py`) calls every hook, in the order of its list, at these moments of a step:

    before_batch       it begins to wait for samples
    before_step        they are there; forward, backward and optimizer step follow
    wants_record       a record is due every `train.log_every` steps, and when a hook wants one
    local_metrics,     at a record: what this rank states,
    on_record          and what was reduced over all ranks
    before_checkpoint  the step is done
    on_save            a checkpoint is due
    after_step         nothing is left to do

and, once, `before_rollback` (too many steps were skipped: an earlier checkpoint is loaded, and no
other moment of this step follows) and `at_end`. A new hook is a class here, or beside what it
serves, and an entry of `_hooks` in `worker.py`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pipeline.resilience.heartbeat import Phase
from pipeline.resilience.signals import Interruption
from pipeline.resilience.straggler import StragglerDetector
from pipeline.run.events import Emit, Straggling
from pipeline.run.worker_spec import TrainState
from pipeline.training.metric_reducer import Metric, Reduced, Reduction

_ASK_PREEMPTION_S = 5.0
"""Pause between two questions whether a node is about to go; they are a barrier."""


@dataclasses.dataclass
class Record:
    """What hooks see of a record before it is emitted, and what they may ask of the loop.

    Attributes:
        step: steps done.
        reduced: metrics over all ranks since the record before.
        values: scalars that the record shows, by name; hooks add theirs.
        save: set on every rank: a checkpoint follows, out of turn.
        stop: set on every rank: training ends after this step.
    """

    step: int
    reduced: Reduced
    values: dict[str, float]
    save: bool = False
    stop: bool = False


class Hook:
    """Joins the training loop; a method that is not overridden does nothing.

    Ranks: every rank calls the same moments in the same order, so a hook may use collectives if it
    does so on every rank. It runs on the training thread: what it waits for, training waits for.

    Attributes:
        metrics: what `local_metrics` states, declared before training; it is reduced in the same
            collective as the statistics of the steps.
    """

    metrics: Sequence[Metric] = ()

    def before_batch(self, step: int) -> None:
        """The loop, `step` steps done, begins to wait for the samples of the next one."""

    def before_step(self, step: int) -> None:
        """The samples are there; `step` steps are done before."""

    def wants_record(self) -> bool:
        """Whether a record is due out of turn; all ranks have to answer alike."""
        return False

    def local_metrics(self) -> Mapping[str, float]:
        """This rank's value of every metric that was declared."""
        return {}

    def on_record(self, record: Record) -> None:
        """Metrics were reduced; what is added to `record.values` is shown."""

    def before_checkpoint(self, step: int) -> None:
        """The step after `step` others is done; a checkpoint follows if one is due."""

    def on_save(self, state: TrainState) -> None:
        """A checkpoint of this state is due, with rank 0's newest records."""

    def after_step(self, step: int) -> None:
        """`step` steps are done, and what belongs to them."""

    def before_rollback(self, failed: TrainState) -> None:
        """An earlier checkpoint takes the place of this state, which no rank has updated."""

    def at_end(self) -> None:
        """Training has come to its last step, or was asked to stop; not after an error."""


class HookList(Hook):
    """Several hooks as one: each moment reaches them in their order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)
        # Two hooks with one name are refused by the reducer, which sees all declarations.
        self.metrics = [metric for hook in hooks for metric in hook.metrics]

    def before_batch(self, step: int) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.before_batch(step)

    def before_step(self, step: int) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.before_step(step)

    def wants_record(self) -> bool:
        """See Hook."""
        return any(hook.wants_record() for hook in self._hooks)

    def local_metrics(self) -> Mapping[str, float]:
        """See Hook; the values of all of them."""
        return {name: x for hook in self._hooks for name, x in hook.local_metrics().items()}

    def on_record(self, record: Record) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.on_record(record)

    def before_checkpoint(self, step: int) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.before_checkpoint(step)

    def on_save(self, state: TrainState) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.on_save(state)

    def after_step(self, step: int) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.after_step(step)

    def before_rollback(self, failed: TrainState) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.before_rollback(failed)

    def at_end(self) -> None:
        """See Hook."""
        for hook in self._hooks:
            hook.at_end()


class HangDetectionHook(Hook):
    """Says at every phase of a step that this rank has come so far.

    Args:
        beat: see HangDetector.beat.
    """

    def __init__(self, beat: Callable[[int, Phase], None]) -> None:
        self._beat = beat

    def before_batch(self, step: int) -> None:
        """Waiting for data is not waiting for other ranks: a phase of its own."""
        self._beat(step, Phase.DATA)

    def before_step(self, step: int) -> None:
        """The part in which ranks wait for each other."""
        self._beat(step, Phase.STEP)

    def before_checkpoint(self, step: int) -> None:
        """Also where none is due: what follows may wait for a store, which has more time."""
        self._beat(step, Phase.CHECKPOINT)

    def before_rollback(self, failed: TrainState) -> None:
        """Loading a checkpoint takes as long as writing one."""
        self._beat(failed.step, Phase.CHECKPOINT)


class InterruptionHook(Hook):
    """A stop that any rank hears of is obeyed by all, after a checkpoint of the same step.

    Args:
        interruption: what this rank can learn.
    """

    _STOP, _ASK = "stop requested", "preemption question due"
    metrics = (
        Metric(_STOP, Reduction.SUM, recorded=False),
        Metric(_ASK, Reduction.SUM, recorded=False),
    )

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self._asked = time.monotonic()
        self._preempted = False

    def local_metrics(self) -> Mapping[str, float]:
        """Whether this rank was asked to stop, and whether it would ask for preemptions."""
        due = time.monotonic() - self._asked > _ASK_PREEMPTION_S
        return {self._STOP: self._interruption.stop_requested(), self._ASK: due}

    def on_record(self, record: Record) -> None:
        """Decide whether this step is saved out of turn; all ranks come to the same answer."""
        before = self._preempted
        # The question is a barrier, and clocks differ: all ask when the first one would.
        if record.reduced.values[self._ASK] > 0:
            self._asked = time.monotonic()
            self._preempted = self._interruption.preempted()
        stop = record.reduced.values[self._STOP] > 0
        record.stop |= stop
        # A node that is about to go says so for as long as it is there; one checkpoint is enough.
        record.save |= stop or (self._preempted and not before)


class StragglerHook(Hook):
    """Compares how fast the ranks compute, and names one that has been slow for long.

    Args:
        forward_seconds: what this rank has computed since the last call, see Stopwatch.
        detector: compares.
        hosts: machine and process of every rank.
        emit: receives Straggling.
    """

    _SECONDS = "forward seconds"
    metrics = (Metric(_SECONDS, Reduction.PER_RANK),)

    def __init__(
        self,
        forward_seconds: Callable[[], float],
        detector: StragglerDetector,
        *,
        hosts: Sequence[str],
        emit: Emit,
    ) -> None:
        self._forward_seconds, self._detector = forward_seconds, detector
        self._hosts, self._emit = hosts, emit

    def local_metrics(self) -> Mapping[str, float]:
        """Seconds of this rank."""
        return {self._SECONDS: self._forward_seconds()}

    def on_record(self, record: Record) -> None:
        """Every rank compares, so that all of them know the same."""
        record.values |= self._detector.compare(record.reduced.per_rank[self._SECONDS])
        # On every rank: the detector counts records, and must count the same ones everywhere.
        slow = self._detector.straggler()
        if slow is not None:
            ratio = record.values["perf/slowest_ratio"]
            self._emit(Straggling(record.step, slow, self._hosts[slow], ratio))


class OrthogonalityHook(Hook):
    """Shows what the audits of the optimizer have found.

    Args:
        audit_metrics: metrics since the last call, the same on all ranks; empty without an audit.
    """

    def __init__(self, audit_metrics: Callable[[], Mapping[str, float]]) -> None:
        self._audit_metrics = audit_metrics

    def on_record(self, record: Record) -> None:
        """Nothing is reduced here: the audit itself has compared the ranks."""
        record.values |= self._audit_metrics()


class CheckpointSaver(Protocol):
    """What is needed of the checkpoints."""

    def save(self, state: TrainState) -> None:
        """Begin to save the state after a step."""
        ...

    def poll(self) -> None:
        """Report what has been saved since the last call; waits for nothing."""
        ...

    def wait(self) -> None:
        """Wait for the checkpoint under way, and report it."""
        ...


class CheckpointHook(Hook):
    """Saves checkpoints in the background and reports each when it is complete.

    Args:
        saver: writes them.
    """

    def __init__(self, saver: CheckpointSaver) -> None:
        self._saver = saver

    def on_save(self, state: TrainState) -> None:
        """Training waits for the copy to the host."""
        self._saver.save(state)

    def after_step(self, step: int) -> None:
        """A background thread emits nothing, so that events keep their order."""
        self._saver.poll()

    def before_rollback(self, failed: TrainState) -> None:
        """The checkpoint under way may be the newest one, which is to be loaded."""
        self._saver.wait()


class ProfilerHook(Hook):
    """Tells a profiler that a step has ended.

    Args:
        stepped: see `profiled`.
    """

    def __init__(self, stepped: Callable[[], None]) -> None:
        self._stepped = stepped

    def after_step(self, step: int) -> None:
        """The trace of a step holds its checkpoint as well."""
        self._stepped()
