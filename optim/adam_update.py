"""Element-wise Adam arithmetic on tensors of any shape, also on flat partitions.

Every function is element-wise in a fixed order of operations, so its result does not depend on
where a partition was cut; entries that are exact negatives of each other stay so.
"""

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from optim.config import OptimConfig

# torch.optim.NAdam's default; Dozat's schedule mu_t = beta1 (1 - 0.96^(t psi) / 2).
MOMENTUM_DECAY = 4e-3


def update_moments(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]
) -> None:
    """Advance the running first and second moment in place; all tensors of one shape."""
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])


def adam_increment(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Bias-corrected Adam: -lr m_hat / (sqrt(v_hat) + eps); `step` counts from 1.

    The corrections are moved into the factor and into eps, so that four passes over one new
    tensor are enough.
    """
    root_correction = math.sqrt(1 - betas[1] ** step)
    root = exp_avg_sq.sqrt().add_(eps * root_correction)
    return torch.div(exp_avg, root, out=root).mul_(-lr * root_correction / (1 - betas[0] ** step))


def nadam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    mu_product: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, float]:
    """NAdam direction as in torch.optim.NAdam (Dozat 2016).

    Args:
        gradient: Gradient of this step.
        exp_avg: First moment, already advanced.
        exp_avg_sq: Second moment, already advanced.
        step: Number of this step, from 1.
        mu_product: Product of mu over the earlier steps (1 before the first).
        betas: Decay of both moments.
        eps: Added to the root of the second moment.

    Returns:
        The direction, to be multiplied by -lr, and the product of mu including this step.
    """
    mu = betas[0] * (1 - 0.5 * 0.96 ** (step * MOMENTUM_DECAY))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((step + 1) * MOMENTUM_DECAY))
    mu_product *= mu
    root = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    direction = gradient * ((1 - mu) / (1 - mu_product))
    direction += exp_avg * (mu_next / (1 - mu_product * mu_next))
    return direction.div_(root), mu_product


@torch.no_grad()
def euclidean_step(
    parameter: Tensor,
    gradient: Tensor,
    state: MutableMapping[str, Any],
    lr: float,
    config: OptimConfig,
) -> None:
    """One NAdam or AdamW step in place, followed by ordinary Lookahead when it is due.

    Args:
        parameter: Values, any shape; changed in place.
        gradient: Same shape.
        state: `euclidean_state` of the parameter; its step counter is advanced here.
        lr: Learning rate of this step.
        config: Update rule, moments, weight decay and Lookahead.
    """
    state["step"] += 1
    moments = state["exp_avg"], state["exp_avg_sq"]
    update_moments(gradient, *moments, config.betas)
    if config.euclidean == "nadam":
        direction, state["mu_product"] = nadam_direction(
            gradient, *moments, state["step"], state["mu_product"], config.betas, config.eps
        )
        increment = direction.mul_(-lr)
    else:
        increment = adam_increment(*moments, state["step"], lr, config.betas, config.eps)
    parameter.mul_(1 - lr * config.weight_decay).add_(increment)
    if config.lookahead_steps and state["step"] % config.lookahead_steps == 0:
        parameter.copy_(state["slow"].lerp_(parameter, config.lookahead_factor))


def new_state(parameter: Tensor, config: OptimConfig, *, on_manifold: bool) -> dict[str, Any]:
    """State before the first step of a parameter or flat partition.

    Keys: `step`, `exp_avg`, `exp_avg_sq`; with Lookahead `slow` (X_0) and, on a manifold,
    `tangent_sum`; for Euclidean NAdam `mu_product`.
    """
    state: dict[str, Any] = {
        "step": 0,
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
    if config.lookahead_steps:
        state["slow"] = parameter.detach().clone()
        if on_manifold:
            state["tangent_sum"] = torch.zeros_like(parameter)
    if not on_manifold and config.euclidean == "nadam":
        state["mu_product"] = 1.0
    return state


def euclidean_average(parameter: Tensor, slow: Tensor | None, factor: float) -> Tensor:
    """Value after a Lookahead synchronisation now, in float64, without changing anything."""
    value = parameter.detach().to(torch.float64)
    return value if slow is None else slow.to(torch.float64).lerp(value, factor)
