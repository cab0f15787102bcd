"""Arithmetic of training: what a network needs at least, and what a device can do at most.

Their ratio is the model FLOP utilisation (MFU, arXiv 2204.02311): recomputation, the optimizer and
everything else that is no product of the network count as lost time.
"""

import dataclasses
import math
import time

import torch

from model.networks.config import LipNeXtConfig
from model.networks.linf.sortnet import SortNetConfig
from pipeline.config import RunConfig
from pipeline.planner.meta_step import DTYPES, rehearse

_PEAK_TFLOPS = {  # dense, from NVIDIA's data sheets: (part of the name, 16 bit, fp32)
    "B200": (2250.0, 75.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "V100": (125.0, 15.7),
}


_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LONG_S = 4e-3


def training_flops(config: RunConfig) -> float | None:
    """Least FLOPs of one image's forward and backward pass; None: not known for this network.

    LipNeXt with M R^T folded: per block two products of T tokens with C x C matrices, 2 T C^2 FLOPs
    each; the backward pass costs twice the forward pass, and once for the stem, whose input needs
    no gradient. The product M R^T itself is once per batch, and left out.

    Of the other families it is what their products take more for one image more, counted on the
    meta device: what they do to their weights is once per batch, and left out as well. Networks of
    distances instead of products have none.

    Args:
        config: network, loss and precision.
    """
    network = config.model
    if isinstance(network, LipNeXtConfig):
        return _folded(network)
    if isinstance(network, SortNetConfig):
        return None
    plain = dataclasses.replace(
        config, train=dataclasses.replace(config.train, activation_checkpointing=False)
    )
    try:
        few, more = (rehearse(plain, micro_batch=images).flops for images in (2, 4))
    except (NotImplementedError, RuntimeError):  # an operator reads values
        return None
    return (more - few) / 2


def _folded(network: LipNeXtConfig) -> float:
    tokens, width = math.prod(network.grid), network.width
    stem = 2 * tokens * network.stem_channels * width
    blocks = network.depth * 2 * (2 * tokens * width**2)
    head = 2 * width * network.num_classes
    return float(2 * stem + 3 * (blocks + head))


def peak_flops(device: str, precision: str) -> float | None:
    """FLOPs per second of one device in the type of the working weights; None: not known.

    Args:
        device: name of the device.
        precision: `fp32` (without TF32), `bf16` or `fp16`.
    """
    for name, (half, single) in _PEAK_TFLOPS.items():
        if name in device:
            return (single if precision == "fp32" else half) * 1e12
    return None


def measured_flops(device: torch.device, precision: str) -> float:
    """FLOPs per second that this rank reaches in square products, in at most some 0.2 s.

    For devices without a data sheet. The size is doubled until a product takes a few milliseconds.

    Args:
        device: where, with the threads that this process has.
        precision: as in `peak_flops`.
    """
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for size in _SIZES:
        shape = (2, size, size)
        left, right = torch.rand(shape, generator=generator, device=device).to(DTYPES[precision])
        torch.mm(left.mT, right)
        seconds = min(product_seconds(left, right) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LONG_S:
            break
    return best


def product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """Wall time of one product left^T right, the form of a weight's gradient.

    Of the three forms in a pass it is the one in which emulated bf16 is not hopelessly slow.
    """
    cuda = left.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(left.device)
    begin = time.perf_counter()
    torch.mm(left.mT, right)
    if cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - begin
