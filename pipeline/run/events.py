"""What rank 0 tells the driver: plain picklable records, in order of occurrence."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Started:
    """Training is about to run.

    Attributes:
        facts: counts worth a line in the log and a parameter in the tracker.
        step: steps already done (resume).
        total_steps: steps of the schedule.
        devices: how many devices compute, one per rank.
        device: name of rank 0's device, `cpu` or that of a GPU.
        micro_batch: samples per rank and backward pass.
        recomputed_blocks: blocks that are recomputed in the backward pass.
        measured_flops: FLOP/s of rank 0 in products, where its device has no data sheet; else 0.
    """

    facts: dict[str, Any]
    step: int
    total_steps: int
    devices: int = 1
    device: str = "cpu"
    micro_batch: int = 0
    recomputed_blocks: int = 0
    measured_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Scalars after `step` optimizer steps.

    Attributes:
        step: steps done.
        values: by name.
        time_ms: wall clock since the epoch.
        productive_s: of the seconds since the record before, those of steps that were taken: no
            wait for data (of the rank that waited longest), no checkpoint, no skipped step.
    """

    step: int
    values: dict[str, float]
    time_ms: int
    productive_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class MetricsReplayed:
    """Records that the checkpoint holds from which training goes on.

    A driver that was killed may not have heard of them, and nobody makes these steps again.
    """

    records: tuple[Metrics, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was committed and its artifact exported."""

    step: int
    checkpoint_url: str
    artifact_url: str
    digest: str
    residual: float
    stall_s: float
    """Seconds that training waited."""
    seconds: float
    """Seconds that the writing took, beside training."""


@dataclasses.dataclass(frozen=True)
class CheckpointFailed:
    """A checkpoint could not be written; the one before is still the newest."""

    step: int
    error: str


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A loss or gradient was not finite on some rank, so no rank has taken this step."""

    step: int


@dataclasses.dataclass(frozen=True)
class RolledBack:
    """Too many steps in a row were skipped: the state is that of an earlier checkpoint.

    Attributes:
        step: of the checkpoint.
        given_up: last of the skipped steps.
        samples: number of samples that are left out because of it.
        first: epoch and position of the first of them.
        next: epoch and position of the sample that comes next.
        rollbacks: roll-backs of this run so far.
        samples_left_out: by all of them.
    """

    step: int
    given_up: int
    samples: int
    first: tuple[int, int]
    next: tuple[int, int]
    rollbacks: int
    samples_left_out: int


@dataclasses.dataclass(frozen=True)
class Straggling:
    """A rank computes more slowly than the others, and has done so for several records.

    Attributes:
        step: of the record.
        rank: which one.
        host: its machine and process.
        ratio: its seconds to the median of all ranks.
    """

    step: int
    rank: int
    host: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class Hung:
    """The ranks have stood still for too long, and end.

    Attributes:
        step: that was under way.
        ranks: for which the others waited; empty if none stands out.
        report: what is known of every rank, one line.
        url: the report with the stacks of all threads of one rank; those of the others are beside.
    """

    step: int
    ranks: list[int]
    report: str
    url: str


@dataclasses.dataclass(frozen=True)
class GroupFailed:
    """Ranks, or the process that looks after them, have died, or could not be started.

    Attributes:
        error: what has happened, one line.
        restarts_left: how often they may be started again after this one, less than 0: they are
            not; None: any number.
    """

    error: str
    restarts_left: int | None


Event = (
    Started
    | Metrics
    | MetricsReplayed
    | CheckpointSaved
    | CheckpointFailed
    | Skipped
    | RolledBack
    | Hung
    | Straggling
    | GroupFailed
)
Emit = Callable[[Event], None]
