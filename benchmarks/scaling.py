"""Parallel efficiency of a whole training step under ZeRO-3: `python -m benchmarks.scaling`.

One rank with two threads against two gloo ranks with one thread each, on the same global batch,
beside what the planner makes of pieces that the same processes measured before; and what the
manifold optimizer sends at 1, 2, 4 and 8 ranks, against its arithmetic.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch
import tyro

from benchmarks.calibrate import measure
from benchmarks.processes import in_ranks
from benchmarks.report import Row, write_result
from model.networks.lipnext.config import LipNeXtConfig
from optim.config import OptimConfig
from pipeline.config import ClusterConfig, RunConfig, TrainConfig
from pipeline.planner.calibration import Measured
from pipeline.planner.estimate import estimate
from pipeline.planner.step_time import StepTime, device_of
from pipeline.run.distributed import join_process_group
from pipeline.training.schedules import StepContext
from pipeline.training.worker import build_engine

SIDE = 32  # patches of 2 leave 256 tokens an image


@dataclass(frozen=True)
class Setup:
    """One training: ranks, threads of each, the network and the batch of all ranks."""

    ranks: int
    threads: int
    width: int
    depth: int
    batch: int
    steps: int
    """1: for the bytes alone."""

    def config(self) -> RunConfig:
        """The run; without Lookahead, retractions and audits every step sends the same."""
        return RunConfig(
            preset="scaling",
            model=LipNeXtConfig(
                input_shape=(3, SIDE, SIDE),
                num_classes=10,
                patch=2,
                width=self.width,
                depth=self.depth,
            ),
            optim=OptimConfig(lr=1e-3, lookahead_steps=0, polar_every=0, audit_every=0),
            train=TrainConfig(global_batch=self.batch),
            cluster=ClusterConfig(launcher="local", cpus_per_worker=self.threads, device="cpu"),
        )


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: seconds per step, bytes sent per step by the optimizer, its pieces."""

    seconds: float
    sent: int
    measured: Measured | None


def _rank(setup: Setup) -> Outcome:
    """Train a few steps; before them measure what the planner needs, where steps are timed."""
    config = setup.config()
    micro = setup.batch // setup.ranks
    with join_process_group(config.cluster) as world:
        pieces = measure(world, config, micro) if setup.steps > 1 else None
        engine = build_engine(config, world=world, micro_batch=micro)
        engine.initialise(0)
        generator = torch.Generator().manual_seed(world.rank)
        shape = (micro, *config.model.input_shape)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (micro,), generator=generator)
        seconds, sent = [], 0
        for step in range(setup.steps + 1):  # the first one allocates
            world.barrier()
            before, begin = engine.optimizer.exchange.bytes_sent, time.perf_counter()
            engine.step([(images, labels)], StepContext(step, 0.0, 1.0, 0.1))
            world.barrier()
            seconds.append(time.perf_counter() - begin)
            sent = engine.optimizer.exchange.bytes_sent - before
        return Outcome(statistics.median(seconds[1:]), sent, pieces)


def predicted(setup: Setup, pieces: Measured) -> StepTime:
    """What the planner says of a step without data, from the pieces alone."""
    device = device_of(pieces.device, precision=pieces.precision, nodes=1, measured=pieces)
    found = estimate(setup.config(), ranks=setup.ranks, device=device, images=setup.batch)
    return replace(found.time, data=0.0)


def efficiency_rows(width: int, depth: int, batch: int, steps: int, turns: int) -> list[Row]:
    """Wall time of a step by the number of ranks, in turn; the whole machine each time."""
    setups = {
        "1 rank, 2 threads": Setup(1, 2, width, depth, batch, steps),
        "2 ranks, 1 thread each": Setup(2, 1, width, depth, batch, steps),
    }
    found: dict[str, list[Row]] = {name: [] for name in setups}
    for _ in range(turns):
        for name, setup in setups.items():
            ranks = in_ranks(setup.ranks, _rank, setup)
            found[name].append(
                {"s per step": max(r.seconds for r in ranks)} | _shares(setup, ranks[0].measured)
            )
    rows = []
    for name, times in found.items():
        row = {key: statistics.median(turn[key] for turn in times) for key in times[0]}
        row["predicted / measured"] = row["predicted s"] / row["s per step"]
        rows.append({"what": f"C={width}, {depth} blocks, {256 * batch} tokens: {name}", **row})
    one, two = (row["s per step"] for row in rows)
    rows[-1] |= {"parallel efficiency": one / two, "target": ">= 0.85"}
    return list(rows)


def _shares(setup: Setup, pieces: Measured | None) -> dict[str, float]:
    """What the predicted step consists of; steps that are not timed have no pieces."""
    if pieces is None:
        return {}
    time = predicted(setup, pieces)
    return {
        "predicted s": time.total,
        "passes": time.passes,
        "ZeRO-3": time.zero3,
        "manifold products": time.manifold_products,
        "manifold traffic": time.manifold_traffic,
    }


def volume_rows(width: int, depth: int, ranks: tuple[int, ...]) -> list[Row]:
    """Bytes that the optimizer of a rank sends, the mean of all ranks, and 20 N / W less the own.

    X, G and the direction reach the owner, the tangent and the new X return, in float32: 5 values
    of 4 bytes for each of N entries, of which a rank holds N / W and keeps 1 / W.
    """
    entries = (2 * depth + 1) * width**2
    rows = []
    for count in ranks:
        setup = Setup(count, 1, width, depth, 8, 1)
        sent = [rank.sent for rank in in_ranks(count, _rank, setup)]
        expected = 20 * entries / count * (1 - 1 / count)
        rows.append(
            {
                "what": f"C={width}, {depth} blocks: manifold bytes a rank sends, {count} ranks",
                "measured": statistics.mean(sent),
                "20 N / W (1 - 1/W)": expected,
            }
        )
    return rows


def main(width: int = 512, depth: int = 2, batch: int = 64, steps: int = 3, turns: int = 2) -> None:
    """Measure and write benchmarks/results/scaling.md.

    Args:
        width: channels of the network whose steps are timed.
        depth: its blocks.
        batch: images of all ranks.
        steps: timed steps of a turn.
        turns: how often each setup runs.
    """
    rows = [
        *efficiency_rows(width, depth, batch, steps, turns),
        *volume_rows(64, 4, (1, 2, 4, 8)),
    ]
    write_result(
        "scaling",
        rows,
        [
            f"float32, ZeRO-3 through DeepSpeed, gloo; medians of {steps} steps and {turns} turns.",
            "Predicted from products, collectives and two blocks that the same processes timed: "
            "passes + ZeRO-3 + manifold products + manifold traffic. On a CPU collectives use the "
            "cores of the products, so nothing overlaps. Not predicted: copies into and out of "
            "DeepSpeed's buckets, Euclidean parameters, hooks of each module.",
            "Bytes: float32 masters, gradients and directions of the orthogonal matrices alone.",
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
