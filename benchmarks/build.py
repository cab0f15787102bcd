"""Memory of a rank while a network is built under ZeRO-3: `python -m benchmarks.build`.

Depth grows with the number of ranks, so that the partition of a rank stays: whatever held the whole
network, and be it for a moment, would grow. Measured is resident memory of each rank through the
code of a training run, `build_engine` and `initialise`; below it the arithmetic of the
billion-parameter network on 8 ranks.
"""

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import tyro

from benchmarks.processes import in_ranks
from benchmarks.report import Row, write_result
from model.networks.lipnext.config import LipNeXtConfig
from optim.zero3_adam import TENSOR_KINDS
from optim.zero_layout import Slot, plan_rounds
from pipeline.config import ClusterConfig, RunConfig, TrainConfig
from pipeline.planner import memory as budget
from pipeline.planner.estimate import setting_of, weights_of
from pipeline.presets.registry import run_preset
from pipeline.run.distributed import join_process_group
from pipeline.training.worker import build_engine

_MB = 1e6
_QR = 5
"""Matrices in float64 that making an orthogonal one takes: random numbers, LAPACK's copy, Q, R, and
Q with its signs."""
TARGET = "building: at most one block"


def run_of(ranks: int, width: int, depth: int) -> RunConfig:
    """A run whose network is that deep, in float32."""
    return RunConfig(
        preset="build",
        model=LipNeXtConfig(
            input_shape=(3, 32, 32), num_classes=10, patch=2, width=width, depth=depth
        ),
        train=TrainConfig(global_batch=ranks),
        cluster=ClusterConfig(launcher="local", device="cpu"),
    )


def resident(config: RunConfig) -> dict[str, int]:
    """Bytes of this rank above its level before: what is built, and the most on the way there."""
    with join_process_group(config.cluster) as world:
        tiny = replace(config, model=replace(cast(LipNeXtConfig, config.model), width=16, depth=1))
        build_engine(tiny, world=world, micro_batch=1).initialise(0)  # imports, makes threads
        gc.collect()
        world.barrier()
        level = _status("VmRSS")
        _forget_peak()
        engine = build_engine(config, world=world, micro_batch=1)
        building, built = _status("VmHWM"), _status("VmRSS")
        _forget_peak()
        engine.initialise(0)
        initialising, initialised = _status("VmHWM"), _status("VmRSS")
        return {
            "building": building - built,
            "initialising": initialising - initialised,
            "held": initialised - level,
        }


def _status(field: str) -> int:
    """Bytes that Linux counts of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def computed(config: RunConfig, ranks: int) -> dict[str, int]:
    """Bytes of a rank: its partition by component, and what it may hold for a moment."""
    weights, largest = weights_of(config)
    setting = setting_of(config, weights, largest=largest, ranks=ranks)
    # The moments and the slow copy come with the first step.
    parts = {
        row.name: row.size
        for row in budget.persistent(weights, setting)
        if row.name not in TENSOR_KINDS
    }
    slots = tuple(
        Slot(str(i), (n,), n, 0, budget.share(n, ranks)) for i, n in enumerate(weights.matrices)
    )
    owned = max(
        sum(slot.numel for slot in slots) for r in plan_rounds(slots, ranks) for slots in r.owned
    )
    return parts | {
        "partition": sum(parts.values()),
        "block": setting.working * weights.block,
        # An owner sends a round's matrices in fp32 and gets its slices of all owners'.
        "exchange": 4 * owned * (2 if ranks > 1 else 1),
        "values": 8 * owned + 8 * _QR * largest,
        "whole": 4 * weights.total,
    }


def measured_rows(width: int, setups: Sequence[tuple[int, int]]) -> list[Row]:
    """A row for each (ranks, depth): the rank that held most."""
    rows = []
    for ranks, depth in setups:
        config = run_of(ranks, width, depth)
        found = in_ranks(ranks, resident, config)
        most = {key: max(row[key] for row in found) / _MB for key in found[0]}
        known = {key: size / _MB for key, size in computed(config, ranks).items()}
        rows.append(
            {
                "what": f"C={width}, {depth} blocks, {ranks} rank(s), MB",
                "network (fp32)": known["whole"],
                "partition, computed": known["partition"],
                "held in the end": most["held"],
                "one block": known["block"],
                "more while building": most["building"],
                "more while initialising": most["initialising"],
                "of that computed": known["exchange"] + known["values"],
                "target": TARGET,
            }
        )
    return rows


def billion_rows(ranks: int) -> list[Row]:
    """The arithmetic of `imagenet-L32W4096`."""
    known = computed(run_preset("imagenet-L32W4096"), ranks)
    labels = {
        "whole": "network (fp32)",
        "partition": "partition, computed",
        "block": "one block",
        "exchange": "more while initialising",
    }
    row = {label: known[key] / _MB for key, label in labels.items()}
    return [{"what": f"imagenet-L32W4096, {ranks} ranks, MB of a device (computed)", **row}]


def main(width: int = 1024, ranks: tuple[int, ...] = (1, 2, 4), depth: int = 4) -> None:
    """Measure and write benchmarks/results/build.md.

    Args:
        width: Channels of the network that is built.
        ranks: Numbers of ranks.
        depth: Blocks for each rank.
    """
    # What is freed goes back to the system at once, so that the peak is of what was held.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = measured_rows(width, [(count, depth * count) for count in ranks])
    billion = computed(run_preset("imagenet-L32W4096"), 8)
    parts = ", ".join(f"{name} {billion[name] / _MB:,.0f}" for name in list(billion) if "(" in name)
    write_result(
        "build",
        [*rows, *billion_rows(8)],
        [
            "Resident memory (Linux) of the rank that held most, above its level after the imports "
            "and a first tiny network; float32, gloo. Partition: working weights, masters, "
            "gradient sums and the reduction bucket; moments come with the first step.",
            "Initialising: an owner makes the values of one round in float64 on the host "
            "(matrices of a round, and the QR of one), which does not depend on the depth.",
            f"imagenet-L32W4096 on 8 ranks, bf16: {parts} MB; the float64 values of a matrix stay "
            f"on the host, {billion['values'] / _MB:,.0f} MB.",
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
