"""Projected gradient attack in l2: finds adversarial examples, so it bounds CRA from above."""

import torch
from torch import Tensor, nn

from model.errors import ModelError


def attack_l2(
    network: nn.Module,
    images: Tensor,
    classes: Tensor,
    eps: Tensor,
    *,
    steps: int = 50,
    restarts: int = 2,
    clip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Maximise max_{j != class} y_j - y_class over the l2 ball of each image.

    The first run starts at the image, the others at random points of the sphere. Steps of constant
    length 2.5 eps / steps follow the normalised gradient.

    Args:
        network: images to logits, differentiable.
        images: shape (B, C, H, W).
        classes: class of each image to move away from, shape (B,).
        eps: radius of each image, in pixels, shape (B,).
        steps: gradient steps of a run.
        restarts: number of runs.
        clip: keep pixels in [0, 1]. Off by default: the certificate holds on all of R^n.
        generator: randomness of the starts.

    Returns:
        The points with the largest objective met, shape (B, C, H, W); the attack on a sample
        succeeded where their prediction differs from `classes`.

    Raises:
        ModelError: eps of another shape or negative.
    """
    if eps.shape != images.shape[:1] or not bool((eps >= 0).all()):
        raise ModelError(
            f"eps of shape {tuple(eps.shape)} for {len(images)} images; "
            "one radius per image is needed, not negative"
        )
    radius = eps.to(images).reshape(-1, 1, 1, 1)
    best, best_objective = images.clone(), torch.full_like(eps.to(images), -torch.inf)

    def to_ball(points: Tensor) -> Tensor:
        delta = points - images
        points = images + delta * (radius / _norm(delta)).clamp(max=1)
        # Clipping moves a point towards any image in [0, 1], so it stays in the ball.
        return points.clamp(0, 1) if clip else points

    for restart in range(restarts):
        points = images.clone()
        if restart:
            noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
            points = to_ball(images + radius * noise.to(images) / _norm(noise).to(images))
        for step in range(steps + 1):
            points.requires_grad_(True)
            objective = _objective(network(points), classes)
            (gradient,) = torch.autograd.grad(objective.sum(), points)
            points = points.detach()
            improved = objective.detach() > best_objective
            best_objective = torch.where(improved, objective.detach(), best_objective).to(best)
            best = torch.where(improved.reshape(-1, 1, 1, 1), points, best)
            if step < steps:
                move = 2.5 * radius / steps * gradient / _norm(gradient)
                points = to_ball(points + move)
    return best


def _norm(x: Tensor) -> Tensor:
    norm = x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    return norm.clamp(min=torch.finfo(x.dtype).tiny)


def _objective(logits: Tensor, classes: Tensor) -> Tensor:
    own = classes[:, None]
    rival = logits.scatter(1, own, -torch.inf).amax(1)
    return rival - logits.gather(1, own).squeeze(1)
