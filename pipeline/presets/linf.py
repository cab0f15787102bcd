"""Networks that are certified in l-infinity: SortNet, l-infinity-distance nets, GroupSort."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from data_shards.config import StreamConfig
from model.networks.linf.groupsort import GroupSortConfig
from model.networks.linf.sortnet import SortNetConfig
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.losses.emma import EmmaLoss
from pipeline.losses.hinge import CeHingeLoss, MixtureLoss

_DIGITS_EPS = ("8/255", "16/255", "25/255", "38/255")


def _adamw(lr: float) -> OptimConfig:
    """AdamW as in the SortNet paper, without decay: weights are places, not sizes."""
    return OptimConfig(
        lr=lr, betas=(0.9, 0.99), eps=1e-10, euclidean="adamw", lookahead_steps=0, audit_every=0
    )


def _digits_distance(name: str, keep: float, *, depth: int = 3, hidden: int = 0) -> RunConfig:
    return RunConfig(
        preset=name,
        model=SortNetConfig(
            input_shape=(1, 8, 8),
            num_classes=10,
            width=192,
            depth=depth,
            hidden=hidden,
            keep=keep,
            input_scale=1 / 0.3,
        ),
        data=DataConfig(source="digits", train_split="fit"),
        optim=_adamw(0.02),
        # Beyond every radius of the table; the head's own scale is the temperature.
        loss=EmmaLoss(eps=40 / 255, eps_start=1.0, eps_end=1.0),
        train=TrainConfig(epochs=75, global_batch=64, warmup_epochs=0, lr_floor=0.0),
        checkpoint=CheckpointConfig(every_steps=500, evaluate_eps=_DIGITS_EPS),
    )


def digits_sortnet() -> RunConfig:
    """Sorted distances; chosen on the validation part of the training split."""
    return _digits_distance("digits-sortnet", 0.85)


def digits_sortnet_mlp() -> RunConfig:
    """Sorted distances and a tanh layer, certified by intervals."""
    loss = CeHingeLoss(
        eps=32 / 255,
        eps_start=0.0,
        eps_end=1.1,
        eps_ramp=0.3,
        ce_start=1.0,
        ce_end=0.01,
    )
    found = _digits_distance("digits-sortnet-mlp", 0.85, depth=2, hidden=64)
    return dataclasses.replace(found, loss=loss)


def digits_linfdist() -> RunConfig:
    """Largest distances alone: SortNet with keep = 1."""
    return _digits_distance("digits-linfdist", 1.0)


def digits_groupsort() -> RunConfig:
    """MaxMin network with rows of l1 norm at most 1."""
    return RunConfig(
        preset="digits-groupsort",
        model=GroupSortConfig(input_shape=(1, 8, 8), num_classes=10, width=256, depth=4),
        data=DataConfig(source="digits", train_split="fit"),
        optim=_adamw(0.005),
        loss=EmmaLoss(eps=32 / 255, eps_start=1.0, eps_end=1.0, scale=20.0),
        train=TrainConfig(epochs=120, global_batch=64, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=1000, evaluate_eps=_DIGITS_EPS),
    )


def _published(
    name: str,
    model: SortNetConfig,
    *,
    stream: StreamConfig,
    eps: tuple[float, float],
    ce: float,
    epochs: int,
    table: tuple[str, ...],
) -> RunConfig:
    """Recipe of arXiv 2210.01787: `eps` at test and in training, in pixels of [0, 1].

    Its runs pad by repeating the edge where ours shift zeros in, and decay the temperature.
    """
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(stream=stream),
        optim=_adamw(0.02),
        loss=MixtureLoss(
            eps=eps[0],
            eps_start=eps[1] / eps[0],
            eps_end=eps[1] / eps[0],
            ce_start=ce,
            ce_end=ce / 100,
            ce_from=model.p_from,
            ce_to=model.p_to,
        ),
        train=TrainConfig(
            epochs=epochs,
            global_batch=512,
            warmup_epochs=0,
            lr_floor=0.0,
            log_every=20,
            calibration_samples=50_000,
        ),
        checkpoint=CheckpointConfig(every_steps=10_000, evaluate_eps=table),
        cluster=ClusterConfig(workers=1, cpus_per_worker=8, device="cuda"),
    )


def _mnist(tenths: int) -> RunConfig:
    keep, ce, trained = {1: (0.70, 0.1, 0.3), 3: (0.75, 0.02, 0.45)}[tenths]
    model = SortNetConfig(
        input_shape=(1, 28, 28),
        num_classes=10,
        width=5120,
        depth=5,
        keep=keep,
        input_scale=1 / 0.3081,
        passing=True,
        p_from=100 / 1500,
        p_to=1450 / 1500,
    )
    return _published(
        f"mnist-sortnet-{tenths}_10",
        model,
        stream=StreamConfig(shift_pixels=1, workers=4),
        eps=(tenths / 10, trained),
        ce=ce,
        epochs=1500,
        table=("1/10", "3/10"),
    )


def _cifar10(levels: int) -> RunConfig:
    keep, ce, trained = {2: (0.75, 1.0, 8 / 255), 8: (0.85, 0.2, 24 / 255)}[levels]
    model = SortNetConfig(
        input_shape=(3, 32, 32),
        num_classes=10,
        width=5120,
        depth=6,
        keep=keep,
        input_scale=1 / 0.2009,
        p_from=200 / 3000,
        p_to=2950 / 3000,
    )
    return _published(
        f"cifar10-sortnet-{levels}_255",
        model,
        stream=StreamConfig(shift_pixels=3, flip=True, workers=4),
        eps=(levels / 255, trained),
        ce=ce,
        epochs=3000,
        table=("2/255", "8/255", "16/255"),
    )


class _Data(NamedTuple):
    """What the recipe of SortNet + MLP changes with the data."""

    image: int
    classes: int
    deviation: float
    """Of the pixels, one number for all channels: inputs are divided by it."""
    hidden: int
    shift: int
    lr: float
    batch: int
    epochs: tuple[int, int, int, int]
    """After which p grows; of the ramp of the radius; after which p is infinite; all."""


_DATA = {
    "cifar10": _Data(32, 10, 0.2009, 512, 3, 0.02, 512, (200, 500, 2950, 3000)),
    "tiny-imagenet": _Data(64, 200, 0.2276, 512, 5, 0.02, 512, (100, 500, 980, 1000)),
    "imagenet64": _Data(64, 1000, 0.2128, 2048, 0, 0.01, 1024, (30, 200, 290, 300)),
}


def _mlp(data: str, levels: int, *, keep: float = 0.70, windows: bool = False) -> RunConfig:
    """SortNet + MLP (arXiv 2210.01787) certified at `levels` of 255; `windows`: the form named 2x.

    Its runs let the radius grow as a power of 4 at first, not linearly, decay the matrices of the
    head by 0.02, and train the temperature of the cross-entropy. Shard sets: `data_shards.write
    cifar10`, `tiny-imagenet`, and `imagenet --test-size 64 --long-side 96`, whose train images are
    cut at random. Of images that are 64x64 already (`imagefolder --uniform --test-size 64`), as in
    the paper, take `--data.stream.crop none --data.stream.shift-pixels 4`.
    """
    part = _DATA[data]
    grows, ramp, ends, total = part.epochs
    if data == "imagenet64" and windows:
        grows = 50
    model = SortNetConfig(
        input_shape=(3, part.image, part.image),
        num_classes=part.classes,
        width=5120,
        depth=5,
        hidden=part.hidden,
        window=60 if windows else 0,
        window_stride=4 if windows else 1,
        keep=keep,
        input_scale=1 / part.deviation,
        p_from=grows / total,
        p_to=ends / total,
    )
    found = _published(
        f"{data}-sortnet-mlp{'2x' if windows else ''}-{levels}_255",
        model,
        stream=StreamConfig(
            crop="none" if part.shift else "random-resized",
            shift_pixels=part.shift,
            flip=True,
            workers=4,
        ),
        eps=(levels / 255, 1.1 * levels / 255),
        ce=1.0,
        epochs=total,
        table=("1/255", "2/255", "8/255"),
    )
    return dataclasses.replace(
        found,
        optim=_adamw(part.lr),
        loss=CeHingeLoss(
            eps=levels / 255,
            eps_start=0.0,
            eps_end=1.1,
            eps_ramp=ramp / total,
            ce_start=1.0,
            ce_end=0.01,
            ce_from=model.p_from,
            ce_to=model.p_to,
        ),
        train=dataclasses.replace(found.train, global_batch=part.batch),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits-sortnet": digits_sortnet,
    "digits-sortnet-mlp": digits_sortnet_mlp,
    "digits-linfdist": digits_linfdist,
    "digits-groupsort": digits_groupsort,
    "mnist-sortnet-1_10": partial(_mnist, 1),
    "mnist-sortnet-3_10": partial(_mnist, 3),
    "cifar10-sortnet-2_255": partial(_cifar10, 2),
    "cifar10-sortnet-8_255": partial(_cifar10, 8),
    "cifar10-sortnet-mlp-2_255": partial(_mlp, "cifar10", 2),
    "cifar10-sortnet-mlp-8_255": partial(_mlp, "cifar10", 8, keep=0.60),
    "tiny-imagenet-sortnet-mlp-1_255": partial(_mlp, "tiny-imagenet", 1),
    "tiny-imagenet-sortnet-mlp2x-1_255": partial(_mlp, "tiny-imagenet", 1, windows=True),
    "imagenet64-sortnet-mlp-1_255": partial(_mlp, "imagenet64", 1),
    "imagenet64-sortnet-mlp2x-1_255": partial(_mlp, "imagenet64", 1, windows=True),
}
