"""Small runs that the tests of this room share, and the worlds in which ranks execute them."""

import contextlib
import dataclasses
import os
import warnings

import torch

from model.config import LipNeXtConfig
from optim.config import OptimConfig
from pipeline.config import ClusterConfig, LossConfig, RunConfig, TrainConfig
from pipeline.ranks import join_world


def small_model(**changes) -> LipNeXtConfig:
    """1x8x8 images, width 20: 400 elements are not divisible by 3, nor 20 rows by 8."""
    settings = {
        "input_shape": (1, 8, 8),
        "num_classes": 10,
        "patch": 2,
        "width": 20,
        "depth": 2,
        "alpha": 1 / 8,
        **changes,
    }
    return LipNeXtConfig(**settings)


def small_run(**parts) -> RunConfig:
    """A run on 1x8x8 images; `parts` replace whole sections of the configuration."""
    base = RunConfig(
        preset="test",
        model=small_model(),
        optim=OptimConfig(lr=1e-2, eps=1e-5, lookahead_steps=7, polar_every=5),
        loss=LossConfig(eps=36 / 255, eps_start=1.0, eps_end=1.0, scale=4.0),
        train=TrainConfig(global_batch=24, epochs=1, warmup_epochs=0),
        cluster=ClusterConfig(launcher="local", device="cpu"),
    )
    return dataclasses.replace(base, **parts)


@contextlib.contextmanager
def rank_world(rank: int, world_size: int):
    """The world of a rank that tests.harness started."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    with join_world(ClusterConfig(launcher="local", device="cpu")) as world:
        yield world


def batches(steps: int, batch: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random uint8 images (B, 1, 8, 8) and labels whose class shows in the brightness of a row."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        labels = torch.randint(10, (batch,), generator=generator)
        images = torch.randint(0, 100, (batch, 1, 8, 8), generator=generator)
        images[torch.arange(batch), 0, labels % 8] += 100 + 5 * (labels[:, None] // 8)
        out.append((images.to(torch.uint8), labels))
    return out
