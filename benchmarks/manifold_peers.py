"""Optimizers of orthogonal matrices that are not the project's, on one kind of problem."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim.manifolds import ORTHOGONAL

LR = 1e-3
Work = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """One optimizer and its matrices."""

    step: Work
    """One step of all matrices."""
    matrix: Callable[[], Tensor]
    """The first matrix as it is now."""
    target: str = ""
    """What the project asks of the ratio to the manifold step."""


@dataclass(frozen=True)
class Problem:
    """Orthogonal starting points and gradients, on one device."""

    width: int
    matrices: int
    device: torch.device

    def point(self) -> Tensor:
        """Haar-distributed float32 matrix; the same for every contestant."""
        start = ORTHOGONAL.random((self.width, self.width), torch.Generator().manual_seed(0))
        return start.float().to(self.device)

    def normal(self, seed: int) -> Tensor:
        """Gaussian (n, n) in float32."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.width, self.width, generator=generator).to(self.device)

    def parameters(self) -> list[nn.Parameter]:
        """Starting points with their gradients."""
        start, parameters = self.point(), []
        for seed in range(self.matrices):
            parameters.append(nn.Parameter(start.clone()))
            parameters[-1].grad = self.normal(seed + 1)
        return parameters


Factory = Callable[[Problem], Contestant]


def geoopt_adam(problem: Problem, *, canonical: bool, target: str) -> Contestant:
    """RiemannianAdam of geoopt on a Stiefel manifold."""
    import geoopt

    manifold = geoopt.Stiefel(canonical=canonical)
    points = []
    for p in problem.parameters():
        points.append(geoopt.ManifoldParameter(p.detach().clone(), manifold=manifold))
        points[-1].grad = p.grad
    optimizer = geoopt.optim.RiemannianAdam(points, lr=LR)
    return Contestant(optimizer.step, lambda: points[0].detach(), target)


def parametrized(problem: Problem, orthogonal_map: str, target: str) -> Contestant:
    """Parametrisation of torch: forward and backward of the map, then Adam."""
    modules, gradients = [], []
    for p in problem.parameters():
        module = nn.Linear(problem.width, problem.width, bias=False, device=problem.device)
        module.weight.data.copy_(p.data)
        nn.utils.parametrizations.orthogonal(module, orthogonal_map=orthogonal_map)
        modules.append(module)
        gradients.append(p.grad)
    optimizer = torch.optim.Adam([p for m in modules for p in m.parameters()], lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        for module, gradient in zip(modules, gradients, strict=True):
            module.weight.backward(gradient)
        optimizer.step()

    return Contestant(step, lambda: modules[0].weight.detach(), target)


def muon_newton_schulz(problem: Problem, target: str) -> Contestant:
    """Muon's quintic Newton-Schulz iteration, five times, in float32 (its bf16 needs hardware).

    It orthogonalises the update; the matrix is not orthogonal and is not meant to be.
    """
    parameters = problem.parameters()
    a, b, c = 3.4445, -4.7750, 2.0315

    def step() -> None:
        with torch.no_grad():
            for p in parameters:
                X = p.grad / torch.linalg.matrix_norm(p.grad)
                for _ in range(5):
                    A = X @ X.mT
                    X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
                p.add_(X, alpha=-LR)

    return Contestant(step, lambda: parameters[0].detach(), target)


def public_peer(problem: Problem, checkouts: Path, name: str, **settings: Any) -> Contestant:
    """POGO with its VectorAdam, or LandingSGD, as their repositories have them."""
    if str(checkouts / name) not in sys.path:
        sys.path.insert(0, str(checkouts / name))
    module = importlib.import_module(name)
    parameters = problem.parameters()
    if name == "pogo":
        base = importlib.import_module("pogo.base").VectorAdam()
        optimizer = module.POGO(parameters, base, LR, flatten_fn=lambda x: x.unsqueeze(0))
    else:
        import geoopt

        parameters = [
            geoopt.ManifoldParameter(p.detach().clone(), manifold=geoopt.Stiefel())
            for p in parameters
        ]
        optimizer = module.LandingSGD(parameters, lr=LR, **settings)
        for p, source in zip(parameters, problem.parameters(), strict=True):
            p.grad = source.grad
    return Contestant(optimizer.step, lambda: parameters[0].detach(), ">= 1")


PUBLIC: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POGO, VectorAdam", "pogo", {}),
    ("LandingSGD, its default momentum 0.9", "landing", {"momentum": 0.9}),
    ("LandingSGD, no momentum", "landing", {"momentum": 0.0}),
)


def public_peers(checkouts: Path | None) -> tuple[dict[str, Factory], list[str]]:
    """The public peers that are at hand, named with their commits, and those that are not."""
    found: dict[str, Factory] = {}
    missing = []
    for title, name, settings in PUBLIC:
        folder = None if checkouts is None else checkouts / name
        if folder is None or not folder.exists():
            missing.append(title)
            continue
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        make = partial(public_peer, checkouts=folder.parent, name=name, **settings)
        found[f"{title} (public, {commit})"] = make
    return found, missing


class RandomSubmanifold:
    """RSDM (Han, Poirion and Takeda, ICML 2025): a step on O(r), of r rows drawn anew.

    With rows R, X_R <- exp(-lr skew(G_R X_R^T)) X_R, so X stays orthogonal. It takes
    2 (r/n)^2 products, and a few of size r.
    """

    def __init__(self, X: Tensor, rows: int, lr: float) -> None:
        self.X, self.rows, self.lr = X, rows, lr
        self.generator = torch.Generator().manual_seed(0)

    def step(self, G: Tensor) -> None:
        """Move along the gradient G (n, n)."""
        drawn = torch.randperm(len(self.X), generator=self.generator)[: self.rows]
        drawn = drawn.to(self.X.device)
        X = self.X[drawn]
        A = G[drawn] @ X.mT
        # X^T moves on the right of what `retract` knows: (X^T U^T)^T = U X.
        self.X[drawn] = ORTHOGONAL.retract(X.mT, (A - A.mT).mul_(self.lr / 2)).mT


def random_submanifold(problem: Problem, share: float, target: str = "") -> Contestant:
    """Steps of `RandomSubmanifold` of all matrices, with the gradients of the problem."""
    rows = round(share * problem.width)
    steppers = [
        (RandomSubmanifold(p.detach().clone(), rows, LR), p.grad)
        for p in problem.parameters()
        if p.grad is not None
    ]

    def step() -> None:
        for stepper, gradient in steppers:
            stepper.step(gradient)

    return Contestant(step, lambda: steppers[0][0].X, target)


def peers() -> tuple[dict[str, Factory], list[str]]:
    """What package indexes offer, random submanifolds, Muon; and what is not installed."""
    found: dict[str, Factory] = {
        "torch parametrizations.orthogonal, cayley": partial(
            parametrized, orthogonal_map="cayley", target=">= 1.8"
        ),
        "torch parametrizations.orthogonal, matrix_exp": partial(
            parametrized, orthogonal_map="matrix_exp", target=">= 10"
        ),
        "random submanifold (RSDM), half of the rows": partial(random_submanifold, share=1 / 2),
        "random submanifold (RSDM), a quarter": partial(random_submanifold, share=1 / 4),
        "another class, X not orthogonal: Muon, five Newton-Schulz steps, float32": partial(
            muon_newton_schulz, target=">= 3"
        ),
    }
    of_geoopt: dict[str, Factory] = {
        "geoopt RiemannianAdam, canonical Stiefel": partial(
            geoopt_adam, canonical=True, target=">= 2.5"
        ),
        "geoopt RiemannianAdam, Euclidean Stiefel": partial(
            geoopt_adam, canonical=False, target=">= 1.5"
        ),
    }
    if importlib.util.find_spec("geoopt") is None:
        return found, list(of_geoopt)
    return of_geoopt | found, []
