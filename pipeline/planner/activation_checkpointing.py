"""`--train.activation-checkpointing auto`: decided by the ranks when they have their devices."""

import dataclasses
from typing import Literal

import torch

from pipeline.config import RunConfig, TrainConfig
from pipeline.errors import PipelineError
from pipeline.planner.estimate import recomputed_blocks
from pipeline.planner.memory import room
from pipeline.run.distributed import DistributedContext


def free_memory(device: torch.device) -> int | None:
    """Bytes of a device that a run may fill; None on a CPU, whose memory is not the run's own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def decided(config: RunConfig, world: DistributedContext) -> TrainConfig:
    """The loop with as many blocks recomputed as the device with the least free memory asks for.

    On a CPU all blocks are kept until memory lacks.

    Ranks: all call it together and have the same answer.

    Args:
        config: the run as it was asked for.
        world: the ranks.

    Raises:
        PipelineError: the network cannot run on the meta device, on every rank.
    """
    if config.train.activation_checkpointing != "auto":
        return config.train
    free = world.gather(free_memory(world.device))
    if None in free:
        return config.train
    blocks: int | Literal["all"] = 0
    error = None
    if world.rank == 0:
        try:
            blocks = recomputed_blocks(
                config,
                ranks=world.size,
                micro_batch=config.train.global_batch // (world.size * config.train.accumulation),
                device=world.device.type,
                room=room(min(free), world.size),
            )
        except PipelineError as refused:
            error = f"train.activation_checkpointing=auto: {refused}; give none, all or a number"
    world.agree(error)
    return dataclasses.replace(config.train, activation_checkpointing=world.share(blocks))
