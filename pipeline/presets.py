"""Named runs as functions; the command line changes values, never structure."""

import difflib
from collections.abc import Callable

from data_shards.config import StreamConfig
from model.presets import network_preset
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    LossConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.errors import PipelineError


def digits() -> RunConfig:
    """1,797 handwritten digits, 8x8: the whole pipeline in minutes on two CPU cores.

    Chosen on the validation part of the training split (docs/log.md).
    """
    return RunConfig(
        preset="digits",
        model=network_preset("digits"),
        data=DataConfig(source="digits"),
        optim=OptimConfig(lr=5e-3, betas=(0.9, 0.99), lookahead_factor=0.8),
        # The full radius from the first step: in a short run the ramp costs accuracy.
        loss=LossConfig(eps=108 / 255, eps_start=0.875, eps_end=0.875, scale=10.0),
        train=TrainConfig(epochs=65, global_batch=64, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def synthetic() -> RunConfig:
    """Procedural JPEG images, 32x32, ten classes."""
    return RunConfig(
        preset="synthetic",
        model=network_preset("synthetic"),
        data=DataConfig(source="synthetic"),
        optim=OptimConfig(lr=1e-2, betas=(0.9, 0.99), lookahead_factor=0.8),
        loss=LossConfig(eps=36 / 255, eps_start=1.0, eps_end=1.0, scale=10.0),
        train=TrainConfig(epochs=20, global_batch=64, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=250),
    )


def _published(
    name: str, *, epochs: float, batch: int, eps_end: float, workers: int, stream: StreamConfig
) -> RunConfig:
    """LiResNet++ recipe (section 2.3 of its paper) with the manifold optimizer."""
    return RunConfig(
        preset=name,
        model=network_preset(name),
        data=DataConfig(stream=stream),
        optim=OptimConfig(lr=1e-3),
        loss=LossConfig(eps=36 / 255, eps_start=0.1, eps_end=eps_end, eps_ramp=0.5),
        train=TrainConfig(
            epochs=epochs,
            global_batch=batch,
            precision="bf16",
            warmup_epochs=20,
            grad_clip=3.0,
            activation_checkpointing=True,
            log_every=20,
        ),
        checkpoint=CheckpointConfig(every_steps=5000),
        cluster=ClusterConfig(workers=workers, cpus_per_worker=8, device="cuda"),
    )


def _small_images(name: str, *, shift_pixels: int) -> RunConfig:
    stream = StreamConfig(shift_pixels=shift_pixels, flip=True, randaugment=0.5, workers=4)
    return _published(name, epochs=800, batch=256, eps_end=3.0, workers=8, stream=stream)


def cifar10_l32w1024() -> RunConfig:
    """64M parameters."""
    return _small_images("cifar10-L32W1024", shift_pixels=4)


def cifar10_l32w2048() -> RunConfig:
    """256M parameters."""
    return _small_images("cifar10-L32W2048", shift_pixels=4)


def tiny_imagenet_l32w2048() -> RunConfig:
    """256M parameters, 64x64 images, 200 classes."""
    return _small_images("tiny-imagenet-L32W2048", shift_pixels=8)


def _imagenet(name: str, *, workers: int) -> RunConfig:
    stream = StreamConfig(crop="random-resized", flip=True, randaugment=1.0, workers=6)
    return _published(name, epochs=400, batch=1024, eps_end=2.0, workers=workers, stream=stream)


def imagenet_l32w4096() -> RunConfig:
    """1B parameters."""
    return _imagenet("imagenet-L32W4096", workers=8)


def imagenet_2b() -> RunConfig:
    """2B parameters."""
    return _imagenet("imagenet-2B", workers=16)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "synthetic": synthetic,
    "cifar10-L32W1024": cifar10_l32w1024,
    "cifar10-L32W2048": cifar10_l32w2048,
    "tiny-imagenet-L32W2048": tiny_imagenet_l32w2048,
    "imagenet-L32W4096": imagenet_l32w4096,
    "imagenet-2B": imagenet_2b,
}


def run_preset(name: str) -> RunConfig:
    """Configuration of a named run.

    Raises:
        PipelineError: no preset has this name.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise PipelineError(f"unknown preset {name!r}{hint}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]()
