"""What the networks that are Lipschitz in l-infinity share."""

import torch
from torch import Tensor

from model.certification.rounding import SLACK, ErrorState
from model.networks.tensor_ops import at_least_float32


def centred_pixels(images: Tensor, scale: float) -> Tensor:
    """(x - 1/2) * scale in float32 or wider, any shape; its constant is the scale."""
    return (at_least_float32(images) - 0.5) * scale


def equal_factors(classes: int, *, device: torch.device) -> Tensor:
    """Factors of logits that are each 1-Lipschitz: 2, on the diagonal 0; float64 (K, K)."""
    return 2 * (1 - torch.eye(classes, dtype=torch.float64, device=device))


def largest_entry(stored: Tensor) -> float:
    """Norm max |entry| of a stored tensor, in float64."""
    return float(stored.double().abs().max()) * SLACK


def proved_error(state: ErrorState, error: Tensor, operations: int, growth: float) -> Tensor:
    """Error of a margin, with underflow; infinite where nothing can be said.

    Args:
        state: carried through the network.
        error: what rounding does to a margin, float64 (B,).
        operations: bound of the roundings between a pixel and a logit, along any path.
        growth: bound of what any part of the network multiplies an error by.

    Returns:
        float64 (B,). A flushed operation errs by the smallest normal number times the larger of 1
        and what it is multiplied with; twice for the two logits.
    """
    program = state.program
    underflow = 2 * operations * program.tiny * growth * state.peak.clamp(min=1)
    return state.finish(error, underflow)
