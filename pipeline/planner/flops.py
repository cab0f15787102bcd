"""Arithmetic of training: what a network needs at least.

Its ratio to what a device can do at most (`pipeline/training/device_peak.py`) is the model FLOP
utilisation (MFU, arXiv 2204.02311): recomputation, the optimizer and everything else that is no
product of the network count as lost time.
"""

import dataclasses
import math

from model.networks.config import LipNeXtConfig
from model.networks.linf.sortnet import SortNetConfig
from pipeline.config import RunConfig
from pipeline.planner.meta_step import rehearse


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
