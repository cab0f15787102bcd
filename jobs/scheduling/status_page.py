"""One page about scheduled evaluations: counts, what is under way, what failed."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jobs.evaluation.progress import EvaluationProgress
from jobs.evaluation.runner import output
from jobs.scheduling.backlog import BacklogEntry
from jobs.scheduling.claims import ClaimPhase, Claims
from jobs.scheduling.config import ScheduleConfig
from pipeline.run.layout import PROGRESS

_LINES = 15


def page(
    console: Console, config: ScheduleConfig, claims: Claims, entries: Sequence[BacklogEntry]
) -> None:
    """Print the state of every suite, then what is under way and what failed."""
    console.print(
        f"MLflow  {config.tracking.uri}, experiment {config.tracking.experiment or 'any'}"
    )
    console.print(f"claims  {claims.store}")
    console.print(f"rules   {', '.join(config.rules)} ({config.timezone})")
    counts = Counter((entry.suite, entry.phase) for entry in entries)
    table = Table("suite", "checkpoints", *(phase.value for phase in ClaimPhase))
    for suite in config.suites:
        numbers = [counts[suite, phase] for phase in ClaimPhase]
        table.add_row(suite, str(sum(numbers)), *map(str, numbers))
    console.print(table)
    for phase in (ClaimPhase.RUNNING, ClaimPhase.WAITING, ClaimPhase.FAILED):
        chosen = [entry for entry in entries if entry.phase is phase]
        for entry in chosen[:_LINES]:
            console.print(f"{phase.value:8}{_line(entry, claims)}", soft_wrap=True)
        if len(chosen) > _LINES:
            console.print(f"{phase.value:8}and {len(chosen) - _LINES} more")
    if counts.total() and any(e.phase is ClaimPhase.FAILED and e.claim for e in entries):
        console.print("a failed evaluation is attempted again when its claims are removed")


def _line(entry: BacklogEntry, claims: Claims) -> str:
    words = [f"{entry.suite} of {entry.checkpoint.run_name} step {entry.checkpoint.step}"]
    if entry.attempted and entry.claim:
        words.append(f"claim {entry.claim.name}")
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            words.append(f"by {claims.read(entry.claim)['by']}")
    if entry.note:
        words.append(entry.note)
    if entry.config and entry.phase is ClaimPhase.RUNNING:
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            words.append(str(EvaluationProgress(**output(entry.config).read_object(PROGRESS))))
    return "; ".join(words)
