"""Steps of small networks under ZeRO-3 beside a plain loop: `python -m benchmarks.small_steps`.

The plain loop, one rank, and two ranks of one thread each, on the same global batch, take turns in
one run: the others wait meanwhile.
"""

import dataclasses
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
import tyro

from benchmarks.processes import in_ranks
from benchmarks.report import Row, write_result
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network
from optim.config import OptimConfig
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from pipeline.config import ClusterConfig, RunConfig, TrainConfig
from pipeline.run.distributed import join_process_group
from pipeline.training.objective import Objective
from pipeline.training.schedules import StepContext
from pipeline.training.worker import build_engine

ONE_RANK, DIGITS, CIFAR = 1.2, 1.6, 1.8


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and its global batch.

    Attributes:
        name: of the table.
        config: the run.
        speedup: how much faster two ranks shall be than one.
        steps: of a turn; a multiple of those between two Lookahead synchronisations.
    """

    name: str
    config: RunConfig
    speedup: float
    steps: int


def workload(
    shape: tuple[int, int, int], width: int, depth: int, *, speedup: float, steps: int
) -> Workload:
    """Patches of 2, batches of 64."""
    model = LipNeXtConfig(input_shape=shape, num_classes=10, patch=2, width=width, depth=depth)
    config = RunConfig(
        preset="steps",
        model=model,
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(global_batch=64),
        cluster=ClusterConfig(launcher="local", cpus_per_worker=1, device="cpu"),
    )
    name = f"{'x'.join(map(str, shape))}, {width} channels, {depth} blocks"
    return Workload(name, config, speedup, steps)


@dataclasses.dataclass(frozen=True)
class Turns:
    """Lets one contestant after the other work; a process waits without using its core.

    Attributes:
        barrier: all processes of all contestants.
        contestants: their number.
        rounds: how often each has its turn.
        steps: of a turn.
    """

    barrier: Barrier
    contestants: int
    rounds: int
    steps: int

    def take(self, own: int, step: Callable[[], object]) -> tuple[float, float]:
        """Medians over the turns of contestant `own`: wall and processor seconds per step."""
        step()
        wall, processor = [], []
        for turn in range(self.contestants * self.rounds):
            self.barrier.wait()
            if turn % self.contestants != own:
                continue
            begin, spent = time.perf_counter(), time.process_time()
            for _ in range(self.steps):
                step()
            wall.append((time.perf_counter() - begin) / self.steps)
            processor.append((time.process_time() - spent) / self.steps)
        self.barrier.wait()
        return statistics.median(wall), statistics.median(processor)


def _batch(config: RunConfig, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (size, *config.model.input_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    return images, torch.randint(0, config.model.num_classes, (size,))


def plain_loop(config: RunConfig, turns: Turns) -> tuple[float, float]:
    """Steps of the same network by the reference optimizer, without ZeRO-3."""
    torch.set_num_threads(1)
    network = build_network(config.model)
    network.initialise(0)
    objective = Objective(network, config.loss)
    named = list(network.named_parameters())
    optimizer = ReferenceManifoldAdam(parameter_groups(named, config.optim), config.optim)
    images, labels = _batch(config, config.train.global_batch)

    def step() -> None:
        loss, _ = objective(images, labels, StepContext(0, 0.0, 1.0, 0.1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return turns.take(0, step)


def rank(config: RunConfig, turns: Turns, own: int) -> tuple[float, float]:
    """Steps of one rank of the training job."""
    with join_process_group(config.cluster) as world:
        micro = config.train.global_batch // world.size
        engine = build_engine(config, world=world, micro_batch=micro)
        engine.initialise(0)
        batch = _batch(config, micro)
        return turns.take(own, lambda: engine.step([batch], StepContext(0, 0.0, 1.0, 0.1)))


def rows_of(work: Workload, rounds: int) -> list[Row]:
    """The three contestants on one workload."""
    by_module = dataclasses.replace(
        work.config, cluster=dataclasses.replace(work.config.cluster, persist_below=0)
    )
    contestants: list[tuple[str, int, Callable[..., Any], tuple[Any, ...]]] = [
        ("plain loop", 1, plain_loop, (work.config,)),
        ("1 rank", 1, rank, (work.config,)),
        ("2 ranks", 2, rank, (work.config,)),
        ("2 ranks, persist_below 0", 2, rank, (by_module,)),
    ]
    barrier = multiprocessing.get_context("spawn").Barrier(sum(c[1] for c in contestants))
    turns = Turns(barrier, len(contestants), rounds, work.steps)
    found: list[list[tuple[float, float]]] = [[] for _ in contestants]

    def run(own: int) -> None:
        _, ranks, function, arguments = contestants[own]
        extra = () if own == 0 else (own,)
        try:
            found[own] = in_ranks(ranks, function, *arguments, turns, *extra)
        except BaseException:
            barrier.abort()  # the others would wait for it
            raise

    threads = [threading.Thread(target=run, args=(own,)) for own in range(len(contestants))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows: list[Row] = [
        {
            "what": f"{work.name}: {contestant[0]}",
            "ms per step": 1e3 * max(wall for wall, _ in times),
            "processor ms of a rank": 1e3 * max(processor for _, processor in times),
        }
        for contestant, times in zip(contestants, found, strict=True)
    ]
    plain, one, two, _ = rows
    one |= _ratio("times the plain loop", one, plain) | {"target": f"<= {ONE_RANK:g}"}
    two |= _ratio("times as fast as 1 rank", one, two) | {"target": f">= {work.speedup:g}"}
    return rows


def _ratio(name: str, above: Row, below: Row) -> Row:
    processor = "processor ms of a rank"
    return {
        name: above["ms per step"] / below["ms per step"],
        "the same in processor time": above[processor] / below[processor],
    }


def main(rounds: int = 5, width: int = 512) -> None:
    """Measure and record the table.

    Args:
        rounds: turns of each contestant.
        width: channels of the network of 3x32x32.
    """
    rows = rows_of(workload((1, 8, 8), 192, 4, speedup=DIGITS, steps=12), rounds)
    rows += rows_of(workload((3, 32, 32), width, 2, speedup=CIFAR, steps=6), max(1, rounds // 2))
    notes = [
        "Global batch 64, patches of 2, one thread each; medians of turns of 12 and 6 steps. Two "
        "ranks need two idle cores: beside other work the clock shows that work, and processor "
        "time leaves out what a rank waits for.",
    ]
    write_result("small_steps", rows, notes)


if __name__ == "__main__":
    tyro.cli(main)
