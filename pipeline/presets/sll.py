"""SLL and CPL (arXiv 2303.03169) and AOL (arXiv 2208.03160): digits and their papers' networks."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from data_shards.config import StreamConfig
from model.networks.config import NetworkConfig
from model.networks.sll.aol import AolConfig
from model.networks.sll.network import SllConfig
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.losses.emma import EmmaLoss
from pipeline.losses.offset import OffsetLoss

_DIGITS = (1, 8, 8)


def _adam(lr: float) -> OptimConfig:
    """Adam as in the SLL paper; no parameter is constrained, so nothing is retracted or audited."""
    return OptimConfig(
        lr=lr,
        betas=(0.5, 0.9),
        euclidean="adamw",
        lookahead_steps=0,
        polar_every=0,
        audit_every=0,
    )


def _triangular(**changes: Any) -> TrainConfig:
    """The schedule of the SLL paper, which has neither a warm-up of its own nor a floor."""
    return TrainConfig(schedule="triangular", warmup_epochs=0, lr_floor=0.0, **changes)


def _digits(name: str, model: NetworkConfig, *, lr: float, eps: float, epochs: float) -> RunConfig:
    """EMMA beats the papers' offset loss here at every radius below 1 (docs/log.md)."""
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(source="digits", train_split="fit"),
        optim=_adam(lr),
        loss=EmmaLoss(eps=108 / 255, eps_start=eps, eps_end=eps, scale=10.0),
        train=_triangular(epochs=epochs, global_batch=64),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def _digits_residual(scaling: Literal["sll", "cpl"]) -> SllConfig:
    return SllConfig(
        input_shape=_DIGITS,
        num_classes=10,
        scaling=scaling,
        channels=4,
        conv_layers=2,
        pool=1,
        dense_layers=6,
        dense_inner=256,
    )


def digits_sll() -> RunConfig:
    """SLL on digits."""
    return _digits("digits-sll", _digits_residual("sll"), lr=1e-2, eps=0.875, epochs=30)


def digits_cpl() -> RunConfig:
    """CPL on digits."""
    return _digits("digits-cpl", _digits_residual("cpl"), lr=1e-2, eps=0.875, epochs=30)


def digits_aol() -> RunConfig:
    """AOL on digits."""
    model = AolConfig(
        input_shape=_DIGITS,
        num_classes=10,
        patch=2,
        channels=32,
        conv_layers=3,
        kept_channels=16,
        dense_layers=2,
    )
    return _digits("digits-aol", model, lr=1e-2, eps=0.875, epochs=30)


_SIZES = {"S": (20, 45, 7), "M": (30, 60, 10), "L": (50, 90, 10), "XL": (70, 120, 15)}
_AOL_SIZES = {"S": 16, "M": 32, "L": 48}
_DATA = {"cifar10": (32, 10, 4), "cifar100": (32, 100, 4), "tiny-imagenet": (64, 200, 8)}
"""Side of an image, classes, and by how many pixels training images are shifted."""


def _published(name: str, model: NetworkConfig, *, offset: float, shift: int) -> RunConfig:
    """The recipe of the papers, without their colour jitter."""
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(stream=StreamConfig(shift_pixels=shift, flip=True, workers=4)),
        optim=_adam(lr=1e-2),
        loss=OffsetLoss(offset=offset, scale=4.0),
        train=_triangular(epochs=1000, global_batch=256, log_every=10),
        checkpoint=CheckpointConfig(every_steps=5000),
        cluster=ClusterConfig(workers=4, device="cuda", cpus_per_worker=8),
    )


def _residual(name: str) -> RunConfig:
    data, scaling, size = name.rsplit("-", 2)
    side, classes, shift = _DATA[data]
    convolutions, channels, dense = _SIZES[size]
    model = SllConfig(
        input_shape=(3, side, side),
        num_classes=classes,
        scaling="sll" if scaling == "sll" else "cpl",
        channels=channels,
        conv_layers=convolutions,
        dense_layers=dense,
    )
    return _published(name, model, offset=1.5 * 2**0.5, shift=shift)


def _almost_orthogonal(name: str) -> RunConfig:
    data, _, size = name.rsplit("-", 2)
    side, classes, shift = _DATA[data]
    model = AolConfig(
        input_shape=(3, side, side), num_classes=classes, kept_channels=_AOL_SIZES[size]
    )
    return _published(name, model, offset=2**0.5, shift=shift)


# Names are written out, so that a search for one ends here.
_RESIDUAL = (
    *("cifar10-sll-S", "cifar10-sll-M", "cifar10-sll-L", "cifar10-sll-XL"),
    *("cifar10-cpl-S", "cifar10-cpl-M", "cifar10-cpl-L", "cifar10-cpl-XL"),
    *("cifar100-sll-S", "cifar100-sll-M", "cifar100-sll-L", "cifar100-sll-XL"),
    *("cifar100-cpl-S", "cifar100-cpl-M", "cifar100-cpl-L", "cifar100-cpl-XL"),
    *("tiny-imagenet-sll-S", "tiny-imagenet-sll-M", "tiny-imagenet-sll-L", "tiny-imagenet-sll-XL"),
    *("tiny-imagenet-cpl-S", "tiny-imagenet-cpl-M", "tiny-imagenet-cpl-L", "tiny-imagenet-cpl-XL"),
)
_ALMOST_ORTHOGONAL = (
    *("cifar10-aol-S", "cifar10-aol-M", "cifar10-aol-L"),
    *("cifar100-aol-S", "cifar100-aol-M", "cifar100-aol-L"),
)

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits-sll": digits_sll,
    "digits-cpl": digits_cpl,
    "digits-aol": digits_aol,
    **{name: partial(_residual, name) for name in _RESIDUAL},
    **{name: partial(_almost_orthogonal, name) for name in _ALMOST_ORTHOGONAL},
}
