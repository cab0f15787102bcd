"""Attacks: they find adversarial examples, so they bound robust accuracy from above.

Every attack searches a ball around each image, of a radius of its own, in l2 or l-infinity, and
returns points of that ball. Whether a point is adversarial is for the caller to judge.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ModelError

Norm = Literal["l2", "linf"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, K) and classes (B,) to what an attack maximises, (B,)."""

_ENOUGH_INCREASES = 0.75
_MOMENTUM = 0.25


@dataclasses.dataclass(frozen=True)
class Balls:
    """Closed balls around images, all of R^n or the part of it with pixels in [0, 1].

    Raises:
        ModelError: images of another type than float32 and float64, radii of another shape,
            negative or not finite, or images outside of [0, 1] where pixels are to stay inside.
    """

    images: Tensor
    """Centres, float32 or float64, shape (B, C, H, W)."""
    eps: Tensor
    """Radii in pixels of [0, 1], shape (B,)."""
    norm: Norm = "l2"
    """Norm of the distance."""
    clip: bool = False
    """Keep pixels in [0, 1]."""

    def __post_init__(self) -> None:
        if self.images.dtype not in (torch.float32, torch.float64):
            raise ModelError(f"images of type {self.images.dtype}; float32 or float64 is needed")
        one_each = self.eps.shape == self.images.shape[:1]
        if not one_each or not bool(((self.eps >= 0) & self.eps.isfinite()).all()):
            raise ModelError(
                f"eps of shape {tuple(self.eps.shape)} for {len(self.images)} images; "
                "one radius per image is needed, finite and not negative"
            )
        if self.clip and not bool(((self.images >= 0) & (self.images <= 1)).all()):
            raise ModelError(
                "pixels are to stay in [0, 1], but those of the images do not lie there"
            )

    def __getitem__(self, rows: Tensor) -> "Balls":
        return dataclasses.replace(self, images=self.images[rows], eps=self.eps[rows])

    @property
    def radius(self) -> Tensor:
        """Radii in the type of the images, shape (B, 1, 1, 1)."""
        return _column(self.eps.to(self.images))

    def lengths(self, delta: Tensor) -> Tensor:
        """Norms of (B, C, H, W), shape (B,)."""
        return delta.flatten(1).norm(p=2 if self.norm == "l2" else torch.inf, dim=1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Steps of norm 1 along which a function of this gradient rises fastest."""
        if self.norm == "linf":
            return gradient.sign()
        tiny = torch.finfo(gradient.dtype).tiny
        return gradient / _column(self.lengths(gradient).clamp(min=tiny))

    def project(self, points: Tensor) -> Tensor:
        """Nearest points of the balls, up to rounding; pixels are cut to [0, 1] after that."""
        delta = points - self.images
        if self.norm == "linf":
            delta = delta.clamp(-self.radius, self.radius)
        else:
            tiny = torch.finfo(delta.dtype).tiny
            length = _column(self.lengths(delta).clamp(min=tiny))
            delta = delta * (self.radius / length).clamp(max=1)
        # Cutting moves a point towards any image in [0, 1], so it stays in the ball.
        return self._cut(self.images + delta)

    def random(self, generator: torch.Generator | None) -> Tensor:
        """Random points: of the sphere in l2, uniform in the cube in l-infinity."""
        shape, kind = self.images.shape, self.images.dtype
        if self.norm == "linf":
            noise = 2 * torch.rand(shape, generator=generator, dtype=kind) - 1
        else:
            noise = self.steepest(torch.randn(shape, generator=generator, dtype=kind))
        return self.project(self.images + self.radius * noise.to(self.images))

    def inside(self, points: Tensor) -> Tensor:
        """Points whose distance, computed in float64, is at most eps: nothing is left to rounding.

        What lies outside is drawn towards the image, by as little as the type of the images
        resolves; a ball in which that finds no other point keeps its image.
        """
        centre, eps = self.images.double(), self.eps.double()
        slack = torch.finfo(points.dtype).eps
        for _ in range(8):
            delta = points.double() - centre
            lengths = self.lengths(delta)
            outside = _column(lengths > eps)
            if not bool(outside.any()):
                return points
            shrunk = centre + delta * _column(eps / lengths * (1 - slack))
            points = torch.where(outside, self._cut(shrunk.to(points)), points)
            slack *= 4
        left = self.lengths(points.double() - centre) > eps
        return torch.where(_column(left), self.images, points)

    def _cut(self, points: Tensor) -> Tensor:
        return points.clamp(0, 1) if self.clip else points


def margins(logits: Tensor, classes: Tensor) -> Tensor:
    """Largest other logit minus the logit of the class, shape (B,): positive where it has lost."""
    own = classes[:, None]
    rival = logits.scatter(1, own, -torch.inf).amax(1)
    return rival - logits.gather(1, own).squeeze(1)


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of each sample, shape (B,)."""
    return F.cross_entropy(logits, classes, reduction="none")


def targeted_dlr(targets: Tensor) -> Loss:
    """Targeted difference of logits ratio (arXiv 2003.01690, eq. 7).

    (y_target - y_class) / (y_(1) - (y_(3) + y_(4)) / 2), which needs four classes; with fewer
    the difference alone, the loss of Carlini and Wagner.

    Args:
        targets: class to move to, shape (B,).
    """

    def loss(logits: Tensor, classes: Tensor) -> Tensor:
        lead = (logits.gather(1, targets[:, None]) - logits.gather(1, classes[:, None])).squeeze(1)
        if logits.shape[1] < 4:
            return lead
        top = logits.topk(4, dim=1).values
        return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    return loss


def top_rivals(logits: Tensor, classes: Tensor, count: int) -> Tensor:
    """The `count` other classes with the largest logits, at most K - 1, shape (B, count)."""
    others = logits.scatter(1, classes[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def apgd(
    network: nn.Module,
    images: Tensor,
    classes: Tensor,
    eps: Tensor,
    *,
    loss: Loss = cross_entropy,
    norm: Norm = "l2",
    steps: int = 100,
    restarts: int = 1,
    clip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD (arXiv 2003.01690, algorithm 1): its steps shrink where they stop paying.

    The first run starts at the image, the others at random points; samples that are misclassified
    already take no further run.

    Args:
        network: images to logits, differentiable.
        images: float32 or float64, shape (B, C, H, W); the search runs in this type.
        classes: class of each image to move away from, shape (B,).
        eps: radius of each image in pixels of [0, 1], shape (B,).
        loss: what is maximised.
        norm: norm of the ball.
        steps: gradient steps of a run.
        restarts: number of runs.
        clip: keep pixels in [0, 1]. Off by default: a certificate holds on all of R^n.
        generator: CPU randomness of the starts.

    Returns:
        Of all points met, those where the class is furthest behind its best rival, shape
        (B, C, H, W), inside the balls.

    Raises:
        ModelError: see Balls; fewer than one step or run.
    """
    balls = _balls(images, eps, norm, clip, steps, restarts)
    losses = [lambda _: loss]
    return _auto_pgd(network, balls, classes, losses, steps, restarts, generator)


def apgd_targeted(
    network: nn.Module,
    images: Tensor,
    classes: Tensor,
    eps: Tensor,
    *,
    rivals: int = 9,
    norm: Norm = "l2",
    steps: int = 100,
    restarts: int = 1,
    clip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD on the targeted DLR loss, once per rival: APGD-T of arXiv 2003.01690.

    Args:
        network: see apgd.
        images: see apgd.
        classes: see apgd.
        eps: see apgd.
        rivals: targets, the classes with the largest logits at the image; at most K - 1.
        norm: see apgd.
        steps: gradient steps of a run.
        restarts: number of runs per target.
        clip: see apgd.
        generator: see apgd.

    Returns:
        See apgd.

    Raises:
        ModelError: see apgd.
    """
    balls = _balls(images, eps, norm, clip, steps, restarts)
    with torch.no_grad():
        targets = top_rivals(network(images), classes, rivals)
    losses = [partial(_loss_towards, target) for target in targets.mT]
    return _auto_pgd(network, balls, classes, losses, steps, restarts, generator)


def _loss_towards(target: Tensor, rows: Tensor) -> Loss:
    return targeted_dlr(target[rows])


def _auto_pgd(
    network: nn.Module,
    balls: Balls,
    classes: Tensor,
    losses: Sequence[Callable[[Tensor], Loss]],
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Runs on every loss from the images, then again from random points.

    A loss is made from the rows of the samples that a run attacks.
    """

    def run(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        part = balls[rows]
        start = part.random(generator) if number >= len(losses) else part.images
        loss = losses[number % len(losses)](rows)
        return _ascend(network, part, classes[rows], loss, start, steps)

    return _repeat(network, balls, run, restarts * len(losses))


def pgd(
    network: nn.Module,
    images: Tensor,
    classes: Tensor,
    eps: Tensor,
    *,
    norm: Norm = "l2",
    steps: int = 100,
    restarts: int = 1,
    clip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy by foolbox, steps of length 2.5 eps / steps.

    Another implementation than that of `apgd`: its own projection, gradient and clipping.

    Args:
        network: see apgd; in evaluation mode.
        images: see apgd.
        classes: see apgd.
        eps: see apgd.
        norm: see apgd.
        steps: gradient steps of a run.
        restarts: number of runs, each from a random point.
        clip: see apgd.
        generator: see apgd.

    Returns:
        Last points of the runs; where the class is furthest behind its best rival, if several.

    Raises:
        ModelError: see apgd.
    """
    foolbox, eagerpy = _foolbox()
    balls = _balls(images, eps, norm, clip, steps, restarts)
    bounds = (0, 1) if clip else (-torch.inf, torch.inf)
    model = foolbox.PyTorchModel(network, bounds=bounds, device=images.device)
    base: Any = {
        "l2": foolbox.attacks.L2ProjectedGradientDescentAttack,
        "linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
    }[norm]

    class FromStart(base):
        """foolbox draws from the global generator."""

        start: Tensor

        def get_random_start(self, x0: Any, epsilon: Any) -> Any:
            return eagerpy.astensor(self.start)

    def run(rows: Tensor, restart: int) -> tuple[Tensor, Tensor]:
        part = balls[rows]
        # foolbox takes one radius per image where it has the type and shape that the norm asks for.
        radius = part.radius if norm == "linf" else eagerpy.astensor(part.radius.flatten())
        length = eagerpy.astensor(2.5 / steps * part.radius)
        attack = FromStart(abs_stepsize=length, steps=steps)
        attack.start = part.random(generator)
        criterion = foolbox.criteria.Misclassification(classes[rows])
        found = attack.run(model, part.images, criterion, epsilon=radius)
        with torch.no_grad():
            return found, margins(network(found), classes[rows])

    return _repeat(network, balls, run, restarts)


def _foolbox() -> tuple[Any, Any]:
    """The modules foolbox and eagerpy, its tensors."""
    # foolbox imports GitPython, which otherwise fails on a machine without the git program.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    with warnings.catch_warnings():
        # foolbox 3.3.4 takes a name from a namespace that SciPy 2 will drop.
        warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)
        import eagerpy
        import foolbox
    return foolbox, eagerpy


def _balls(images: Tensor, eps: Tensor, norm: Norm, clip: bool, steps: int, restarts: int) -> Balls:
    if steps < 1 or restarts < 1:
        raise ModelError(f"{steps} steps and {restarts} restarts; at least one of each is needed")
    return Balls(images, eps, norm, clip)


def _repeat(
    network: nn.Module,
    balls: Balls,
    run: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    runs: int,
) -> Tensor:
    """Call run(rows, number) -> points, margins on samples that still hold; the best points."""
    best = balls.images.clone()
    margin = torch.full_like(best[:, 0, 0, 0], -torch.inf)
    with torch.enable_grad(), _frozen(network):
        for number in range(runs):
            rows = (margin <= 0).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            points, reached = run(rows, number)
            better = reached.to(margin) > margin[rows]
            best[rows[better]] = points[better]
            margin[rows[better]] = reached[better].to(margin)
    return balls.inside(best)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No gradient of a parameter is computed."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@dataclasses.dataclass
class _State:
    """A point of each ball with what was computed there."""

    points: Tensor
    value: Tensor
    gradient: Tensor

    def take(self, rows: Tensor, other: "_State") -> None:
        """Replace the rows where `rows` (B,) is true by those of another state."""
        self.points = torch.where(_column(rows), other.points, self.points)
        self.value = torch.where(rows, other.value, self.value)
        self.gradient = torch.where(_column(rows), other.gradient, self.gradient)


def _ascend(
    network: nn.Module, balls: Balls, classes: Tensor, loss: Loss, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """One run of Auto-PGD: the points of largest margin that were met, and the margins (B,)."""
    met, met_margin = start, torch.full_like(start[:, 0, 0, 0], -torch.inf)

    def evaluate(points: Tensor) -> _State:
        nonlocal met, met_margin
        points = points.detach().requires_grad_()
        logits = network(points)
        value = loss(logits, classes)
        (gradient,) = torch.autograd.grad(value.sum(), points)
        points, margin = points.detach(), margins(logits.detach(), classes).to(met_margin)
        better = margin > met_margin
        met = torch.where(_column(better), points, met)
        met_margin = torch.where(better, margin, met_margin)
        return _State(points, value.detach(), gradient)

    now = evaluate(start)
    best = dataclasses.replace(now)
    size, previous = 2 * balls.radius, start
    increases, best_at_check = torch.zeros_like(now.value), best.value
    halved = torch.ones_like(now.value, dtype=torch.bool)
    checks, last_check = _checkpoints(steps), 0
    for step in range(1, steps + 1):
        ascent = balls.project(now.points + size * balls.steepest(now.gradient))
        if step > 1:
            momentum = _MOMENTUM * (now.points - previous)
            ascent = balls.project(now.points + (1 - _MOMENTUM) * (ascent - now.points) + momentum)
        value, previous = now.value, now.points
        now = evaluate(ascent)
        increases += now.value > value
        best.take(now.value > best.value, now)
        if step in checks:
            unimproved = ~halved & (best.value == best_at_check)
            halved = (increases < _ENOUGH_INCREASES * (step - last_check)) | unimproved
            size = torch.where(_column(halved), size / 2, size)
            now.take(halved, best)
            increases, best_at_check, last_check = torch.zeros_like(value), best.value, step
    return met, met_margin


def _checkpoints(steps: int) -> set[int]:
    """Steps after which the step size is reconsidered: windows of 22 %, 19 %, ... down to 6 %."""
    checks = [0.0, 0.22]
    while checks[-1] < 1:
        checks.append(checks[-1] + max(checks[-1] - checks[-2] - 0.03, 0.06))
    return {math.ceil(check * steps) for check in checks[1:]}


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
