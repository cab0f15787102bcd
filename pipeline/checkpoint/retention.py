"""Which checkpoints of a run stay; artifacts and evaluations always do. Called by the driver."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from data_shards.storage.store import Store
from pipeline.checkpoint.reader import committed, name_strays
from pipeline.config import CheckpointConfig
from pipeline.run import layout

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
    name_strays(run)
    folders = committed(run)
    candidates = []
    for step, folder in folders.items():
        sizes = folder.sizes()
        candidates.append(
            Candidate(
                step,
                sum(sizes.values()),
                scores.get(step),
                pinned=run.child(layout.checkpoint(step)).exists(layout.PINNED),
                pending=step in unfinished,
            )
        )
    gone = surplus(candidates, policy)
    for step in gone:
        # First: half a checkpoint must not look like a whole one.
        folders[step].remove(layout.COMMIT)
        run.remove(layout.checkpoint(step), recursive=True)
    for step in folders.keys() - set(gone):
        _remove_others(run, step, layout.writer_of(folders[step].url) or 0)
    newest = max(folders, default=0)
    for name in run.ls(layout.CHECKPOINTS):
        left = layout.step_of(name)  # None: not ours, so it stays
        if left is not None and left < newest and left not in folders:
            run.remove(name, recursive=True)
    return gone


def _remove_others(run: Store, step: int, kept: int) -> None:
    """Remove what earlier writers have left of a step that writer `kept` has committed."""
    for name in run.ls(layout.checkpoint(step)):
        writer = layout.writer_of(name)
        if writer is not None and writer < kept:
            run.remove(name, recursive=True)
