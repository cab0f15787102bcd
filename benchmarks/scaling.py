"""Parallel efficiency of a whole training step under ZeRO-3: `python -m benchmarks.scaling`.

One rank with two threads against two gloo ranks with one thread each, on the same global batch; and
what the manifold optimizer sends at 1, 2, 4 and 8 ranks, against its arithmetic.
"""

import multiprocessing
import os
import socket
import statistics
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import tyro

from benchmarks.report import Row, write_result
from model.config import LipNeXtConfig
from optim.config import OptimConfig
from pipeline.config import ClusterConfig, LossConfig, RunConfig, TrainConfig
from pipeline.ranks import join_world
from pipeline.schedules import Moment
from pipeline.zero3 import Zero3

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
            loss=LossConfig(),
            train=TrainConfig(global_batch=self.batch),
            cluster=ClusterConfig(
                launcher="local", workers=self.ranks, cpus_per_worker=self.threads, device="cpu"
            ),
        )


def _rank(setup: Setup, rank: int, port: int, answer: Connection) -> None:
    """Train a few steps; sends seconds per step and bytes sent per step by the optimizer."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setup.ranks),
        LOCAL_WORLD_SIZE=str(setup.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    # DeepSpeed on torch >= 2.12 calls collectives under their former names.
    warnings.filterwarnings("ignore", category=FutureWarning)
    config = setup.config()
    micro = setup.batch // setup.ranks
    with join_world(config.cluster) as world:
        engine = Zero3(world=world, config=config, micro_batch=micro)
        engine.initialise(0)
        generator = torch.Generator().manual_seed(rank)
        shape = (micro, *config.model.input_shape)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (micro,), generator=generator)
        seconds, sent = [], 0
        for step in range(setup.steps + 1):  # the first one allocates
            world.barrier()
            before, begin = engine.optimizer.exchange.bytes_sent, time.perf_counter()
            engine.step([(images, labels)], Moment(step, 0.0, 1.0, 0.1))
            world.barrier()
            seconds.append(time.perf_counter() - begin)
            sent = engine.optimizer.exchange.bytes_sent - before
        answer.send((statistics.median(seconds[1:]), sent))


def train(setup: Setup) -> list[tuple[float, int]]:
    """Run the setup in processes of its own; (seconds, bytes sent) per step of every rank."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, answers = [], []
    for rank in range(setup.ranks):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(setup, rank, port, sender)))
        processes[-1].start()
        sender.close()
        answers.append(receiver)
    try:
        return [receiver.recv() for receiver in answers]
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def efficiency_rows(width: int, depth: int, batch: int, steps: int, turns: int) -> list[Row]:
    """Wall time of a step by the number of ranks, in turn; the whole machine each time."""
    setups = {
        "1 rank, 2 threads": Setup(1, 2, width, depth, batch, steps),
        "2 ranks, 1 thread each": Setup(2, 1, width, depth, batch, steps),
    }
    found: dict[str, list[float]] = {name: [] for name in setups}
    for _ in range(turns):
        for name, setup in setups.items():
            found[name].append(max(seconds for seconds, _ in train(setup)))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    one, two = medians.values()
    rows: list[dict[str, Any]] = [
        {"what": f"C={width}, {depth} blocks, {256 * batch} tokens: {name}", "s per step": seconds}
        for name, seconds in medians.items()
    ]
    rows[-1] |= {"parallel efficiency": one / two, "target": ">= 0.85"}
    return list(rows)


def volume_rows(width: int, depth: int, ranks: tuple[int, ...]) -> list[Row]:
    """Bytes that the optimizer of a rank sends, the mean of all ranks, and 20 N / W less the own.

    X, G and the direction reach the owner, the tangent and the new X return, in float32: 5 values
    of 4 bytes for each of N entries, of which a rank holds N / W and keeps 1 / W.
    """
    entries = (2 * depth + 1) * width**2
    rows = []
    for count in ranks:
        sent = [sent for _, sent in train(Setup(count, 1, width, depth, 8, 1))]
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
            "Bytes: float32 masters, gradients and directions of the orthogonal matrices alone.",
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
