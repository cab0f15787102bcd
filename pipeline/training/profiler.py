"""Where the time of a step goes: a trace of a few steps of rank 0, and what they held in memory."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, schedule

from data_shards.storage.store import Store
from pipeline.run import layout

_PASSED_OVER = 3
"""Steps before the trace begins: they allocate, and DeepSpeed records its order of modules."""
_ROWS = 60
_CUDA_EVENTS = 100_000


@contextlib.contextmanager
def profiled(
    run: Store, steps: int, *, first: int, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Trace `steps` optimizer steps, some steps after the start.

    Writes to `<run>/profile/`: `step-N.trace.json.gz` for Perfetto or chrome://tracing,
    `step-N.txt` (operators by their own time and memory) and, on a GPU, `step-N.memory.pickle` for
    https://docs.pytorch.org/memory_viz. Nothing reads them back.

    Args:
        run: the run folder.
        steps: how many; 0: none, and nothing is measured.
        first: steps done before.
        device: where the rank computes.

    Yields:
        What to call after every step.
    """
    if not steps:
        yield lambda: None
        return
    step = first + _PASSED_OVER + 2  # one more of its own warms the profiler up
    cuda = device.type == "cuda"

    def write(profiler: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # The exporter writes to a local path only; the run folder may be an object store.
            trace = Path(folder) / "trace.json.gz"  # the profiler packs what ends in .gz
            profiler.export_chrome_trace(str(trace))
            run.write(layout.profile(step, trace.name), trace.read_bytes())
            averages = profiler.key_averages()
            time, memory = (
                averages.table(sort_by=f"self_{device.type}_{what}", row_limit=_ROWS)
                for what in ("time_total", "memory_usage")
            )
            run.write(layout.profile(step, "txt"), f"{time}\n\n{memory}\n".encode())
            if cuda:
                snapshot = Path(folder) / "memory.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))
                # Recording costs time at every allocation, and nobody reads what follows.
                torch.cuda.memory._record_memory_history(enabled=None)
                run.write(layout.profile(step, snapshot.name), snapshot.read_bytes())

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=_CUDA_EVENTS)
    # repeat=1: one trace per execution; a profiler that ran on would slow every step.
    with torch.profiler.profile(
        activities=activities,
        schedule=schedule(wait=_PASSED_OVER, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
        record_shapes=True,
    ) as profiler:
        yield profiler.step
