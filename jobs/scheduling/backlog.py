"""What is to be evaluated: every checkpoint by every suite, and where each stands."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from data_shards.format.shard_index import ShardIndex, load_index
from jobs.errors import EvaluationError
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.runner import evaluation_keys
from jobs.evaluation.suites import EVALUATION_SUITES
from jobs.scheduling.claims import ClaimPhase, Claims, State
from jobs.scheduling.config import ScheduleConfig
from pipeline.run.lease import Lease
from pipeline.tracking.checkpoint_query import Checkpoint, CheckpointQuery

_KEY_CHARACTERS = 16
_UNREADABLE = (ValueError, LookupError, TypeError, OSError)  # one record must not hide all others


@dataclass(frozen=True)
class BacklogEntry:
    """One checkpoint and one suite.

    Attributes:
        checkpoint: what is evaluated.
        suite: by which suite.
        phase: where it stands.
        config: the evaluation; None if the artifact or its shard set cannot be read.
        claim: the newest attempt, or the first one if there is none yet.
        attempted: whether that attempt was made.
        note: what a person should know.
    """

    checkpoint: Checkpoint
    suite: str
    phase: ClaimPhase
    config: EvaluationConfig | None = None
    claim: Lease | None = None
    attempted: bool = False
    note: str = ""

    @property
    def next(self) -> Lease:
        """The attempt that is to be made.

        Raises:
            EvaluationError: the artifact or its shard set cannot be read.
        """
        if self.claim is None:
            raise EvaluationError(self.note)
        return self.claim.next if self.attempted else self.claim


@dataclass(frozen=True)
class _View:
    """What one look found before it went through the checkpoints."""

    states: Mapping[str, State]
    recorded: set[tuple[str, str]]
    load: Callable[[str], ShardIndex]


class Backlog:
    """Looks at the store and at the claims; decides nothing and changes nothing.

    Args:
        config: the schedule.
        claims: the shared folder.
        watch: view of the MLflow store.
    """

    def __init__(self, config: ScheduleConfig, claims: Claims, watch: CheckpointQuery) -> None:
        self._config = config
        self._claims = claims
        self._watch = watch
        self._keys: dict[tuple[str, str], tuple[str, ...]] = {}
        self._done: set[tuple[str, str]] = set()

    def look(self, suites: Sequence[str]) -> list[BacklogEntry]:
        """Return an entry for every checkpoint and suite, oldest checkpoint first.

        What cannot be read is an entry too, with the reason, and is read again the next time.
        """
        checkpoints = self._watch.checkpoints()
        if self._config.newest:
            latest = {c.run_id or c.model_id: c for c in checkpoints}
            checkpoints = [c for c in checkpoints if latest[c.run_id or c.model_id] is c]
        pairs = [(c, s) for s in suites for c in checkpoints]
        asked = [c for c, s in pairs if _name(c, s) not in self._done]
        # Claims before records: what ends in between is then seen as recorded.
        states = self._claims.states() if asked else {}
        runs = {run for c in asked for run in (c.run_id, "")}
        view = _View(states, self._watch.recorded(runs), lru_cache(maxsize=8)(load_index))
        return [self._entry(checkpoint, suite, view) for checkpoint, suite in pairs]

    def _entry(self, checkpoint: Checkpoint, suite: str, view: _View) -> BacklogEntry:
        name = _name(checkpoint, suite)
        if name in self._done:
            return BacklogEntry(checkpoint, suite, ClaimPhase.DONE)
        try:
            config = self._config.evaluation(suite, checkpoint)
            if name not in self._keys:
                self._config.tracking.require_address(checkpoint.artifact_url)
                self._keys[name] = evaluation_keys(config, view.load)
        except _UNREADABLE as error:
            return BacklogEntry(
                checkpoint, suite, ClaimPhase.FAILED, note=f"{type(error).__name__}: {error}"
            )
        keys = self._keys[name]
        first = Lease(claim_key(keys[0], checkpoint.run_id), 1)
        state = view.states.get(first.key)
        entry = BacklogEntry(checkpoint, suite, ClaimPhase.OPEN, config, first)
        if view.recorded & {(key, run) for key in keys for run in (checkpoint.run_id, "")}:
            entry = replace(entry, phase=ClaimPhase.DONE)
        elif state is not None:
            note = "" if state.code is None else f"exit code {state.code}"
            entry = replace(entry, phase=state.phase, claim=state.claim, attempted=True, note=note)
        elif self._left_to_training(checkpoint, suite):
            entry = replace(entry, phase=ClaimPhase.RUNNING, note="left to its training")
        if entry.phase is ClaimPhase.DONE:
            self._done.add(name)
        return entry

    def _left_to_training(self, checkpoint: Checkpoint, suite: str) -> bool:
        age = time.time() - checkpoint.created_s
        by_training = not EVALUATION_SUITES[suite]  # the one that changes no setting
        return checkpoint.training and by_training and age < self._config.patience_s


def claim_key(eval_key: str, run_id: str) -> str:
    """Name of the claims of one evaluation: two trainings may end in the same weights."""
    return hashlib.sha256(f"{eval_key} {run_id}".encode()).hexdigest()[:_KEY_CHARACTERS]


def _name(checkpoint: Checkpoint, suite: str) -> tuple[str, str]:
    return checkpoint.model_id, suite
