"""Networks that are certified in l-infinity: SortNet, l-infinity-distance nets, GroupSort."""

from collections.abc import Callable
from functools import partial

from data_shards.config import StreamConfig
from model.groupsort import GroupSortConfig
from model.sortnet import SortNetConfig
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    LossConfig,
    RunConfig,
    TrainConfig,
)

_DIGITS_EPS = ("8/255", "16/255", "25/255", "38/255")


def _adamw(lr: float) -> OptimConfig:
    """AdamW as in the SortNet paper, without decay: weights are places, not sizes."""
    return OptimConfig(
        lr=lr, betas=(0.9, 0.99), eps=1e-10, euclidean="adamw", lookahead_steps=0, audit_every=0
    )


def _digits_distance(name: str, keep: float) -> RunConfig:
    return RunConfig(
        preset=name,
        model=SortNetConfig(
            input_shape=(1, 8, 8),
            num_classes=10,
            width=192,
            depth=3,
            keep=keep,
            input_scale=1 / 0.3,
        ),
        data=DataConfig(source="digits"),
        optim=_adamw(0.02),
        # Beyond every radius of the table; the head's own scale is the temperature.
        loss=LossConfig(eps=40 / 255, eps_start=1.0, eps_end=1.0),
        train=TrainConfig(epochs=75, global_batch=64, warmup_epochs=0, lr_floor=0.0),
        checkpoint=CheckpointConfig(every_steps=500, evaluate_eps=_DIGITS_EPS),
    )


def digits_sortnet() -> RunConfig:
    """Sorted distances; chosen on the validation part of the training split."""
    return _digits_distance("digits-sortnet", 0.85)


def digits_linfdist() -> RunConfig:
    """Largest distances alone: SortNet with keep = 1."""
    return _digits_distance("digits-linfdist", 1.0)


def digits_groupsort() -> RunConfig:
    """MaxMin network with rows of l1 norm at most 1."""
    return RunConfig(
        preset="digits-groupsort",
        model=GroupSortConfig(input_shape=(1, 8, 8), num_classes=10, width=256, depth=4),
        data=DataConfig(source="digits"),
        optim=_adamw(0.005),
        loss=LossConfig(eps=32 / 255, eps_start=1.0, eps_end=1.0, scale=20.0),
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
        loss=LossConfig(
            kind="mixture",
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


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits-sortnet": digits_sortnet,
    "digits-linfdist": digits_linfdist,
    "digits-groupsort": digits_groupsort,
    "mnist-sortnet-1_10": partial(_mnist, 1),
    "mnist-sortnet-3_10": partial(_mnist, 3),
    "cifar10-sortnet-2_255": partial(_cifar10, 2),
    "cifar10-sortnet-8_255": partial(_cifar10, 8),
}
