"""One forward and backward pass without a device: the bytes that it holds and its FLOPs.

The network lives on torch's meta device, where tensors have shapes and no contents, so a network of
any size takes seconds on any machine.
"""

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model.networks.registry import build_network
from pipeline.config import RunConfig
from pipeline.training.device_flops import DTYPES
from pipeline.training.objective import Objective
from pipeline.training.schedules import StepContext


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make while it is entered.

    Attributes:
        live: bytes of the storages that still exist.
        peak: the most of `live` since the beginning, or since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and count what it made; what it was given was there before."""
        self._note((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, made=True)
        return out

    def _note(self, tree: Any, *, made: bool) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known[key] = storage.nbytes() if made else 0
            self.live += self._known[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_ATTENTION = "scaled_dot_product"
_MOVE_NOTHING = (
    "empty", "view", "expand", "permute", "transpose", "slice", "select", "unfold", "device",
)  # fmt: skip


class MovedBytes(TorchDispatchMode):
    """Counts the bytes that operators read and write, those of products left out.

    Each operator reads what it is given once and writes what it makes; a view does neither.

    Attributes:
        moved: their sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and count what it moves."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        free = func.is_view or name in _PRODUCTS or _ATTENTION in name
        if not free and not any(part in name for part in _MOVE_NOTHING):
            self.moved += sum(map(_size, tree_leaves((args, kwargs)))) + sum(
                map(_size, tree_leaves(out))
            )
        return out


def _size(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


@dataclasses.dataclass(frozen=True)
class MetaPass:
    """What one forward and backward pass over a micro-batch takes, weights left out.

    Attributes:
        activation_bytes: most bytes held at one time beside the weights: what forward keeps for
            backward, what an operator works on, the gradient of the parameter it is at.
        pinned_weight_bytes: weights that views saved for the backward pass keep whole on every
            rank although ZeRO-3 has released them; none with activation checkpointing.
        flops: products of the pass, recomputation included.
        moved_bytes: read and written by all other operators.
        blocks: of the network.
        recomputed: those of them that are recomputed.
    """

    activation_bytes: int
    pinned_weight_bytes: int
    flops: int
    moved_bytes: int
    blocks: int
    recomputed: int


def run_meta_pass(config: RunConfig, *, micro_batch: int) -> MetaPass:
    """Forward and backward pass of one micro-batch on the meta device.

    Args:
        config: network, loss, precision, activation checkpointing.
        micro_batch: images.

    Raises:
        NotImplementedError, RuntimeError: an operator of the network reads values, which a meta
            tensor has none of.
    """
    with torch.device("meta"):
        network = build_network(config.model).to(DTYPES[config.train.precision])
        images = torch.zeros((micro_batch, *config.model.input_shape), dtype=torch.uint8)
        labels = torch.zeros(micro_batch, dtype=torch.int64)
    network.recomputed_blocks = config.train.recomputed(network.block_count)
    objective = Objective(network, config.loss)
    weights = {
        p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in network.parameters()
    }
    pinned = set()

    def save(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key in weights and not isinstance(tensor, torch.nn.Parameter):
            pinned.add(key)
        return tensor

    for parameter in network.parameters():
        # ZeRO moves a gradient into its bucket at once.
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    saving = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    counting = FlopCounterMode(display=False)
    with torch.device("meta"), counting, LiveBytes() as held, MovedBytes() as seen:
        with saving:
            loss, _ = objective(images, labels, StepContext(0, 0.0, 1.0, config.loss.eps))
        loss.backward()
    kept = sum(weights[key] for key in pinned)
    return MetaPass(
        activation_bytes=held.peak,
        pinned_weight_bytes=kept,
        flops=counting.get_total_flops(),
        moved_bytes=seen.moved,
        blocks=network.block_count,
        recomputed=network.recomputed_blocks,
    )


def training_flops(config: RunConfig) -> float | None:
    """Least FLOPs of one image's forward and backward pass; None: not known for this network.

    Where the family has no formula of its own, it is what its products take for one image more,
    counted on the meta device: what is done to the weights is once per batch, and left out.
    Networks of distances instead of products have none. The ratio to what a device can do at most
    (`pipeline/training/device_flops.py`) is the model FLOP utilisation (MFU, arXiv 2204.02311):
    recomputation, the optimizer and everything else that is no product count as lost time.

    Args:
        config: network, loss and precision.
    """
    network = config.model
    if not network.has_products:
        return None
    known = network.least_flops()
    if known is not None:
        return known
    plain = dataclasses.replace(
        config, train=dataclasses.replace(config.train, activation_checkpointing="none")
    )
    try:
        few, more = (run_meta_pass(plain, micro_batch=images).flops for images in (2, 4))
    except (NotImplementedError, RuntimeError):  # an operator reads values
        return None
    return (more - few) / 2
