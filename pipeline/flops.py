"""Arithmetic of training: what a network needs at least, and what a device can do at most.

Their ratio is the model FLOP utilisation (MFU, arXiv 2204.02311): recomputation, the optimizer and
everything else that is no product of the network count as lost time.
"""

import math

from model.config import LipNeXtConfig

_PEAK_TFLOPS = {  # dense, from NVIDIA's data sheets: (part of the name, 16 bit, fp32)
    "B200": (2250.0, 75.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "V100": (125.0, 15.7),
}


def training_flops(network: object) -> float | None:
    """Least FLOPs of one image's forward and backward pass; None: not known for this family.

    LipNeXt with M R^T folded: per block two products of T tokens with C x C matrices, 2 T C^2 FLOPs
    each; the backward pass costs twice the forward pass, and once for the stem, whose input needs
    no gradient. The product M R^T itself is once per batch, and left out.

    Args:
        network: configuration of the network.
    """
    if not isinstance(network, LipNeXtConfig):
        return None
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
