"""Which checkpoints of a run stay; artefacts and evaluations always do."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from data_shards.storage.store import Store
from pipeline.checkpoint.reader import committed
from pipeline.checkpoint.writer import COMMIT
from pipeline.config import CheckpointConfig

PINNED = "pinned"
"""An object of this name in a checkpoint's folder keeps it for good."""
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A committed checkpoint."""

    step: int
    size: int
    """Bytes."""
    score: float | None = None
    """`cra_sound` at the first radius of the table; None: not certified (yet)."""
    pinned: bool = False
    pending: bool = False
    """It is being certified, and might be the best."""


def surplus(candidates: Sequence[Candidate], policy: CheckpointConfig) -> list[int]:
    """Steps whose checkpoints may go, oldest first.

    Kept are the last `keep_last`, every one whose step `keep_every` divides, the `keep_best` with
    the highest scores, those that might yet be among them, and pinned ones. Beyond `budget_gb`
    those go first that are kept for their step alone, then all others but the newest and the
    pinned, each time the oldest.

    Args:
        candidates: all committed checkpoints.
        policy: what to keep.
    """
    ordered = sorted(candidates, key=lambda c: c.step)
    last = ordered[-policy.keep_last :]  # all of them for 0
    scored = sorted((c for c in ordered if c.score is not None), key=lambda c: (c.score, c.step))
    pending = [c for c in ordered if c.pending]
    best = [*scored[-policy.keep_best :], *pending] if policy.keep_best else []
    pinned = [c for c in ordered if c.pinned]
    regular = [c for c in ordered if policy.keep_every and c.step % policy.keep_every == 0]
    kept = {c.step: c for c in [*last, *best, *pinned, *regular]}
    # No budget takes the newest, from which the run goes on, or what a person has pinned.
    fixed = {c.step for c in [*ordered[-1:], *pinned]}
    wanted = {c.step for c in [*last, *best]} | fixed
    # First what is kept for its step alone, then the rest.
    expendable = sorted(kept.keys() - fixed, key=lambda step: (step in wanted, step))
    while policy.budget_gb and expendable and _size(kept) > policy.budget_gb * _GB:
        del kept[expendable.pop(0)]
    return [c.step for c in ordered if c.step not in kept]


def _size(kept: Mapping[int, Candidate]) -> int:
    return sum(c.size for c in kept.values())


def retain(
    run: Store,
    policy: CheckpointConfig,
    scores: Mapping[int, float],
    unfinished: Collection[int] = (),
) -> list[int]:
    """Remove the surplus checkpoints of a run, and what was left of uncommitted older ones.

    Args:
        run: folder of the run.
        policy: what to keep.
        scores: `cra_sound` by step, as far as known.
        unfinished: steps that are being certified.

    Returns:
        Steps of the committed checkpoints that were removed.
    """
    checkpoints = run.child("checkpoints")
    found = committed(checkpoints)
    names = {_step(folder.url): folder for folder in found}
    candidates = []
    for step, folder in names.items():
        sizes = folder.sizes()
        candidates.append(
            Candidate(
                step,
                sum(sizes.values()),
                scores.get(step),
                pinned=PINNED in sizes,
                pending=step in unfinished,
            )
        )
    gone = surplus(candidates, policy)
    for step in gone:
        names[step].remove(COMMIT)  # first: half a checkpoint must not look like a whole one
        names[step].remove("", recursive=True)
    newest = max(names, default=0)
    # An uncommitted folder older than the newest is what a dead writer left; a newer one may be
    # under way.
    for name in checkpoints.ls():
        if _step(name) < newest and _step(name) not in names:
            checkpoints.remove(name, recursive=True)
    return gone


def _step(url: str) -> int:
    return int(url.rstrip("/").rpartition("step-")[2])
