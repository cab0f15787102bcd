"""A run that makes no step any more: found, written down with the rank that it waits for, ended.

Every rank watches its own training thread from another one. When a thread has stood still for too
long, its rank looks at what all ranks last said of themselves (`heartbeat.py`), writes the stacks
of its threads into the run folder and ends its process hard, so that whoever started the ranks can
start them anew. A rank whose process has been stopped cannot do so; its peers, which wait for it in
a collective, name it.
"""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from data_shards.errors import ShardError
from data_shards.storage.store import Store
from pipeline.config import ClusterConfig
from pipeline.resilience.device_progress import DeviceProgress, collectives_begun
from pipeline.resilience.heartbeat import Beat, HeartbeatStore, Phase, behind
from pipeline.run.distributed import DistributedContext
from pipeline.run.events import Emit, Hung
from pipeline.run.layout import hang_report

HUNG = 124
"""Exit status of a process that was ended because the run had stood still."""
_LONGEST_INTERVAL_S = 5.0
_FIRST_STEP = 5
"""Multiple of the limit for the first step: kernels are built and memory is found."""
_REPORT_S = 3.0
"""What a process that ends leaves for its own report, and for those of its peers."""
_WAITING = ("/torch/distributed/", "/deepspeed/", "/optim/collectives.py")
"""Code in which a thread waits for other ranks."""


@contextlib.contextmanager
def watched(
    world: DistributedContext, cluster: ClusterConfig, *, step: int, run: Store, emit: Emit
) -> Iterator["HangDetector"]:
    """Watch the calling thread while it trains.

    Ranks: all enter together.

    Args:
        world: the ranks.
        cluster: `hang_timeout_s`; 0 switches the watching off.
        step: steps done before.
        run: folder of the run; gets `hangs/`.
        emit: receives Hung; of the ranks that still answer the first one calls it.
    """
    detector = HangDetector(world, cluster, step=step, run=run, emit=emit)
    try:
        yield detector
    finally:
        detector.close()


class HangDetector:
    """Watches the thread that constructs it; see `watched`."""

    def __init__(
        self,
        world: DistributedContext,
        cluster: ClusterConfig,
        *,
        step: int,
        run: Store,
        emit: Emit,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._world, self._run, self._emit, self._end = world, run, emit, end
        self._limit_s = float(cluster.hang_timeout_s)
        # A checkpoint may wait for a store as long as a collective may wait for it.
        self._writing_s = float(max(cluster.hang_timeout_s, cluster.collective_timeout_s))
        self._thread = threading.get_ident()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._tick = 0
        self._first = step
        # One tuple, replaced as a whole: the other thread never sees half of it, without a lock.
        self._now = (step, Phase.DATA, time.monotonic())
        self._heartbeats: HeartbeatStore | None = None
        self._progress: DeviceProgress | None = None
        if not self._limit_s:
            return
        interval_s = min(_LONGEST_INTERVAL_S, self._limit_s / 10)
        if world.device.type == "cuda":
            self._progress = DeviceProgress(world.device, interval_s)
        if world.size > 1:
            self._heartbeats = HeartbeatStore(world, self._own_beat, interval_s)
        arguments = (interval_s,)
        threading.Thread(
            target=self._watch, args=arguments, name="hang-detector", daemon=True
        ).start()

    def beat(self, step: int, phase: Phase) -> None:
        """The training thread, `step` steps done, begins a phase; costs one assignment."""
        self._now = (step, phase, time.monotonic())

    def close(self) -> None:
        """Watch no longer."""
        with self._lock:  # not in the middle of an ending
            self._closed.set()
        if self._heartbeats is not None:
            self._heartbeats.close()
        if self._progress is not None:
            self._progress.close()

    def _own_beat(self) -> Beat:
        step, phase, since = self._now
        limit = self._writing_s if phase == Phase.CHECKPOINT else self._limit_s
        if step == self._first:
            # Also the first step of a resumed run, which builds kernels as well.
            limit *= _FIRST_STEP
        waits, place = _place(self._thread)
        begun = -1
        if self._progress is not None:
            # With NCCL a collective returns at once: its rank waits in whatever needs the device.
            waits = waits or self._progress.blocked()
            begun = collectives_begun()
        self._tick += 1
        overdue = time.monotonic() - since > limit
        return Beat(step, phase, overdue, waits, place, self._tick, begun)

    def _watch(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            own = self._own_beat()
            if not own.overdue:
                if self._heartbeats is not None:
                    self._heartbeats.rest()
                continue
            beats = [own] if self._heartbeats is None else self._heartbeats.beats()
            # Not watched for long enough: a rank named too early would be the wrong one.
            if beats is None:
                continue
            late = behind(beats)
            if any(not beat.overdue for beat in (beats[rank] for rank in late) if beat):
                continue  # slow, yet within its own time: a checkpoint on a slow store
            with self._lock:
                if not self._closed.is_set():
                    self._end_all(own, beats, late)
                return

    def _end_all(self, own: Beat, beats: Sequence[Beat | None], late: list[int]) -> None:
        try:
            self._write_report(own, beats, late)
        finally:  # also where nothing can be said, on a full disk
            # Not an exception: the training thread stands in a collective that none can reach.
            self._end(HUNG)

    def _write_report(self, own: Beat, beats: Sequence[Beat | None], late: list[int]) -> None:
        text, stacks = self._text(beats, late), _stacks()
        name = hang_report(own.step + 1, self._world.rank)
        with contextlib.suppress(OSError):
            sys.stderr.write(f"rank {self._world.rank}: {text}\n{stacks}")
            sys.stderr.flush()

        def report() -> None:
            # First the event: a store that does not answer must not hold it back.
            if self._world.rank == min(r for r, beat in enumerate(beats) if beat is not None):
                self._emit(Hung(own.step + 1, late, text, self._run.child(name).url))
            with contextlib.suppress(OSError, ShardError):  # they are in the log as well
                self._run.write(name, f"{text}\n\n{stacks}".encode())

        threading.Thread(target=report, daemon=True).start()
        # A fixed time and no join: a store may never answer, and peers report as well meanwhile.
        time.sleep(_REPORT_S)

    def _text(self, beats: Sequence[Beat | None], late: list[int]) -> str:
        """What is known of every rank, the ones to blame first."""
        lines = [f"no step within {self._limit_s:g} s (cluster.hang_timeout_s)"]
        for rank in late:
            what = (
                "does not answer: its process is stopped, or its node or network is gone"
                if beats[rank] is None
                else "keeps the others waiting"
            )
            lines.append(f"rank {rank} ({self._world.hosts[rank]}) {what}")
        if not late:
            lines.append("no rank stands out")
        lines += [f"rank {rank}: {beat}" for rank, beat in enumerate(beats) if beat is not None]
        return "; ".join(lines)


def _place(thread: int) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and what it executes."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False, "its end"
    code = frame.f_code
    file = code.co_filename.replace(os.sep, "/")
    short = "/".join(file.split("/")[-2:])
    waits = any(part in file for part in _WAITING)
    return waits, f"{short}:{frame.f_lineno} in {code.co_name}"


def _stacks() -> str:
    """Stacks of all threads of this process, or why there are none."""
    try:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:
        return f"no stacks: {error}"
