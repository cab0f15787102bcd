"""The pieces of a step, measured on this machine for the planner.

    python -m benchmarks.calibrate PRESET --out FILE [--cluster.workers 2] [--images 8]
    python -m pipeline.plan PRESET --measured FILE

Ranks are processes of this machine, or those of torchrun on several. All ranks do the same at the
same time, as in training, and the slowest counts. `--train.precision`, `--cluster.cpus-per-worker`
and the rest of the run's options hold here as well.
"""

import dataclasses
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
import torch.distributed as dist
import tyro
from torch import nn

from benchmarks.decode import photographs
from benchmarks.manifold_peers import Problem
from benchmarks.optimizer_step import Manifold
from benchmarks.processes import in_ranks
from benchmarks.report import hardware
from data_shards.command_line.help_page import show_help
from data_shards.command_line.parsing import parse_words
from data_shards.format.decode import decode_crop
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network
from optim.collectives import ProcessGroupExchange
from pipeline.command_line.arguments import parse_with_preset
from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.planner.calibration import Measured
from pipeline.planner.meta_pass import DTYPES, run_meta_pass
from pipeline.planner.step_time import manifold_products
from pipeline.run.distributed import DistributedContext, join_process_group
from pipeline.training.objective import Objective
from pipeline.training.schedules import StepContext
from pipeline.training.zero3 import engine_settings, gathered_sizes

REPEATS = 3
DEPTH = 2  # blocks of the pass that is timed
PICTURES = 16
LARGE = 128  # from this size on images are cut from photographs of 375 x 500
Work = Callable[[], object]


_PROG = "python -m benchmarks.calibrate"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        run: The run that will be planned.
        out: File to write.
        images: Images of a rank and pass; 0: as many as the run's micro-batch.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: str
    images: int = 0


def measure(world: DistributedContext, config: RunConfig, images: int) -> Measured:
    """All pieces, for a pass of `images` images. Ranks: all call it together.

    Raises:
        PipelineError: The network is no LipNeXt.
    """
    model = config.model
    if not isinstance(model, LipNeXtConfig):
        raise PipelineError(f"a network of kind {model.kind!r} has no pieces: choose a lipnext")
    width, tokens = model.width, images * int(np.prod(model.grid))
    working = 6 * tokens * width**2 / _seconds(world, _products(world, config, tokens))
    square = torch.randn(2, width, width, device=world.device)
    single = 2 * width**3 / _seconds(world, lambda: torch.mm(square[0], square[1]))
    passing, flops = _passing(world, config, model, images)
    optim = config.optim
    increment = optim.precision(world.device.type, width)
    manifold = Manifold(
        Problem(width, 1, world.device),
        lr=optim.lr,
        retraction=optim.retraction,
        increment=increment,
    ).step
    products = manifold_products(optim.retraction, increment) * 2 * width**3
    exchange, gather, scatter, latency = _collectives(world, config)
    return Measured(
        hardware=hardware(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name(world.device) if _cuda(world) else world.device.type,
        precision=config.train.precision,
        increment=increment,
        ranks=world.size,
        nodes=world.size // int(os.environ["LOCAL_WORLD_SIZE"]),
        width=width,
        tokens=tokens,
        memory_gb=_memory(world) / 1e9,
        working_flops=working,
        single_flops=single,
        pass_efficiency=flops / _seconds(world, passing) / working,
        step_efficiency=products / _seconds(world, manifold) / single,
        exchange_gbps=exchange,
        gather_gbps=gather,
        scatter_gbps=scatter,
        latency_s=latency,
        decode_rate=PICTURES / _seconds(world, _decoding(model)),
        overlap=_cuda(world),
    )


def _cuda(world: DistributedContext) -> bool:
    return world.device.type == "cuda"


def _seconds(world: DistributedContext, work: Work) -> float:
    """Median wall time of a call that all ranks make together, of the slowest rank."""
    work()
    if _cuda(world):
        torch.cuda.synchronize(world.device)
    found = []
    for _ in range(REPEATS):
        world.barrier()
        begin = time.perf_counter()
        work()
        if _cuda(world):
            torch.cuda.synchronize(world.device)
        found.append(time.perf_counter() - begin)
    return max(world.gather(statistics.median(found)))


def _memory(world: DistributedContext) -> float:
    if _cuda(world):
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return psutil.virtual_memory().total / int(os.environ["LOCAL_WORLD_SIZE"])


def _products(world: DistributedContext, config: RunConfig, tokens: int) -> Work:
    """Forward, with regard to the tokens, and with regard to the matrix."""
    width, dtype = config.model.width, DTYPES[config.train.precision]  # type: ignore[attr-defined]
    x, g = torch.randn(2, tokens, width, device=world.device).to(dtype)
    weight = torch.randn(width, width, device=world.device).to(dtype)

    def work() -> None:
        torch.mm(x, weight.mT)
        torch.mm(g, weight)
        torch.mm(g.mT, x)

    return work


def _passing(
    world: DistributedContext, config: RunConfig, model: LipNeXtConfig, images: int
) -> tuple[Work, int]:
    """Forward and backward pass of a network with few blocks, and its FLOPs as counted."""
    short = dataclasses.replace(
        config, model=dataclasses.replace(model, depth=min(model.depth, DEPTH))
    )
    flops = run_meta_pass(short, micro_batch=images).flops
    network = build_network(short.model)
    network.recomputed_blocks = config.train.recomputed(network.block_count)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    objective = Objective(network.to(DTYPES[config.train.precision]), config.loss)
    objective.to(world.device)
    pixels = torch.randint(
        256, (images, *model.input_shape), dtype=torch.uint8, device=world.device
    )
    labels = torch.randint(model.num_classes, (images,), device=world.device)

    def work() -> None:
        objective.zero_grad(set_to_none=True)
        objective(pixels, labels, StepContext(0, 0.0, 1.0, config.loss.eps))[0].backward()

    return work, flops


def _collectives(world: DistributedContext, config: RunConfig) -> tuple[float, float, float, float]:
    """10^9 bits per second that a rank sends in three collectives; seconds of an empty one."""
    size = world.size
    if size == 1:
        return 0.0, 0.0, 0.0, 0.0
    with torch.device("meta"):
        network = build_network(config.model)
        total = sum(p.numel() for p in network.parameters())
    largest, block = gathered_sizes(network)
    settings = engine_settings(
        train=config.train,
        zero=config.zero,
        micro_batch=1,
        largest=largest,
        block=block,
        persist_below=0,
    )["zero_optimization"]
    bucket = min(settings["reduce_bucket_size"], total)
    dtype = DTYPES[config.train.precision]
    exchange = ProcessGroupExchange()

    def empty(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(-(-elements // size) * size, dtype=dtype, device=world.device)

    def all_to_all(buffer: torch.Tensor) -> Work:
        splits = [len(buffer) // size] * size
        return lambda: exchange.all_to_all(buffer, splits, splits)

    matrix, whole, gradients = empty(largest), empty(block, dtype), empty(bucket)
    part, reduced = whole[: len(whole) // size].clone(), gradients[: len(gradients) // size].clone()

    def rate(buffer: torch.Tensor, work: Work) -> float:
        return 8e-9 * buffer.nbytes * (size - 1) / size / _seconds(world, work)

    return (
        rate(matrix, all_to_all(matrix)),
        rate(whole, lambda: dist.all_gather_into_tensor(whole, part)),
        rate(gradients, lambda: dist.reduce_scatter_tensor(reduced, gradients)),
        _seconds(world, all_to_all(empty(size))),
    )


def _decoding(model: LipNeXtConfig) -> Work:
    """Decode and crop as the stream does, on one thread."""
    _, height, width = model.input_shape
    size = (375, 500) if max(height, width) >= LARGE else (height, width)
    words = np.random.default_rng(0).integers(0, 2**64, (PICTURES, 4), dtype=np.uint64)
    pictures = list(zip(photographs(PICTURES, *size), words, strict=True))

    def work() -> None:
        for picture, drawn in pictures:
            decode_crop(picture, "jpg", (height, width), drawn)

    return work


def measured_here(config: RunConfig, images: int) -> Measured:
    """What this rank measures together with the others."""
    # torch >= 2.12 warns of the names that torch 2.11 has for its collectives.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"benchmarks|torch")
    with join_process_group(config.cluster) as world:
        train = config.train
        return measure(
            world, config, images or train.global_batch // (world.size * train.accumulation)
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write a file."""
    words = sys.argv[1:] if arguments is None else arguments
    if any(word in words for word in ("-h", "--help")):
        show_help(Request, None, prog=_PROG, examples={})
        return
    request = parse_with_preset(
        words,
        lambda name, preset, words: parse_words(
            Request,
            words,
            default=Request(run=preset, out=tyro.MISSING),
            prog=_PROG,
        ),
    )
    work = (measured_here, request.run, request.images)
    if "RANK" in os.environ:  # torchrun has started the ranks
        found = measured_here(*work[1:])
        if int(os.environ["RANK"]):
            return
    else:
        found = in_ranks(request.run.cluster.workers, *work)[0]
    Path(request.out).write_text(found.to_json())
    print(found.to_json(), end="")


if __name__ == "__main__":
    main()
