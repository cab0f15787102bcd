"""Networks that the tests of model share."""

import torch
from torch import nn

from model.networks.base import CertifiedNetwork
from model.networks.config import NetworkConfig
from model.networks.init import initial_kind, initial_value
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network


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


def trained_like(
    config: NetworkConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> CertifiedNetwork:
    """Calibrated network, orthogonal to rounding, whose biases are not zero."""
    network = build_network(config).to(dtype).eval()
    network.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if initial_kind(p) == "zeros":
                p.normal_(std=0.1, generator=generator)
    shape = (32, *config.input_shape)
    network.calibrate([torch.rand(shape, generator=generator, dtype=dtype)])
    return network


def filled(module: nn.Module, generator: torch.Generator, dtype=torch.float64) -> nn.Module:
    """The layer with initial values, biases that are not 0 and residuals that matter."""
    module = module.to(dtype)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(initial_value(initial_kind(p), p.shape, seed=1, name=name))
            if initial_kind(p) == "zeros":
                p.normal_(std=0.1, generator=generator)
            elif initial_kind(p).startswith("residual"):
                p[:, :-1] *= 40
    return module
