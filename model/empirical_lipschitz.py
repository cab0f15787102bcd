"""What is seen of a network's Lipschitz constant: lower bounds that refute a wrong upper bound."""

import torch
from torch import Tensor

from model.errors import ModelError
from model.networks.base import CertifiedNetwork, LipschitzBound

_TOLERANCE = 1e-9
"""Relative rounding error of a float64 derivative, generously."""


def observed_lipschitz(network: CertifiedNetwork, images: Tensor, *, steps: int = 10) -> float:
    """Largest constant of the features that their derivatives show at some images.

    A lower bound of the Lipschitz constant in the network's norm, up to rounding.

    Args:
        network: in float64.
        images: float64 (B, C, H, W).
        steps: backward passes through the network, about.
    """
    if network.norm == "linf":
        return _largest_row(network, images, steps)
    return _largest_singular_value(network, images, steps)


def _largest_singular_value(network: CertifiedNetwork, images: Tensor, steps: int) -> float:
    """Power iteration: ||J v|| / ||v||, J the Jacobian of the features at an image.

    It begins with v = image - 1/2, which a norm-preserving network without biases maps to a vector
    of the same length.
    """
    x = images.detach().requires_grad_(True)
    with torch.enable_grad():
        features = network.features(x)
        # J v is the derivative of u -> J^T u in the direction v: no forward mode needed.
        u = torch.zeros_like(features, requires_grad=True)
        (transposed,) = torch.autograd.grad(features, x, u, create_graph=True)
    v = images - 0.5
    found = 0.0
    for _ in range(steps + 1):
        (forward,) = torch.autograd.grad(transposed, u, v, retain_graph=True)
        ratio = forward.norm(dim=1) / v.flatten(1).norm(dim=1)
        found = max(found, float(ratio.nan_to_num(0).max()))
        (v,) = torch.autograd.grad(features, x, forward, retain_graph=True)
        v = v / v.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-300)
    return found


def _largest_row(network: CertifiedNetwork, images: Tensor, steps: int) -> float:
    """The l1 norm of some rows of the Jacobian: in l-infinity no feature moves faster than that."""
    x = images.detach().requires_grad_(True)
    found = 0.0
    with torch.enable_grad():
        features = network.features(x)
    for row in range(0, features.shape[1], max(1, features.shape[1] // (steps + 1))):
        (gradient,) = torch.autograd.grad(features[:, row].sum(), x, retain_graph=True)
        found = max(found, float(gradient.flatten(1).abs().sum(1).max()))
    return found


def refute(bound: LipschitzBound, observed: float) -> None:
    """Refuse an upper bound that an observation exceeds.

    Raises:
        ModelError: naming both.
    """
    if not observed <= bound.value * (1 + _TOLERANCE):
        raise ModelError(
            f"the network states a Lipschitz constant of at most {bound.value:.9g}, but a "
            f"derivative shows at least {observed:.9g}: it is wrong, nothing can be certified"
        )
