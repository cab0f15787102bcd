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
    """

    facts: dict[str, Any]
    step: int
    total_steps: int
    devices: int = 1
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Scalars after `step` optimizer steps; `time_ms` is the wall clock since the epoch."""

    step: int
    values: dict[str, float]
    time_ms: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """A checkpoint was committed and its artefact exported."""

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
class NotKept:
    """A checkpoint could not be written; the one before is still the newest."""

    step: int
    error: str


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A loss or gradient was not finite on some rank, so no rank has taken this step."""

    step: int


Event = Started | Metrics | Kept | NotKept | Skipped
Emit = Callable[[Event], None]
