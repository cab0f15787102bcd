"""What a run needs on a number of devices: memory, traffic, time, cost. Nothing is allocated."""

import dataclasses
import math
from typing import Literal

import torch

from model.networks.registry import build_network
from optim.config import OptimConfig
from optim.manifolds import manifold_of
from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.planner import memory as budget
from pipeline.planner.memory import Component, Setting, Traffic, Weights
from pipeline.planner.meta_pass import MetaPass, run_meta_pass, training_flops
from pipeline.planner.step_time import (
    LOOKAHEAD_BYTES,
    MANIFOLD_WORK,
    SLICE_BYTES,
    TANGENT_BYTES,
    Device,
    StepTime,
    manifold_products,
    step_time,
)
from pipeline.run.step_schedule import StepSchedule, make_step_schedule
from pipeline.training.device_flops import DTYPES
from pipeline.training.zero3 import engine_settings, gathered_sizes, persistence


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A run on a number of devices.

    Attributes:
        ranks: devices.
        counts: steps and batches.
        weights: parameters.
        components: memory of the rank that needs most.
        host: bytes of host memory of one rank, by name; the export is rank 0's alone.
        meta_pass: one micro-batch.
        sent: bytes of a rank and step.
        time: of a step.
        device: where.
        images: samples of an epoch.
        lookahead: whether a checkpoint has the slow copy.
        least_flops: of an image's passes, see `training_flops`.
        epochs: of the run.
    """

    ranks: int
    counts: StepSchedule
    weights: Weights
    components: tuple[Component, ...]
    host: dict[str, int]
    meta_pass: MetaPass
    sent: Traffic
    time: StepTime
    device: Device
    images: int
    lookahead: bool
    least_flops: float | None
    epochs: float

    @property
    def peak(self) -> int:
        """Bytes of device memory, the reserve left out."""
        return budget.peak(self.components)

    @property
    def room(self) -> int:
        """Bytes of device memory that a run may fill."""
        return budget.room(int(self.device.memory_gb * 1e9), self.ranks)

    @property
    def fits(self) -> bool:
        """Whether the run fits into the device's memory."""
        return self.peak <= self.room

    @property
    def images_per_s(self) -> float:
        """Of all ranks."""
        return self.ranks * self.counts.rank_batch / self.time.total

    @property
    def mfu(self) -> float | None:
        """Share of the devices' peak; None where the least FLOPs are not known."""
        if self.least_flops is None:
            return None
        return self.least_flops * self.images_per_s / self.ranks / self.device.peak_flops

    @property
    def epoch_s(self) -> float:
        """Seconds of one epoch."""
        return self.images / self.images_per_s

    @property
    def device_hours(self) -> float:
        """Of all ranks over the whole run, evaluations left out."""
        return self.ranks * self.counts.total_steps * self.time.total / 3600


def _meta_pass(config: RunConfig, micro_batch: int) -> MetaPass:
    try:
        return run_meta_pass(config, micro_batch=micro_batch)
    except (NotImplementedError, RuntimeError) as error:
        raise PipelineError(
            f"a network of kind {config.model.kind!r} cannot run on the meta device: {error}"
        ) from error


def weights_of(config: RunConfig) -> tuple[Weights, int]:
    """The network's weights, and the elements of its largest parameter."""
    with torch.device("meta"):
        network = build_network(config.model)
    largest, block = gathered_sizes(network)
    parameters = list(network.parameters())
    matrices = tuple(p.numel() for p in parameters if manifold_of(p) is not None)
    others = tuple(p.numel() for p in parameters if manifold_of(p) is None)
    return Weights(matrices, others, block), largest


def with_increment(config: RunConfig, weights: Weights, device: str) -> RunConfig:
    """The run with the precision that increments have on a device before any audit."""
    kind = "cpu" if device == "cpu" else "cuda"
    rows = math.isqrt(max(weights.matrices, default=0))
    increment = config.optim.precision(kind, rows)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, increment=increment))


def setting_of(
    config: RunConfig, weights: Weights, *, largest: int, ranks: int, device: str = "cpu"
) -> Setting:
    """What decides the memory of a rank, with the bucket sizes that DeepSpeed is given."""
    sizes = (*weights.matrices, *weights.others)
    persist_below = persistence(config.cluster.persist_below, sizes)
    settings = engine_settings(
        train=config.train,
        zero=config.zero,
        micro_batch=1,
        largest=largest,
        block=weights.block,
        persist_below=persist_below,
    )["zero_optimization"]
    return Setting(
        ranks=ranks,
        working=DTYPES[config.train.precision].itemsize,
        lookahead=config.optim.lookahead_steps > 0,
        rounds_factors=config.optim.increment not in ("full", "auto"),
        nadam=config.optim.euclidean == "nadam",
        sub_group=settings["sub_group_size"],
        bucket=settings["reduce_bucket_size"],
        prefetch=settings["stage3_prefetch_bucket_size"],
        live=settings["stage3_max_live_parameters"],
        interleaved=ranks > 1 or device != "cpu",
        persist_below=persist_below,
    )


def memory(weights: Weights, setting: Setting, seen: MetaPass) -> tuple[Component, ...]:
    """Device memory of the rank that needs most, by component."""
    return (
        *budget.persistent(weights, setting),
        *budget.passes(
            weights,
            setting,
            activations=seen.activation_bytes,
            pinned=seen.pinned_weight_bytes,
        ),
        *budget.optimizer_step(weights, setting),
        *budget.export(weights, setting),
    )


def estimate(config: RunConfig, *, ranks: int, device: Device, images: int) -> Estimate:
    """Estimate a run.

    Args:
        config: the run.
        ranks: devices, all training.
        device: each of them.
        images: samples of an epoch.

    Raises:
        PipelineError: the batch does not split over the ranks; the network cannot run on the meta
            device.
    """
    counts = make_step_schedule(config.train, config.checkpoint, samples=images, world_size=ranks)
    weights, largest = weights_of(config)
    config = with_increment(config, weights, device.name)
    setting = setting_of(config, weights, largest=largest, ranks=ranks, device=device.name)
    optim, accumulation = config.optim, config.train.accumulation
    seen = _meta_pass(config, counts.micro_batch)
    sent = budget.traffic(
        weights,
        setting,
        accumulation=accumulation,
        lookahead_steps=optim.lookahead_steps,
        polar_every=optim.polar_every,
    )
    return Estimate(
        ranks=ranks,
        counts=counts,
        weights=weights,
        components=memory(weights, setting, seen),
        host=_host(config, weights, setting),
        meta_pass=seen,
        sent=sent,
        time=step_time(
            device,
            pass_flops=float(accumulation * seen.flops),
            pass_bytes=float(accumulation * seen.moved_bytes),
            manifold_flops=_manifold_flops(weights, ranks, optim),
            manifold_bytes=_manifold_bytes(weights, ranks, optim),
            sent=sent,
            rank_images=counts.rank_batch,
            decoders=max(1, config.data.stream.workers),
        ),
        device=device,
        images=images,
        lookahead=setting.lookahead,
        least_flops=training_flops(config),
        epochs=config.train.epochs,
    )


def _manifold_flops(weights: Weights, ranks: int, optim: OptimConfig) -> float:
    """Products of the rank that owns most matrices."""
    if not weights.matrices:
        return 0.0
    owned = -(-len(weights.matrices) // ranks)
    trivialized = optim.gradient == "trivialized"
    products = manifold_products(optim.retraction, optim.increment) - trivialized
    return products * owned * 2 * max(weights.matrices) ** 1.5


def _manifold_bytes(weights: Weights, ranks: int, optim: OptimConfig) -> float:
    """What the same rank reads and writes beside them."""
    if not weights.matrices:
        return 0.0
    owned = -(-len(weights.matrices) // ranks) * max(weights.matrices)
    slices = budget.shares(weights.matrices, ranks)
    per_slice = SLICE_BYTES + LOOKAHEAD_BYTES * (optim.lookahead_steps > 0)
    per_owned = MANIFOLD_WORK[optim.retraction, optim.increment][1]
    per_owned -= TANGENT_BYTES[optim.increment] * (optim.gradient == "trivialized")
    return float(per_owned * owned + per_slice * slices)


def _host(config: RunConfig, weights: Weights, setting: Setting) -> dict[str, int]:
    ahead = {"data read ahead": config.data.stream.read_ahead_bytes}
    if config.checkpoint.none:
        return ahead
    state = budget.checkpoint_bytes(weights, lookahead=setting.lookahead)
    return {
        "copy of the state for a checkpoint": -(-state // setting.ranks),
        "exported weights (rank 0)": budget.artifact_bytes(weights),
        **ahead,
    }


def recomputed_blocks(
    config: RunConfig, *, ranks: int, micro_batch: int, device: str, room: int
) -> int | Literal["all"]:
    """Fewest blocks, from the first on, that have to be recomputed for a run to fit.

    Args:
        config: the run.
        ranks: devices, all training.
        micro_batch: images of one of them in a pass.
        device: name of the device.
        room: bytes that a run may fill on each.

    Returns:
        All, if that is not enough either.

    Raises:
        PipelineError: the network cannot run on the meta device.
    """
    weights, largest = weights_of(config)
    config = with_increment(config, weights, device)
    setting = setting_of(config, weights, largest=largest, ranks=ranks, device=device)

    def with_recomputed(blocks: int) -> MetaPass:
        train = dataclasses.replace(config.train, activation_checkpointing=blocks)
        return _meta_pass(dataclasses.replace(config, train=train), micro_batch)

    def fits(seen: MetaPass) -> bool:
        return budget.peak(memory(weights, setting, seen)) <= room

    kept = with_recomputed(0)
    if fits(kept):
        return 0
    too_few, found = 0, kept.blocks
    while found - too_few > 1:
        middle = (too_few + found) // 2
        if fits(with_recomputed(middle)):
            found = middle
        else:
            too_few = middle
    return "all" if found == kept.blocks else found


def trials(config: RunConfig, *, ranks: int) -> list[tuple[str, RunConfig, int]]:
    """Changes that need less memory: what to say on the command line, the run, its ranks."""
    train = config.train
    found: list[tuple[str, RunConfig, int]] = []
    recomputing = dataclasses.replace(train, activation_checkpointing="all")
    all_, decided = "--train.activation-checkpointing all", ("all", "auto")
    if train.activation_checkpointing not in decided:
        flag = all_
        found.append((flag, dataclasses.replace(config, train=recomputing), ranks))
    micro_batch = train.global_batch // (ranks * train.accumulation)
    for factor in (2, 4, 8, 16, 32, 64):
        if micro_batch % factor == 0:
            less = dataclasses.replace(recomputing, accumulation=train.accumulation * factor)
            flag = f"--train.accumulation {less.accumulation}"
            if train.activation_checkpointing not in decided:
                flag += f" {all_}"
            found.append((flag, dataclasses.replace(config, train=less), ranks))
        if train.global_batch % (ranks * factor * train.accumulation) == 0:
            found.append((f"{ranks * factor} devices", config, ranks * factor))
    return found
