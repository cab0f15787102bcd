"""Arithmetic of training: what a network needs at least.

Its ratio to what a device can do at most (`pipeline/training/device_peak.py`) is the model FLOP
utilisation (MFU, arXiv 2204.02311): recomputation, the optimizer and everything else that is no
product of the network count as lost time.
"""

import dataclasses

from pipeline.config import RunConfig
from pipeline.planner.meta_step import rehearse


def training_flops(config: RunConfig) -> float | None:
    """Least FLOPs of one image's forward and backward pass; None: not known for this network.

    Where the family has no formula of its own, it is what its products take for one image more,
    counted on the meta device: what is done to the weights is once per batch, and left out.
    Networks of distances instead of products have none.

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
        config, train=dataclasses.replace(config.train, activation_checkpointing=False)
    )
    try:
        few, more = (rehearse(plain, micro_batch=images).flops for images in (2, 4))
    except (NotImplementedError, RuntimeError):  # an operator reads values
        return None
    return (more - few) / 2
