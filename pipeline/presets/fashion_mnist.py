"""Fashion-MNIST, 60,000 + 10,000 real images of 28x28: LipNeXt and its peers on CPU cores.

The images are those of Debian's package dataset-fashion-mnist; their shard set is written on first
use.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from model.networks.config import NetworkConfig
from model.networks.linf.groupsort import GroupSortConfig
from model.networks.linf.sortnet import SortNetConfig
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.liresnet.bronet import BRONetConfig
from model.networks.liresnet.network import LiResNetConfig
from model.networks.sll.aol import AolConfig
from model.networks.sll.layers import Scaling
from model.networks.sll.network import SllConfig
from model.networks.soc.network import SocConfig
from optim.config import OptimConfig
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.losses.base import Loss
from pipeline.losses.emma import EmmaLoss
from pipeline.losses.hinge import CeHingeLoss

_IMAGES: dict[str, Any] = {"input_shape": (1, 28, 28), "num_classes": 10}
_LINF_EPS = ("8/255", "16/255", "1/10", "1/8")
"""The published certificates on these images are at 0.1."""
_DEVIATION = 0.353
"""Of the training pixels: inputs of networks of distances are divided by it."""

_MANIFOLD = OptimConfig(lr=1e-2, betas=(0.9, 0.99), lookahead_factor=0.8)
_ADAM = OptimConfig(
    lr=1e-2, betas=(0.5, 0.9), euclidean="adamw", lookahead_steps=0, polar_every=0, audit_every=0
)
_NADAM = OptimConfig(lr=5e-3, betas=(0.9, 0.99), lookahead_factor=0.8, polar_every=0, audit_every=0)
_DISTANCES = OptimConfig(
    lr=0.02, betas=(0.9, 0.99), eps=1e-10, euclidean="adamw", lookahead_steps=0, audit_every=0
)
# A low temperature's inverse: the rivals of clothes are many and near (docs/log.md).
_L2_LOSS = EmmaLoss(eps=108 / 255, eps_start=1.0, eps_end=1.0, scale=3.0)
_LINF_LOSS = EmmaLoss(eps=1 / 10, eps_start=1.25, eps_end=1.25)
_COSINE = TrainConfig(epochs=10, global_batch=256, warmup_epochs=0.5, log_every=5)
_TRIANGULAR = TrainConfig(
    epochs=10, global_batch=256, schedule="triangular", warmup_epochs=0, lr_floor=0.0, log_every=5
)


def _run(
    name: str,
    model: NetworkConfig,
    optim: OptimConfig,
    train: TrainConfig,
    loss: Loss = _L2_LOSS,
) -> RunConfig:
    eps: dict[str, Any] = {} if loss.eps > 1 / 10 else {"evaluate_eps": _LINF_EPS}
    return RunConfig(
        preset=name,
        model=model,
        data=DataConfig(source="fashion-mnist", train_split="fit"),
        optim=optim,
        loss=loss,
        train=train,
        checkpoint=CheckpointConfig(every_steps=2000, **eps),
    )


def _lipnext(width: int, alpha: float) -> LipNeXtConfig:
    """Four patches of 14x14: a block multiplies whole quarters of a piece of clothing."""
    return LipNeXtConfig(**_IMAGES, patch=14, width=width, depth=2, alpha=alpha, pool="flat")


def lipnext_m() -> RunConfig:
    """LipNeXt for about ten minutes on two cores; chosen on `validation` (docs/log.md)."""
    train = dataclasses.replace(_COSINE, epochs=32, warmup_epochs=1)
    # More of it than S has for the small radii, which long training leaves room for.
    loss = dataclasses.replace(_L2_LOSS, eps_start=0.95, eps_end=0.95, scale=3.5)
    # The angle of a step grows with the root of the width; the fast step saves half its products.
    optim = dataclasses.replace(_MANIFOLD, lr=6e-3, retraction="fast", gradient="trivialized")
    return _run("fashion-mnist", _lipnext(512, 1 / 16), optim, train, loss)


def lipnext_s() -> RunConfig:
    """LipNeXt for about a minute on two cores; chosen on `validation` (docs/log.md)."""
    train = dataclasses.replace(_COSINE, epochs=6)
    return _run("fashion-mnist-S", _lipnext(196, 1 / 8), _MANIFOLD, train)


def _residual(name: str, scaling: Scaling) -> RunConfig:
    model = SllConfig(
        **_IMAGES,
        scaling=scaling,
        channels=1,
        conv_layers=0,
        pool=1,
        dense_layers=2,
        dense_inner=512,
    )
    return _run(name, model, _ADAM, _TRIANGULAR)


def cpl() -> RunConfig:
    """CPL, dense layers alone."""
    return _residual("fashion-mnist-cpl", "cpl")


def sll() -> RunConfig:
    """SLL, dense layers alone."""
    return _residual("fashion-mnist-sll", "sll")


def aol() -> RunConfig:
    """AOL, patch-wise."""
    model = AolConfig(
        **_IMAGES, patch=7, channels=64, conv_layers=1, kept_channels=32, dense_layers=3
    )
    return _run("fashion-mnist-aol", model, _ADAM, _TRIANGULAR)


def _skew_orthogonal(name: str, **head: Any) -> RunConfig:
    model = SocConfig(**_IMAGES, depth=2, stages=2, width=8, **head)
    train = dataclasses.replace(_COSINE, epochs=3, global_batch=128, warmup_epochs=0.25)
    return _run(name, model, _MANIFOLD, train)


def soc() -> RunConfig:
    """LipConvnet-2 with a linear head."""
    return _skew_orthogonal("fashion-mnist-soc")


def soc_mlp() -> RunConfig:
    """The same with a hidden layer in the head, certified by its curvature."""
    return _skew_orthogonal("fashion-mnist-soc-mlp", head="mlp", hidden=256)


_CONVOLUTIONAL: dict[str, Any] = {
    **_IMAGES,
    "stem_kernel": 7,
    "stem_stride": 7,
    "stem_padding": 0,
    "depth": 3,
    "neck_patch": 2,
    "dense_width": 256,
    "dense_layers": 2,
}


def liresnet() -> RunConfig:
    """LiResNet on patches of 7x7."""
    model = LiResNetConfig(**_CONVOLUTIONAL, width=128)
    return _run("fashion-mnist-liresnet", model, _NADAM, _COSINE)


def bronet() -> RunConfig:
    """BRONet on patches of 7x7."""
    model = BRONetConfig(**_CONVOLUTIONAL, width=64, rank=32)
    return _run("fashion-mnist-bronet", model, _NADAM, dataclasses.replace(_COSINE, epochs=5))


def _distances(name: str, keep: float, *, depth: int = 3, hidden: int = 0) -> RunConfig:
    """Powers grow and end as in the 400 epochs of the l-infinity-distance nets' repository."""
    model = SortNetConfig(
        **_IMAGES,
        width=256,
        depth=depth,
        hidden=hidden,
        keep=keep,
        input_scale=1 / _DEVIATION,
        p_from=50 / 400,
        p_to=350 / 400,
    )
    loss: Loss = _LINF_LOSS
    if hidden:
        loss = CeHingeLoss(
            eps=1 / 10, eps_start=0.0, eps_end=1.1, eps_ramp=0.3, ce_start=1.0, ce_end=0.01
        )
    train = TrainConfig(epochs=10, global_batch=128, warmup_epochs=0, lr_floor=0.0, log_every=5)
    return _run(name, model, _DISTANCES, train, loss)


def linfdist() -> RunConfig:
    """L-infinity-distance net: largest distances alone."""
    return _distances("fashion-mnist-linfdist", 1.0)


def sortnet() -> RunConfig:
    """Sorted distances."""
    return _distances("fashion-mnist-sortnet", 0.85)


def sortnet_mlp() -> RunConfig:
    """Sorted distances and a tanh layer, certified by intervals."""
    return _distances("fashion-mnist-sortnet-mlp", 0.85, depth=2, hidden=64)


def groupsort() -> RunConfig:
    """MaxMin network with rows of l1 norm at most 1."""
    model = GroupSortConfig(**_IMAGES, width=256, depth=4)
    optim = dataclasses.replace(_ADAM, lr=5e-3, betas=(0.9, 0.99), eps=1e-10)
    loss = dataclasses.replace(_LINF_LOSS, eps_start=1.0, eps_end=1.0, scale=20.0)
    return _run("fashion-mnist-groupsort", model, optim, _COSINE, loss)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "fashion-mnist": lipnext_m,
    "fashion-mnist-S": lipnext_s,
    "fashion-mnist-cpl": cpl,
    "fashion-mnist-sll": sll,
    "fashion-mnist-aol": aol,
    "fashion-mnist-soc": soc,
    "fashion-mnist-soc-mlp": soc_mlp,
    "fashion-mnist-liresnet": liresnet,
    "fashion-mnist-bronet": bronet,
    "fashion-mnist-linfdist": linfdist,
    "fashion-mnist-sortnet": sortnet,
    "fashion-mnist-sortnet-mlp": sortnet_mlp,
    "fashion-mnist-groupsort": groupsort,
}
