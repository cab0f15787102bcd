"""LipNeXt: digits, generated images and the networks of its paper (arXiv 2601.18513)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from data_shards.config import StreamConfig
from model.networks.lipnext.config import LipNeXtConfig
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.losses.emma import EmmaLoss


def digits() -> RunConfig:
    """1,797 handwritten digits, 8x8: the whole pipeline in minutes on two CPU cores.

    Chosen on the validation part of the training split (docs/log.md).
    """
    return RunConfig(
        preset="digits",
        model=LipNeXtConfig(
            input_shape=(1, 8, 8),
            num_classes=10,
            patch=4,
            width=128,
            depth=3,
            alpha=1 / 8,
            pool="flat",
        ),
        data=DataConfig(source="digits", train_split="fit"),
        optim=OptimConfig(lr=1e-2, betas=(0.9, 0.99), lookahead_factor=0.8),
        # The full radius from the first step: in a short run the ramp costs accuracy.
        loss=EmmaLoss(eps=108 / 255, eps_start=1.15, eps_end=1.15, scale=10.0),
        train=TrainConfig(epochs=170, global_batch=128, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def digits_dense() -> RunConfig:
    """The digits as one patch: a grid of one position, where nothing is shifted or pooled."""
    base = digits()
    model = LipNeXtConfig(
        input_shape=(1, 8, 8), num_classes=10, patch=8, width=128, depth=3, alpha=1 / 8
    )
    loss = EmmaLoss(eps=108 / 255, eps_start=0.875, eps_end=0.875, scale=10.0)
    train = dataclasses.replace(base.train, epochs=80, global_batch=64)
    return dataclasses.replace(base, preset="digits-dense", model=model, loss=loss, train=train)


def synthetic() -> RunConfig:
    """Procedural JPEG images, 32x32, ten classes."""
    return RunConfig(
        preset="synthetic",
        model=LipNeXtConfig(input_shape=(3, 32, 32), num_classes=10, patch=4, width=64, depth=4),
        data=DataConfig(source="synthetic", train_split="fit"),
        optim=OptimConfig(lr=1e-2, betas=(0.9, 0.99), lookahead_factor=0.8),
        loss=EmmaLoss(eps=36 / 255, eps_start=1.0, eps_end=1.0, scale=10.0),
        train=TrainConfig(epochs=20, global_batch=64, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=250),
    )


_CIFAR10 = LipNeXtConfig(input_shape=(3, 32, 32), num_classes=10, patch=2, width=1024, depth=32)
_TINY_IMAGENET = LipNeXtConfig(
    input_shape=(3, 64, 64), num_classes=200, patch=4, width=2048, depth=32
)
_IMAGENET = LipNeXtConfig(
    input_shape=(3, 224, 224), num_classes=1000, patch=14, width=4096, depth=32
)


def _published(
    name: str,
    model: LipNeXtConfig,
    *,
    epochs: float,
    batch: int,
    eps_end: float,
    workers: int,
    stream: StreamConfig,
) -> RunConfig:
    """LiResNet++ recipe (section 2.3 of its paper) with the manifold optimizer."""
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(stream=stream),
        optim=OptimConfig(lr=1e-3),
        loss=EmmaLoss(eps=36 / 255, eps_start=0.1, eps_end=eps_end, eps_ramp=0.5),
        train=TrainConfig(
            epochs=epochs,
            global_batch=batch,
            precision="bf16",
            warmup_epochs=20,
            grad_clip=3.0,
            activation_checkpointing="auto",
            log_every=20,
        ),
        checkpoint=CheckpointConfig(every_steps=5000),
        cluster=ClusterConfig(workers=workers, cpus_per_worker=8, device="cuda"),
    )


def _small_images(name: str, model: LipNeXtConfig, *, shift_pixels: int) -> RunConfig:
    stream = StreamConfig(shift_pixels=shift_pixels, flip=True, randaugment=0.5, workers=4)
    return _published(name, model, epochs=800, batch=256, eps_end=3.0, workers=8, stream=stream)


def cifar10_l32w1024() -> RunConfig:
    """64M parameters."""
    return _small_images("cifar10-L32W1024", _CIFAR10, shift_pixels=4)


def cifar10_l32w2048() -> RunConfig:
    """256M parameters."""
    model = dataclasses.replace(_CIFAR10, width=2048)
    return _small_images("cifar10-L32W2048", model, shift_pixels=4)


def tiny_imagenet_l32w2048() -> RunConfig:
    """256M parameters, 64x64 images, 200 classes."""
    return _small_images("tiny-imagenet-L32W2048", _TINY_IMAGENET, shift_pixels=8)


def _imagenet(name: str, model: LipNeXtConfig, *, workers: int) -> RunConfig:
    stream = StreamConfig(crop="random-resized", flip=True, randaugment=1.0, workers=6)
    return _published(
        name, model, epochs=400, batch=1024, eps_end=2.0, workers=workers, stream=stream
    )


def imagenet_l32w4096() -> RunConfig:
    """1B parameters."""
    return _imagenet("imagenet-L32W4096", _IMAGENET, workers=8)


def imagenet_2b() -> RunConfig:
    """2B parameters; the depth is inferred from the size."""
    return _imagenet("imagenet-2B", dataclasses.replace(_IMAGENET, depth=64), workers=16)


class Size(NamedTuple):
    """A LipNeXt named by its size alone: what is not here comes from its shard set."""

    width: int
    depth: int
    images_seen: int
    """Training images of a whole run, repeats included; the epochs follow from it."""


SIZES = {
    "lipnext-S": Size(width=128, depth=4, images_seen=40_000),
    "lipnext-M": Size(width=512, depth=8, images_seen=4_000_000),
    "lipnext-L": Size(width=1024, depth=32, images_seen=40_000_000),
    "lipnext-XL": Size(width=2048, depth=32, images_seen=40_000_000),
}
"""S trains on a laptop's cores, M on a small GPU; L and XL are the published ones of CIFAR-10."""


def _sized(name: str) -> RunConfig:
    """Before it has met a shard set, the shape is that of CIFAR-10."""
    size = SIZES[name]
    model = dataclasses.replace(_CIFAR10, width=size.width, depth=size.depth)
    if size.width >= _CIFAR10.width:
        published = _small_images(name, model, shift_pixels=4)
        return dataclasses.replace(published, data=DataConfig(stream=StreamConfig(workers=4)))
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(train_split="fit"),
        optim=OptimConfig(lr=1e-2, betas=(0.9, 0.99), lookahead_factor=0.8),
        loss=EmmaLoss(eps=36 / 255, eps_start=1.0, eps_end=1.0, scale=10.0),
        train=TrainConfig(epochs=40, global_batch=64, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=500),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits-dense": digits_dense,
    "synthetic": synthetic,
    "cifar10-L32W1024": cifar10_l32w1024,
    "cifar10-L32W2048": cifar10_l32w2048,
    "tiny-imagenet-L32W2048": tiny_imagenet_l32w2048,
    "imagenet-L32W4096": imagenet_l32w4096,
    "imagenet-2B": imagenet_2b,
    **{name: partial(_sized, name) for name in SIZES},
}
