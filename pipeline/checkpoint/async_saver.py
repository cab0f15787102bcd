"""Checkpoints and artifacts written beside training.

Training waits for the copy of the state to the host and for the export of the weights, which is
collective; one background thread per rank writes. It takes part in no collective and emits nothing:
what has become of a writing is reported from the training thread, by `poll`, `wait` and at the end.
"""

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from typing_extensions import Self

from data_shards.errors import ShardError
from data_shards.storage.store import Store
from model.artifact.artifact import ArtifactInfo
from model.errors import ModelError
from model.networks.config import NetworkConfig
from pipeline.checkpoint.export import Export, take_export, write_export
from pipeline.checkpoint.writer import (
    HostMemory,
    Partitioned,
    Snapshot,
    commit,
    take_snapshot,
    write_snapshot,
)
from pipeline.errors import PipelineError
from pipeline.run import layout
from pipeline.run.distributed import DistributedContext
from pipeline.run.events import CheckpointFailed, CheckpointSaved, Emit
from pipeline.run.lease import fence
from pipeline.run.worker_spec import TrainState

_GIVE_UP_S = 30.0
"""How long a run that has failed still waits for a checkpoint under way."""


@dataclasses.dataclass
class _Writing:
    """One checkpoint under way."""

    step: int
    checkpoint: Store
    artifact: Store
    stall_s: float
    thread: threading.Thread | None = None
    info: ArtifactInfo | None = None
    error: str = ""
    finished_s: float = 0.0


class AsyncSaver:
    """Saves checkpoints of a run, one at a time, in the background.

    Args:
        run: folder of the run.
        world: the ranks; all construct it together.
        engine: whose state is saved.
        network: what an artifact is made of.
        config: the resolved configuration as JSON has it, for every checkpoint.
        timeout_s: how long rank 0 waits for the files of the others.
        context: facts that every artifact carries.
        calibration: training images for networks with stored means, uint8 (B, C, H, W).
        emit: receives CheckpointSaved and CheckpointFailed, on rank 0.
        writer: number of the run's lease under which this process writes.
        class_names: of the samples; every artifact carries them.
    """

    def __init__(
        self,
        run: Store,
        *,
        world: DistributedContext,
        engine: Partitioned,
        network: NetworkConfig,
        config: Mapping[str, Any],
        timeout_s: float,
        context: dict[str, Any],
        calibration: Callable[[], Iterable[Tensor]],
        emit: Emit,
        writer: int = 0,
        class_names: Sequence[str] = (),
    ) -> None:
        self._run, self._world, self._engine = run, world, engine
        self._network, self._config, self._timeout_s = network, config, timeout_s
        self._context, self._calibration, self._emit = context, calibration, emit
        self._writer, self._class_names = writer, class_names
        self._memory = HostMemory()
        # The same on all ranks, new in each execution: a dead one's reports are not taken for ours.
        self._attempt: str = world.share(secrets.token_hex(8))
        self._given_up = threading.Event()
        self._writing: _Writing | None = None
        self._last_error = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the checkpoint under way; the run fails if its last one could not be saved.

        Raises:
            PipelineError: on every rank.
        """
        if kind is not None:
            # A dead rank never reports; what is complete by then is committed all the same.
            if self._writing and self._writing.thread:
                self._writing.thread.join(_GIVE_UP_S)
            self._given_up.set()
            self.poll()
            return
        self.wait()
        # Only the last one counts: a run may lose one in between and still end whole.
        self._world.agree(self._last_error or None)

    def save(self, progress: TrainState) -> None:
        """Begin to save the state after a step; waits for the one under way before.

        Ranks: all call it together.

        Raises:
            PipelineError: a weight is not finite, or cannot be exported; on every rank.
        """
        self.wait()  # its snapshot lies in the buffers that are filled now
        begin = time.perf_counter()
        writing = _Writing(
            step=progress.step,
            checkpoint=self._run.child(layout.written_checkpoint(progress.step, self._writer)),
            artifact=self._run.child(layout.artifact(progress.step)),
            stall_s=0.0,
        )
        # Export before the copy: it is collective, and refuses weights that are not finite.
        export = take_export(self._engine, world=self._world, network=self._network)
        snapshot = take_snapshot(
            self._engine, self._memory, world=self._world, progress=progress, config=self._config
        )
        writing.thread = threading.Thread(
            target=self._write, args=(writing, snapshot, export), name="checkpoint", daemon=True
        )
        writing.stall_s = time.perf_counter() - begin
        self._writing = writing
        writing.thread.start()

    def poll(self) -> None:
        """Report the checkpoint under way if it has ended; waits for nothing."""
        if self._writing and self._writing.thread and not self._writing.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint under way, if there is one, and report it."""
        writing, self._writing = self._writing, None
        if writing is None or writing.thread is None:
            return
        writing.thread.join()
        self._last_error = writing.error and f"step {writing.step} is not kept: {writing.error}"
        # Every rank waits for its own file; one reports.
        if self._world.rank:
            return
        if writing.error or writing.info is None:
            self._emit(CheckpointFailed(writing.step, writing.error))
            return
        self._emit(
            CheckpointSaved(
                step=writing.step,
                checkpoint_url=writing.checkpoint.url,
                artifact_url=writing.artifact.url,
                digest=writing.info.digest,
                residual=writing.info.largest_residual,
                stall_s=writing.stall_s,
                seconds=writing.finished_s,
            )
        )

    def _write(self, writing: _Writing, snapshot: Snapshot, export: Export | None) -> None:
        """Runs on the background thread."""
        begin = time.perf_counter()
        try:
            if export is not None:
                if fence(self._run).number > self._writer:
                    raise PipelineError("another process has taken over the lease of this run")
                # First: a run that dies in between must not resume past a step without artifact.
                context = {**self._context, "step": writing.step}
                writing.info = write_export(
                    writing.artifact,
                    export,
                    context=context,
                    class_names=self._class_names,
                    calibration=self._calibration,
                )
            attempt = f"{self._attempt}-{writing.step}"
            write_snapshot(writing.checkpoint, snapshot, attempt)
            if snapshot.rank == 0:
                commit(
                    writing.checkpoint,
                    snapshot,
                    attempt,
                    timeout_s=self._timeout_s,
                    given_up=self._given_up,
                )
        # Expected of stores: training goes on, the checkpoint before stays the newest.
        except (OSError, ModelError, PipelineError, ShardError) as error:
            writing.error = f"{type(error).__name__}: {error}"
        # Anything else is a fault of the program: reported as well, and shown with its trace.
        except BaseException as error:
            writing.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            writing.finished_s = time.perf_counter() - begin
