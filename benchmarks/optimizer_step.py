"""Time of the manifold step against its own products and against packaged and public peers.

    python -m benchmarks.optimizer_step [--width 1024] [--matrices 8] [--checkouts FOLDER]

Every contestant updates the same square matrices from a constant gradient, so that every entry of
Adam's direction is 1 and the update as large as at the first step of learning rate 1e-3. The unit
is one float32 product of two such matrices. Public peers that are on no package index are run from
FOLDER/pogo and FOLDER/landing (git checkouts), else their rows read `not run`.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from optim.collectives import LocalExchange
from optim.config import OptimConfig
from optim.manifolds import ORTHOGONAL, declare
from optim.matmul import Precision, symmetric_product
from optim.param_groups import parameter_groups
from optim.sharded import ShardedManifoldAdam
from optim.zero_layout import FlatPartition, Slot

LR = 1e-3
LOOKAHEAD, POLAR, AUDIT = 6, 200, 50
DRIFT_STEPS = 200
PRECISIONS: tuple[Precision, ...] = ("full", "tf32", "bf16")
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


class Manifold:
    """The project's step as a training run with one rank calls it, at a chosen kind of step."""

    def __init__(self, problem: Problem, **settings: Any) -> None:
        off = {"lookahead_steps": 0, "polar_every": 0, "audit_every": 0}
        # Without memory the direction is the sign of the gradient at every number of the step.
        config = OptimConfig(**{"lr": LR, "betas": (0.0, 0.0), **off, **settings})
        parameters = [declare(p, ORTHOGONAL) for p in problem.parameters()]
        named = [(f"matrix{i}", p) for i, p in enumerate(parameters)]
        self.optimizer = ShardedManifoldAdam(parameter_groups(named, config), config)
        n = problem.width
        slots = tuple(
            Slot(name, (n, n), n * n, i * n * n, n * n) for i, (name, _) in enumerate(named)
        )
        self.flat = torch.zeros(len(named) * n * n, device=problem.device)
        self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        partition = FlatPartition(self.flat, slots, ORTHOGONAL, lambda: None)
        names = [name for name, _ in named]
        self.optimizer.bind([partition], LocalExchange(), expected_matrices=names)
        start = problem.point().double()
        self.optimizer.initialise(lambda slot: start)
        self.optimizer.param_groups[0]["params"] = [self.flat]
        self.shape = (n, n)

    def step(self) -> None:
        """The next step."""
        self.flat.grad = self.gradient
        self.optimizer.step()

    def step_number(self, number: int) -> Work:
        """A step that the counter calls `number`."""

        def run() -> None:
            self.optimizer.load_scalar_state({"step": number - 1})
            self.step()

        return run

    def matrix(self) -> Tensor:
        """The first matrix."""
        return self.flat[: self.shape[0] ** 2].view(self.shape)


def manifold_steps(problem: Problem) -> dict[str, Contestant]:
    """The step between synchronisations, those that do more, and the paper's rule."""
    plain = Manifold(problem)
    paper = Manifold(problem, series="frobenius")
    polar = Manifold(problem, polar_every=POLAR, lookahead_steps=2 * POLAR)
    audit = Manifold(problem, audit_every=AUDIT)
    lookahead = Manifold(problem, lookahead_steps=LOOKAHEAD)

    def cycle() -> None:
        for _ in range(LOOKAHEAD):
            lookahead.step()

    return {
        "manifold step": Contestant(plain.step, plain.matrix),
        "manifold step, rule of the paper": Contestant(paper.step, paper.matrix),
        "manifold step with Lookahead": Contestant(cycle, lookahead.matrix),
        "step with a polar retraction": Contestant(polar.step_number(POLAR), polar.matrix),
        "step with an audit": Contestant(audit.step_number(AUDIT), audit.matrix),
    }


def reduced_steps(problem: Problem) -> dict[str, Contestant]:
    """The step with reduced precision of the increment; a CPU computes the same, only slower."""
    if problem.device.type != "cuda":
        return {}
    steps = {}
    for precision in PRECISIONS[1:]:
        manifold = Manifold(problem, increment=precision)
        steps[f"manifold step, {precision}"] = Contestant(manifold.step, manifold.matrix)
    return steps


def drift(problem: Problem, precision: Precision) -> float:
    """||X^T X - I||_F after steps in random directions without a retraction."""
    manifold = Manifold(replace(problem, matrices=1), increment=precision)
    for seed in range(DRIFT_STEPS):
        manifold.gradient = problem.normal(seed).flatten()
        manifold.step()
    return ORTHOGONAL.residual(manifold.matrix())


def own_products(problem: Problem) -> Work:
    """The products of order 4 alone: X^T G, D^2 (symmetric, blocked), D^2 V, X M."""
    X, G, D = problem.point(), problem.normal(1), problem.normal(2)
    out = torch.empty_like(X)

    def run() -> None:
        for _ in range(problem.matrices):
            torch.mm(X.mT, G, out=out)
            symmetric_product(D, D)
            torch.mm(D, G, out=out)
            torch.mm(X, D, out=out)

    return run


def one_product(problem: Problem) -> Work:
    """One product per matrix: the unit."""
    X, G = problem.point(), problem.normal(1)
    out = torch.empty_like(X)

    def run() -> None:
        for _ in range(problem.matrices):
            torch.mm(X, G, out=out)

    return run


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
    """Muon's quintic Newton-Schulz iteration, five times, in float32 (its bf16 needs hardware)."""
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


def public_peer(problem: Problem, checkouts: Path, name: str) -> Contestant:
    """POGO with its VectorAdam, or LandingSGD with momentum, as their repositories have them."""
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
        optimizer = module.LandingSGD(parameters, lr=LR, momentum=0.9)
        for p, source in zip(parameters, problem.parameters(), strict=True):
            p.grad = source.grad
    return Contestant(optimizer.step, lambda: parameters[0].detach(), ">= 1")


def public_peers(
    problem: Problem, checkouts: Path | None
) -> tuple[dict[str, Contestant], list[str]]:
    """The public peers that are at hand, named with their commits, and those that are not."""
    found, missing = {}, []
    for name, title in (("pogo", "POGO, VectorAdam"), ("landing", "LandingSGD, momentum")):
        folder = None if checkouts is None else checkouts / name
        if folder is None or not folder.exists():
            missing.append(title)
            continue
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        found[f"{title} (public, {commit})"] = public_peer(problem, folder.parent, name)
    return found, missing


def peers(problem: Problem) -> dict[str, Contestant]:
    """What package indexes offer, and Muon's iteration."""
    return {
        "geoopt RiemannianAdam, canonical Stiefel": geoopt_adam(
            problem, canonical=True, target=">= 2.5"
        ),
        "geoopt RiemannianAdam, Euclidean Stiefel": geoopt_adam(
            problem, canonical=False, target=">= 1.5"
        ),
        "torch parametrizations.orthogonal, cayley": parametrized(problem, "cayley", ">= 1.8"),
        "torch parametrizations.orthogonal, matrix_exp": parametrized(
            problem, "matrix_exp", ">= 10"
        ),
        "Muon: five Newton-Schulz steps, float32": muon_newton_schulz(problem, ">= 3"),
    }


def table(problem: Problem, checkouts: Path | None, *, repeats: int, drift_width: int) -> list[Row]:
    """Measure everything in one run."""
    public, missing = public_peers(problem, checkouts)
    own = {**manifold_steps(problem), **reduced_steps(problem)}
    contestants = {**own, **peers(problem), **public}
    work = {
        "one product": one_product(problem),
        "products of the manifold step": own_products(problem),
        **{name: contestant.step for name, contestant in contestants.items()},
    }
    times = interleaved(work, problem.device, repeats=repeats)
    times["manifold step with Lookahead"] /= LOOKAHEAD
    unit, ours = times["one product"], times["manifold step"]
    least = times["products of the manifold step"]
    rows: list[dict[str, Any]] = []
    for name, time in times.items():
        contestant = contestants.get(name)
        rows.append(
            {
                "what": name,
                "ms per matrix": 1e3 * time / problem.matrices,
                "in products": time / unit,
                "times the manifold step": time / ours,
                "target": contestant.target if contestant else "",
                "residual after": ORTHOGONAL.residual(contestant.matrix()) if contestant else None,
            }
        )
    rows[2]["target"] = f"<= 1.15 of its products: {ours / least:.3f}"
    extra = {
        "Lookahead": times["manifold step with Lookahead"] - ours,
        "polar retraction": (times["step with a polar retraction"] - ours) / POLAR,
        "audit": (times["step with an audit"] - ours) / AUDIT,
    }
    rows += [
        {
            "what": f"{name}, per step",
            "in products": time / unit,
            "times the manifold step": time / ours,
        }
        for name, time in extra.items()
    ]
    rows += [{"what": name, "in products": "not run"} for name in missing]
    narrow = replace(problem, width=drift_width)
    rows += [
        {"what": f"drift, {precision}", "residual after": drift(narrow, precision)}
        for precision in PRECISIONS
    ]
    return rows


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--matrices", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drift-width", type=int, default=256)
    parser.add_argument("--checkouts", type=Path, help="folder with pogo/ and landing/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem(arguments.width, arguments.matrices, torch.device(arguments.device))
    rows = table(
        problem,
        arguments.checkouts,
        repeats=arguments.repeats,
        drift_width=arguments.drift_width,
    )
    write_result(
        "optimizer_step",
        rows,
        [
            f"{arguments.matrices} matrices of width {arguments.width}, float32, lr {LR}, "
            f"constant gradients, {arguments.device}; median of at most {arguments.repeats} turns.",
            "One product has 2 n^3 operations; the symmetric D^2 is computed from the diagonal on "
            "(5/8 of a product), so order 4 has 3.625 products.",
            f"Per step: Lookahead every {LOOKAHEAD}, polar retraction of the fast and the slow "
            f"matrix every {POLAR}, audit every {AUDIT} steps.",
            "residual after: ||X^T X - I||_F in float64 of the first matrix when all was measured.",
            f"drift: the same after {DRIFT_STEPS} steps in random directions at width "
            f"{arguments.drift_width}, none retracted, by the precision of the increment. Steps in "
            "tf32 and bf16 are timed on CUDA alone: a CPU emulates them.",
        ],
    )


if __name__ == "__main__":
    main()
