"""LipConvnet with skew orthogonal convolutions (arXiv 2211.08453)."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from data_shards.config import StreamConfig
from model.networks.soc.network import SocConfig
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.losses.emma import EmmaLoss

Head = Literal["unit", "mlp"]


def _digits(name: str, head: Head, scale: float) -> RunConfig:
    return RunConfig(
        preset=name,
        model=SocConfig(
            input_shape=(1, 8, 8),
            num_classes=10,
            depth=3,
            stages=3,
            width=16,
            head=head,
            hidden=256,
        ),
        data=DataConfig(source="digits", train_split="fit"),
        optim=OptimConfig(lr=1e-2, betas=(0.9, 0.99), lookahead_factor=0.8),
        loss=EmmaLoss(eps=108 / 255, eps_start=0.875, eps_end=0.875, scale=scale),
        train=TrainConfig(epochs=40, global_batch=64, warmup_epochs=2),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def digits_soc() -> RunConfig:
    """LipConvnet-3 on 8x8 digits; chosen on the validation part of the training split."""
    return _digits("digits-soc", "unit", 10.0)


def digits_soc_mlp() -> RunConfig:
    """The same with a hidden layer in the head, certified by its curvature."""
    return _digits("digits-soc-mlp", "mlp", 5.0)


def _cifar(name: str) -> RunConfig:
    """The published network with this project's loss and optimizer.

    The paper trains 200 epochs of batch 128 by SGD with a cross-entropy that is regularised by the
    certificate (`--loss.kind certificate`).
    """
    data, *_, blocks = name.split("-")
    depth = int(blocks)
    return RunConfig(
        preset=name,
        model=SocConfig(
            input_shape=(3, 32, 32),
            num_classes=int(data.removeprefix("cifar")),
            depth=depth,
            head="mlp" if "-mlp-" in name else "unit",
        ),
        data=DataConfig(stream=StreamConfig(shift_pixels=4, flip=True, workers=4)),
        optim=OptimConfig(lr=1e-3),
        loss=EmmaLoss(eps=36 / 255, eps_start=0.1, eps_end=3.0, eps_ramp=0.5),
        train=TrainConfig(
            epochs=200,
            global_batch=128,
            precision="bf16",
            warmup_epochs=5,
            grad_clip=1.0,
            log_every=20,
        ),
        checkpoint=CheckpointConfig(every_steps=5000),
        cluster=ClusterConfig(workers=1, cpus_per_worker=8, device="cuda"),
    )


# Names are written out, so that a search for one ends here.
_PUBLISHED = (
    *("cifar10-soc-5", "cifar10-soc-10", "cifar10-soc-15", "cifar10-soc-20"),
    *("cifar10-soc-25", "cifar10-soc-30", "cifar10-soc-35", "cifar10-soc-40"),
    *("cifar10-soc-mlp-5", "cifar10-soc-mlp-10", "cifar10-soc-mlp-15", "cifar10-soc-mlp-20"),
    *("cifar10-soc-mlp-25", "cifar10-soc-mlp-30", "cifar10-soc-mlp-35", "cifar10-soc-mlp-40"),
    *("cifar100-soc-5", "cifar100-soc-10", "cifar100-soc-15", "cifar100-soc-20"),
    *("cifar100-soc-25", "cifar100-soc-30", "cifar100-soc-35", "cifar100-soc-40"),
    *("cifar100-soc-mlp-5", "cifar100-soc-mlp-10", "cifar100-soc-mlp-15", "cifar100-soc-mlp-20"),
    *("cifar100-soc-mlp-25", "cifar100-soc-mlp-30", "cifar100-soc-mlp-35", "cifar100-soc-mlp-40"),
)

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits-soc": digits_soc,
    "digits-soc-mlp": digits_soc_mlp,
    **{name: partial(_cifar, name) for name in _PUBLISHED},
}
