"""Saving the training state, beside DeepSpeed's own: python -m benchmarks.checkpoint.

One rank holds the whole state of a LipNeXt under ZeRO-3 and saves it in turns: with this project's
checkpoints (training waits for the copy alone) and with DeepSpeed's `save_checkpoint` (training
waits to the end). Both write the same tensors: masters, two moments, slow copy, tangent sum.
"""

import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from torch import Tensor

from benchmarks.report import Row, write_result
from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from optim.zero_layout import Slot
from pipeline.checkpoint.export import take_export
from pipeline.checkpoint.writer import HostMemory, commit, take_snapshot, write_snapshot
from pipeline.config import ClusterConfig, RunConfig
from pipeline.presets.registry import run_preset
from pipeline.run.distributed import DistributedContext, join_process_group
from pipeline.run.worker_spec import TrainState
from pipeline.training.worker import build_engine
from pipeline.training.zero3 import Zero3

_PRESET = "cifar10-L32W2048"


@dataclasses.dataclass
class Times:
    """Seconds of one save: what training waits for, and until the bytes are on the disk."""

    stall: float
    total: float


def make_engine(world: DistributedContext, config: RunConfig) -> Zero3:
    """The network under ZeRO-3, matrices the identity, the state small random numbers."""
    engine = build_engine(config, world=world, micro_batch=1)

    def value(slot: Slot) -> Tensor:
        square = len(slot.shape) == 2 and slot.shape[0] == slot.shape[1]
        return torch.eye(slot.shape[0]).double() if square else torch.ones(slot.shape).double()

    engine.optimizer.initialise(value)
    generator = torch.Generator().manual_seed(0)
    for kind, _, tensor in engine.optimizer.partitioned_state():
        if kind not in ("master", "slow"):
            tensor.normal_(std=1e-3, generator=generator)
    return engine


def ours(
    engine: Zero3, world: DistributedContext, config: RunConfig, memory: HostMemory, place: Path
) -> Times:
    """Copy, then what the background thread does: write, sync, digest, commit."""
    progress = TrainState(1, Cursor(seed=0))
    folder = Store(str(place))
    resolved = json.loads(config.to_json())
    begin = time.perf_counter()
    snapshot = take_snapshot(engine, memory, world=world, progress=progress, config=resolved)
    stall = time.perf_counter() - begin
    write_snapshot(folder, snapshot, "benchmark")
    commit(folder, snapshot, "benchmark", timeout_s=60)
    return Times(stall, time.perf_counter() - begin)


def deepspeed(engine: Zero3, place: Path) -> Times:
    """DeepSpeed's save, which leaves the bytes to the system's cache, then a synchronisation."""
    begin = time.perf_counter()
    engine._engine.save_checkpoint(str(place), tag="step")
    stall = time.perf_counter() - begin
    for path in place.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    return Times(stall, time.perf_counter() - begin)


def written(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(config: RunConfig, folder: Path, repeats: int, *, with_export: bool) -> list[Row]:
    """Save in turns and compare the medians."""
    with join_process_group(config.cluster) as world:
        engine = make_engine(world, config)
        memory = HostMemory()
        saves: dict[str, Callable[[Path], Times]] = {
            "this project": lambda place: ours(engine, world, config, memory, place),
            "DeepSpeed save_checkpoint": lambda place: deepspeed(engine, place),
        }
        times: dict[str, list[Times]] = {name: [] for name in saves}
        sizes: dict[str, int] = {}
        for turn in range(repeats + 1):  # the first one makes the buffers and warms up
            for name, save in saves.items():
                place = folder / "save"
                found = save(place)
                sizes[name] = written(place)
                shutil.rmtree(place)
                if turn:
                    times[name].append(found)
        extra: list[Row] = []
        if with_export:
            begin = time.perf_counter()
            take_export(engine, world=world, network=config.model)
            waited = time.perf_counter() - begin
            extra = [{"what": "export of the artifact's weights, on top", "stall s": waited}]
        parameters = engine.parameter_count
    rows: list[dict[str, object]] = [
        {
            "what": name,
            "stall s": statistics.median(t.stall for t in found),
            "total s": statistics.median(t.total for t in found),
            "GB": sizes[name] / 1e9,
            "parameters": parameters,
        }
        for name, found in times.items()
    ]
    own, peer = rows
    ratios = {
        "what": "ratio",
        **{key: own[key] / peer[key] for key in ("stall s", "total s")},  # type: ignore[operator]
        "GB": own["GB"] / peer["GB"],  # type: ignore[operator]
        "target": "stall <= 0.3, total <= 1.2",
    }
    return [*rows, ratios, *extra]


def main(
    width: int = 2048,
    depth: int = 32,
    repeats: int = 3,
    folder: Path | None = None,
    export: bool = False,
) -> None:
    """Measure and write benchmarks/results/checkpoint.md.

    Args:
        width: channels of the network; 2048 and depth 32 are 273 M parameters.
        depth: its blocks.
        repeats: turns that count.
        folder: where to save; default: a temporary one.
        export: also time the float64 projection of an artifact's weights (minutes on a CPU).
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    preset = run_preset(_PRESET)
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(cast(Any, preset.model), width=width, depth=depth),
        cluster=ClusterConfig(launcher="local", device="cpu"),
    )
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rows = measure(config, Path(place), repeats, with_export=export)
    notes = [
        f"LipNeXt of width {width} and depth {depth}, bf16 with fp32 masters, one gloo rank, local "
        f"disk; medians of {repeats} turns, wall time.",
        "Totals end when the bytes are on the disk: ours synchronises its file, DeepSpeed's are "
        "synchronised after it has returned. Ours also hashes every byte.",
    ]
    write_result("checkpoint", rows, notes)


if __name__ == "__main__":
    tyro.cli(main)
