"""Public implementations of the families, from git checkouts: peers of `benchmarks.families`.

Each is built as its repository has it, on the CPU: what it imports and does not use is left empty,
and calls of `.cuda()` stay where they are. Checkouts are folders with the repositories' names.
"""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

Pass = Callable[[Tensor], Tensor]
"""Input to one number, whose gradients are the work that is measured."""


@dataclass(frozen=True)
class Peer:
    """A public implementation."""

    repository: str
    """Owner and name; the checkout has the name."""
    build: Callable[[], Pass]
    """Make it, with the checkout among the places that imports look at."""
    folder: str = ""
    """Folder of the checkout that its imports begin in."""
    absent: tuple[str, ...] = ()
    """Modules that it imports and that are not needed here."""


def commit(checkouts: Path, peer: Peer) -> str | None:
    """Short hash of the checkout, None where there is none."""
    folder = checkouts / peer.repository.split("/")[1]
    if not folder.is_dir():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def load(checkouts: Path, peer: Peer) -> Pass:
    """Build a peer; modules of its names are its own meanwhile, and ours again afterwards."""
    root = checkouts / peer.repository.split("/")[1] / peer.folder
    names = {path.stem for path in root.iterdir()}

    def taken() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in names]

    ours = {name: sys.modules.pop(name) for name in taken()}
    absent = {name: mock.MagicMock() for name in peer.absent if name not in sys.modules}
    sys.path.insert(0, str(root))
    try:
        with mock.patch.dict(sys.modules, absent), _everything_on_the_cpu():
            return peer.build()
    finally:
        sys.path.remove(str(root))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(ours)


@contextlib.contextmanager
def _everything_on_the_cpu() -> Iterator[None]:
    randn = torch.randn

    def on_the_cpu(*shape: Any, device: object = None, **settings: Any) -> Tensor:
        return randn(*shape, **settings)

    def here(tensor: Tensor) -> Tensor:
        return tensor

    with (
        mock.patch.object(Tensor, "cuda", here),
        mock.patch.object(torch, "randn", on_the_cpu),
        mock.patch.object(torch.distributed, "get_world_size", return_value=1),
        mock.patch("torch.utils.cpp_extension.load", _filter_gradients),
    ):
        yield


def _filter_gradients(**settings: object) -> SimpleNamespace:
    """The gradient of a filter as torch offers it to everyone, in place of cuDNN's own."""

    def gradient(x: Tensor, shape: Any, g: Tensor, stride: Any, pad: Any, *_: object) -> Tensor:
        return conv2d_weight(x, shape, g, stride=stride, padding=pad)

    return SimpleNamespace(convolution_backward_weight=gradient)


def _logits(network: nn.Module) -> Pass:
    network.train()
    return lambda images: network(images).square().mean()


def _regularised(network: Any) -> Pass:
    """With the product of the estimated norms, which such networks take at every step."""
    network.train()
    return lambda images: network(images).square().mean() + network.sub_lipschitz()


def sll(channels: int, convolutions: int, dense: int, inner: int) -> Pass:
    """The network of the SLL paper."""
    module = importlib.import_module("core.models.model")
    config = SimpleNamespace(
        n_conv=convolutions,
        n_dense=dense,
        w=channels,
        conv_inner_dim=5,
        dense_inner_dim=inner,
        dataset="cifar10",
    )
    return _logits(module.LipschitzNetwork(config, 10))


def cpl(channels: int, convolutions: int, dense: int, inner: int) -> Pass:
    """The network of the CPL paper, with the inner width of our convolutions."""
    module = importlib.import_module("model")
    network = module.ConvexPotentialLayerNetwork(
        convolutions,
        10,
        depth_linear=dense,
        conv_size=5,
        num_channels=channels,
        n_features=inner,
    )
    return _logits(network)


def aol(channels: int) -> Pass:
    """A convolution as its authors rewrote it in torch, padded with zeros."""
    module = importlib.import_module("models.layers.lipschitz.aol")
    return _logits(module.AOLConv2d(channels, channels, 3, padding=1, padding_mode="zeros"))


def soc_layer(channels: int) -> Pass:
    """A layer of 2021 with as many terms as ours."""
    module = importlib.import_module("skew_ortho_conv")
    return _logits(module.SOC(channels, channels, train_terms=6))


def lipconvnet(depth: int) -> Pass:
    """LipConvnet of 2022 with its fast backward pass."""
    module = importlib.import_module("lip_convnets")
    return _logits(module.LipConvNet(last_name="lln", block_size=depth // 5))


def liresnet(width: int, depth: int, dense_width: int, dense: int) -> Pass:
    """LiResNet with dense layers of another size than 8 x 2048."""
    models, blocks = (
        importlib.import_module("models.model"),
        importlib.import_module("models.blocks"),
    )
    network = models.GloroNet(depth=depth, width=width)
    activation = network.neck.activation
    network.neck = models.Map2Vec(width, 16, dense_width, activation)
    network.linear = blocks.LiResMLP(dense_width, dense, activation)
    network.head = models.head(dense_width, 10, True)
    network.set_num_lc_iter()
    return _regularised(network)


def bronet(width: int, depth: int, dense_width: int, dense: int) -> Pass:
    """BRONet as its CIFAR configuration has it, at another size."""
    models = importlib.import_module("models.model")
    network = models.BRONet(
        depth=depth,
        width=width,
        backbone_type="bro",
        backbone_weight_rank_ratio=0.5,
        neck_conv_type="cholesky",
        neck_linear_type="cholesky",
        dense_type="cholesky",
        dense_width=dense_width,
        linear_num=dense,
    )
    return _regularised(network)
