"""Networks that the tests of this room share."""

import torch

from model.build import build_network
from model.config import LipNeXtConfig, NetworkConfig
from model.contract import CertifiedNetwork


def tiny_config(**changes) -> LipNeXtConfig:
    """1x4x4 images, a 2x2 grid of 16 channels: a Jacobian of 64 x 16 before the pool."""
    settings = {
        "input_shape": (1, 4, 4),
        "num_classes": 3,
        "patch": 2,
        "width": 16,
        "depth": 2,
        **changes,
    }
    return LipNeXtConfig(**settings)


def trained_like(config: NetworkConfig, seed: int = 0) -> CertifiedNetwork:
    """float64 network, orthogonal to rounding, calibrated, whose b, p and head bias are not zero."""
    network = build_network(config).double().eval()
    network.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.initial == "zeros":
                p.normal_(std=0.1, generator=generator)
    shape = (32, *config.input_shape)
    network.calibrate([torch.rand(shape, generator=generator, dtype=torch.float64)])
    return network
