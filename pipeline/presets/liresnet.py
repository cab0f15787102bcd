"""LiResNet++ (arXiv 2310.02513), BRONet (arXiv 2505.15174): digits and the papers' networks."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from data_shards.config import StreamConfig
from model.networks.config import NetworkConfig
from model.networks.liresnet.bronet import BRONetConfig
from model.networks.liresnet.network import LiResNetConfig
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.losses.emma import EmmaLoss
from pipeline.losses.logit_annealing import LogitAnnealingLoss


def _nadam(lr: float, lookahead_factor: float = 0.5) -> OptimConfig:
    """NAdam in Lookahead; no parameter is constrained, so nothing is retracted or audited."""
    return OptimConfig(lr=lr, lookahead_factor=lookahead_factor, polar_every=0, audit_every=0)


_DIGITS: dict[str, Any] = {
    "input_shape": (1, 8, 8),
    "num_classes": 10,
    "stem_kernel": 4,
    "stem_padding": 1,
    "width": 64,
    "depth": 4,
    "neck_patch": 2,
    "dense_width": 128,
    "dense_layers": 2,
}


def _digits(name: str, model: NetworkConfig) -> RunConfig:
    """Chosen on the validation part of the training split (docs/log.md)."""
    optim = dataclasses.replace(_nadam(5e-3, lookahead_factor=0.8), betas=(0.9, 0.99))
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(source="digits", train_split="fit"),
        optim=optim,
        loss=EmmaLoss(eps=108 / 255, eps_start=1.1, eps_end=1.1, scale=3.0),
        train=TrainConfig(epochs=30, global_batch=64, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def digits_liresnet() -> RunConfig:
    """LiResNet on digits."""
    return _digits("digits-liresnet", LiResNetConfig(**_DIGITS))


def digits_bronet() -> RunConfig:
    """BRONet on digits."""
    return _digits("digits-bronet", BRONetConfig(**_DIGITS, rank=32))


_CIFAR10: dict[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 10, "width": 512}
_CIFAR100: dict[str, Any] = {**_CIFAR10, "num_classes": 100}
_TINY_IMAGENET: dict[str, Any] = {"input_shape": (3, 64, 64), "num_classes": 200, "width": 512}
_IMAGENET: dict[str, Any] = {
    "input_shape": (3, 224, 224),
    "num_classes": 1000,
    "stem_kernel": 14,
    "stem_stride": 14,
    "stem_padding": 0,
    "width": 588,
}


def _published(
    name: str, model: NetworkConfig, stream: StreamConfig, *, annealing: bool = False
) -> RunConfig:
    """The recipe of the papers without generated images, and without BRONet's weight decay."""
    large = model.input_shape[1] > 64
    ramp: dict[str, Any] = {
        "eps": 36 / 255,
        "eps_start": 0.1,
        "eps_end": 2.0 if large else 3.0,
        "eps_ramp": 0.5,
    }
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(stream=stream),
        optim=_nadam(1e-3),
        loss=LogitAnnealingLoss(**ramp, offset=2.0) if annealing else EmmaLoss(**ramp),
        train=TrainConfig(
            epochs=400 if large else 800,
            global_batch=1024 if large else 256,
            warmup_epochs=20,
            grad_clip=3.0,
            log_every=20,
        ),
        checkpoint=CheckpointConfig(every_steps=5000),
        cluster=ClusterConfig(workers=8 if large else 4, cpus_per_worker=8, device="cuda"),
    )


def _small_images(shift_pixels: int) -> StreamConfig:
    return StreamConfig(shift_pixels=shift_pixels, flip=True, randaugment=0.5, workers=4)


_LARGE_IMAGES = StreamConfig(crop="random-resized", flip=True, randaugment=1.0, workers=6)
_STREAMS = {
    "cifar10": _small_images(4),
    "cifar100": _small_images(4),
    "tiny-imagenet": _small_images(8),
    "imagenet": _LARGE_IMAGES,
}
_LIRESNETS = {
    "cifar10": LiResNetConfig(**_CIFAR10),
    "cifar100": LiResNetConfig(**_CIFAR100),
    "tiny-imagenet": LiResNetConfig(**_TINY_IMAGENET),
    "imagenet": LiResNetConfig(**_IMAGENET),
}
_BRONETS = {
    "cifar10": BRONetConfig(**_CIFAR10, rank=256),
    "cifar100": BRONetConfig(**_CIFAR100, rank=256),
    "tiny-imagenet": BRONetConfig(
        **_TINY_IMAGENET, rank=64, depth=6, neck="reflection", dense_layers=4, dense_rank=256
    ),
    "imagenet": BRONetConfig(
        **_IMAGENET, rank=294, linear_depth=6, depth=8, grow=True, neck="pool", neck_patch=8
    ),
}


def _liresnet(name: str) -> RunConfig:
    data = name.removesuffix("-liresnet")
    return _published(name, _LIRESNETS[data], _STREAMS[data])


def _bronet(name: str) -> RunConfig:
    data = name.removesuffix("-bronet")
    return _published(name, _BRONETS[data], _STREAMS[data], annealing=True)


# Names are written out, so that a search for one ends here.
_LIRESNET = ("cifar10-liresnet", "cifar100-liresnet", "tiny-imagenet-liresnet", "imagenet-liresnet")
_BRONET = ("cifar10-bronet", "cifar100-bronet", "tiny-imagenet-bronet", "imagenet-bronet")

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits-liresnet": digits_liresnet,
    "digits-bronet": digits_bronet,
    **{name: partial(_liresnet, name) for name in _LIRESNET},
    **{name: partial(_bronet, name) for name in _BRONET},
}
