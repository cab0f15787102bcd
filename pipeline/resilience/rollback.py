"""Going back to the newest checkpoint, and on with the samples after those that broke the run.

A run whose steps are skipped too often in a row (a loss or gradient that is not finite) takes its
newest sound state and continues its stream where it is: no sample between the cursor of that
checkpoint and the end of the bad range has an effect on the network. Such a gap is written into the
run's folder, so that whoever loads the same checkpoint later leaves the same samples out.
"""

import dataclasses
import json
from collections.abc import Sequence

from pydantic import TypeAdapter

from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from pipeline.checkpoint.reader import load_newest
from pipeline.checkpoint.writer import Partitioned
from pipeline.errors import PipelineError
from pipeline.run import layout
from pipeline.run.distributed import DistributedContext
from pipeline.run.events import RolledBack
from pipeline.run.lease import read_record_object, write_record
from pipeline.run.worker_spec import TrainState


@dataclasses.dataclass(frozen=True)
class Gap:
    """Samples without effect on the network, [begin, end) of the endless sequence."""

    step: int
    """Of the checkpoint that was gone back to."""
    given_up: int
    """The last of the steps that were skipped in a row."""
    begin: Cursor
    end: Cursor

    def samples(self, per_epoch: int) -> int:
        """Number of samples left out, for epochs of `per_epoch` samples."""
        epochs = self.end.epoch - self.begin.epoch
        return epochs * per_epoch + self.end.position - self.begin.position


_GAPS = TypeAdapter(list[Gap])


def read_gaps(run: Store) -> list[Gap]:
    """The gaps of a run, in the order in which they were made.

    Raises:
        PipelineError: the file that lists them is damaged.
    """
    try:
        found = read_record_object(run, layout.ROLLBACKS)
        return [] if found is None else _GAPS.validate_python(found.get("gaps"))
    except ValueError as error:
        raise PipelineError(
            f"{run}/{layout.ROLLBACKS} cannot be used, so samples that were left out would come "
            f"again: {error}"
        ) from error


def past(cursor: Cursor, gaps: Sequence[Gap]) -> Cursor:
    """The next sample that is not in a gap."""
    for gap in gaps:
        begin, here, end = ((c.epoch, c.position) for c in (gap.begin, cursor, gap.end))
        # In their order: the end of one gap may lie in the next.
        if begin <= here < end:
            cursor = dataclasses.replace(cursor, epoch=end[0], position=end[1])
    return cursor


class Rollbacks:
    """Decides when skipped steps are too many, and goes back while a roll-back is left.

    Args:
        run: folder of the run.
        world: the ranks; all construct it together.
        engine: whose state goes back.
        max_skipped: `train.max_skipped`, steps in a row.
        limit: `train.rollbacks`, for all executions of the run together.
        per_epoch: samples of one epoch.
        writer: number of the run's lease.
    """

    def __init__(
        self,
        run: Store,
        *,
        world: DistributedContext,
        engine: Partitioned,
        max_skipped: int,
        limit: int,
        per_epoch: int,
        writer: int = 0,
    ) -> None:
        self._run, self._world, self._engine, self._writer = run, world, engine, writer
        self._max_skipped, self._limit, self._per_epoch = max_skipped, limit, per_epoch
        # One reading for all ranks: a store may show them different ones.
        self._gaps: list[Gap] = world.share(read_gaps(run) if world.rank == 0 else None)

    def resumed(self, progress: TrainState) -> TrainState:
        """Where a checkpoint goes on that was just loaded."""
        return dataclasses.replace(progress, cursor=past(progress.cursor, self._gaps))

    def too_many(self, skipped_in_a_row: int) -> bool:
        """Whether training cannot go on after so many skipped steps."""
        return skipped_in_a_row > self._max_skipped

    def go_back(self, failed: TrainState, skipped_in_a_row: int) -> tuple[TrainState, RolledBack]:
        """Load the newest sound checkpoint.

        Ranks: all call it together, with no checkpoint under way.

        Args:
            failed: after the last step that was skipped.
            skipped_in_a_row: how many were skipped, for the message.

        Returns:
            The step of the checkpoint with the cursor of `failed`, and what to tell.

        Raises:
            PipelineError: no roll-back is left, there is no sound checkpoint, or the gap cannot be
                written down; raised on every rank.
        """
        if len(self._gaps) >= self._limit:
            raise PipelineError(
                f"step {failed.step}: a loss or gradient is not finite on at least one rank, the "
                f"{skipped_in_a_row}. time in a row (train.max_skipped={self._max_skipped}), and "
                f"of train.rollbacks={self._limit} none is left; nothing was updated"
            )
        found, _ = load_newest(self._run, world=self._world, engine=self._engine)
        if found is None:
            raise PipelineError(f"step {failed.step}: there is no checkpoint to go back to")
        # From where the checkpoint would have gone on: it may lie in or before an older gap.
        gap = Gap(found.step, failed.step, self.resumed(found).cursor, failed.cursor)
        self._gaps.append(gap)
        self._write()
        told = RolledBack(
            step=found.step,
            given_up=failed.step,
            samples=gap.samples(self._per_epoch),
            first=(gap.begin.epoch, gap.begin.position),
            next=(gap.end.epoch, gap.end.position),
            rollbacks=len(self._gaps),
            samples_left_out=sum(g.samples(self._per_epoch) for g in self._gaps),
        )
        # The stream is not opened anew: it goes on where it is, behind the samples left out.
        return TrainState(found.step, failed.cursor), told

    def _write(self) -> None:
        error = None
        if self._world.rank == 0:
            body = {"gaps": [dataclasses.asdict(gap) for gap in self._gaps]}
            try:
                text = json.dumps(body, indent=1).encode()
                write_record(self._run, layout.ROLLBACKS, self._writer, text)
            except OSError as failure:
                error = f"the roll-back cannot be written down: {failure}"
        # A gap that only memory knew would come back as samples after a restart.
        self._world.agree(error)
