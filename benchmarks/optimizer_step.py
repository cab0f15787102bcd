"""Time of the manifold step against its own products and against packaged and public peers.

    python -m benchmarks.optimizer_step [--width 1024] [--matrices 8] [--checkouts FOLDER]

Every contestant updates the same square matrices from a constant gradient, so that every entry of
Adam's direction is 1 and the update as large as at the first step of learning rate 1e-3: an
increment of spectral norm 2 lr sqrt(n), 0.064 at width 1024. The unit is one float32 product of two
such matrices. Public peers that are on no package index are run from FOLDER/pogo and FOLDER/landing
(git checkouts), else their rows read `not run`.

Residuals are those of fresh contestants: after the same number of steps, and when each has come as
far (the sum of ||X' - X||_F over its steps). Costs of what happens now and then are differences of
runs that take turns.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.manifold_peers import (
    LR,
    Contestant,
    Factory,
    Problem,
    RandomSubmanifold,
    Work,
    peers,
    public_peers,
)
from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved, paired, seconds
from optim.collectives import LocalExchange
from optim.config import OptimConfig
from optim.manifolds import ORTHOGONAL, declare, is_trivialized
from optim.matmul import Precision, symmetric_product
from optim.param_groups import parameter_groups
from optim.retraction import CORRECT_EVERY
from optim.zero3_adam import ShardedManifoldAdam
from optim.zero_layout import FlatPartition, Slot
from pipeline.run.malloc import keep_freed_memory

LOOKAHEAD, POLAR, AUDIT = 6, 200, 50
STEPS = 12
"""Steps of a contestant whose residual is compared."""
FARTHEST = 60
"""Most steps until it has come as far as the manifold step in STEPS."""
LARGE = 0.28
"""Spectral norm of a large increment."""
DRIFT_STEPS = 200
LONG_DRIFT_STEPS = 2000
DELIVERED = "manifold step, fast, X^T G of the backward pass"
LIMITS = {"": 2.7, f", theta {LARGE}": 3.3}
"""Most products that the project asks of such a step."""
RETRACTIONS = ("fast", "exp")
PRECISIONS: tuple[Precision, ...] = ("full", "tf32", "bf16")
Descent = tuple[Callable[[Tensor], None], Callable[[], Tensor]]
"""A step along a gradient, and the matrix."""


class Manifold:
    """The project's step as a training run with one rank calls it, at a chosen kind of step."""

    def __init__(self, problem: Problem, **settings: Any) -> None:
        off = {"lookahead_steps": 0, "polar_every": 0, "audit_every": 0}
        # Without memory the direction is the sign of the gradient at every number of the step.
        config = OptimConfig(**{"lr": LR, "betas": (0.0, 0.0), **off, **settings})
        # The same gradients in either form: they are random ones.
        parameters = [declare(p, ORTHOGONAL, trivializes=True) for p in problem.parameters()]
        named = [(f"matrix{i}", p) for i, p in enumerate(parameters)]
        self.optimizer = ShardedManifoldAdam(parameter_groups(named, config), config)
        n = problem.width
        slots = tuple(
            Slot(name, (n, n), n * n, i * n * n, n * n, trivialized=is_trivialized(p))
            for i, (name, p) in enumerate(named)
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

    def step_numbers(self, first: int, last: int) -> Work:
        """Steps that the counter calls `first` to `last`."""

        def run() -> None:
            self.optimizer.load_scalar_state({"step": first - 1})
            for _ in range(first, last + 1):
                self.step()

        return run

    def matrix(self) -> Tensor:
        """The first matrix."""
        return self.flat[: self.shape[0] ** 2].view(self.shape)


def rate_for(theta: float, width: int) -> float:
    """Learning rate whose increment, of signs, has about this spectral norm."""
    return theta / (2 * width**0.5)


def own(problem: Problem, **settings: Any) -> Contestant:
    """The project's step between synchronisations."""
    manifold = Manifold(problem, **settings)
    return Contestant(manifold.step, manifold.matrix)


def manifold_steps(problem: Problem) -> dict[str, Factory]:
    """The step of each kind at a small and a large increment, and by the paper's rule."""
    large = rate_for(LARGE, problem.width)
    found: dict[str, Factory] = {}
    for suffix, lr in (("", LR), (f", theta {LARGE}", large)):
        for retraction in RETRACTIONS:
            found[f"manifold step, {retraction}{suffix}"] = partial(
                own, retraction=retraction, lr=lr
            )
        found[f"{DELIVERED}{suffix}"] = partial(
            own, retraction="fast", gradient="trivialized", lr=lr
        )
    found["manifold step, exp by the rule of the paper"] = partial(
        own, retraction="exp", series="frobenius"
    )
    return found


def now_and_then(problem: Problem, repeats: int) -> list[Row]:
    """What Lookahead, corrections, polar retractions and audits cost per step, by pairs of runs."""
    unit = one_product(problem)
    rows = []
    for name, first, every, settings in (
        # All of its steps: what a synchronisation moves along is the sum of their increments.
        ("Lookahead", 1, LOOKAHEAD, {"lookahead_steps": LOOKAHEAD}),
        ("correction of the fast retraction", CORRECT_EVERY, CORRECT_EVERY, {}),
        ("polar retraction", POLAR, POLAR, {"polar_every": POLAR, "lookahead_steps": 2 * POLAR}),
        ("audit", AUDIT, AUDIT, {"audit_every": AUDIT}),
    ):
        manifold, plain = (
            Manifold(problem, retraction="fast", **settings),
            Manifold(problem, retraction="fast"),
        )
        with_it = manifold.step_numbers(first, every)
        without = plain.step_numbers(1, 1 + every - first)
        differences = paired(with_it, without, unit, problem.device, repeats=repeats)
        low, middle, high = (value / every for value in differences)
        rows.append(
            {
                "what": f"{name}, per step",
                "in products": middle,
                "spread": f"{low:.3f} to {high:.3f}",
            }
        )
    return rows


def reduced_steps(problem: Problem) -> dict[str, Factory]:
    """The step with reduced precision of the increment; a CPU computes the same, only slower."""
    if problem.device.type != "cuda":
        return {}
    return {
        f"manifold step, {retraction}, {precision}": partial(
            own, retraction=retraction, increment=precision
        )
        for retraction in RETRACTIONS
        for precision in PRECISIONS[1:]
    }


def drift(problem: Problem, steps: int, **settings: Any) -> float:
    """Largest ||X^T X - I||_F in steps in random directions without a polar retraction.

    Measured before every correction and at the end: in between it grows.
    """
    manifold, worst = Manifold(replace(problem, matrices=1), **settings), 0.0
    for number in range(1, steps + 1):
        manifold.gradient = problem.normal(number).flatten()
        manifold.step()
        if (number + 1) % CORRECT_EVERY == 0 or number == steps:
            worst = max(worst, ORTHOGONAL.residual(manifold.matrix()))
    return worst


def drifts(narrow: Problem, wide: Problem, long: int) -> list[Row]:
    """Drift of every step at a small width, and of the fast one for long at the full one."""
    kinds = [(retraction, precision) for retraction in RETRACTIONS for precision in PRECISIONS]
    cases = [(narrow, DRIFT_STEPS, *kind) for kind in kinds]
    rows: list[Row] = []
    for problem, steps, retraction, precision in [*cases, (wide, long, "fast", "full")]:
        for theta in (2 * LR * problem.width**0.5, LARGE):
            lr = rate_for(theta, problem.width)
            settings = {"retraction": retraction, "increment": precision, "lr": lr}
            # Of random gradients it is no matter which form is meant: one product less.
            worst = drift(problem, steps, gradient="trivialized", **settings)
            what = f"drift, {retraction}, {precision}, theta {theta:.3f}, "
            what += f"width {problem.width}, {steps} steps"
            rows.append({"what": what, "residual after": worst})
    return rows


def own_products(problem: Problem, symmetric: int, whole: int) -> Work:
    """The products of a step alone: those of which half is computed, and the others."""
    X, D = problem.point(), problem.normal(2)
    out = torch.empty_like(X)

    def run() -> None:
        for _ in range(problem.matrices):
            for _ in range(symmetric):
                symmetric_product(D, D)
            for _ in range(whole):
                torch.mm(X, D, out=out)

    return run


def walk(contestant: Contestant, way: float | None = None) -> dict[str, float | None]:
    """Residual and distance after STEPS steps, and the residual when the distance is `way`.

    The last is None where FARTHEST steps do not come so far.
    """
    before, moved = contestant.matrix().clone(), 0.0
    found: dict[str, float | None] = {}
    for number in range(1, FARTHEST + 1):
        contestant.step()
        after = contestant.matrix()
        moved += float(torch.linalg.matrix_norm(after - before))
        before.copy_(after)
        if way is not None and moved >= way and "residual as far" not in found:
            found["residual as far"] = ORTHOGONAL.residual(after)
        if number == STEPS:
            found |= {"residual after": ORTHOGONAL.residual(after), "moved": moved}
        if number >= STEPS and (way is None or "residual as far" in found):
            break
    return found


# -- by loss at equal time -----------------------------------------------------------------------


def losses_at_equal_time(problem: Problem, steps: int) -> list[Row]:
    """Gradient descent on all rows against random ones: loss after the time of some whole steps.

    The loss is ||(X - T) W||_F^2 / 2n with W = diag(0.1 ... 1) and T = X_0 exp(A), ||A||_2 about 1.
    Its gradient costs everybody the same and is not counted. Of three learning rates the best.
    """
    start, device = problem.point(), problem.device
    A = problem.normal(9) / problem.width**0.5
    target = start @ torch.linalg.matrix_exp((A - A.mT) / 8**0.5)
    weight = torch.linspace(0.1, 1.0, problem.width, device=device).square()

    def all_rows(lr: float) -> Descent:
        X = [start.clone()]

        def step(G: Tensor) -> None:
            X[0] = ORTHOGONAL.retract(X[0], ORTHOGONAL.tangent(X[0], G).mul_(-lr), "fast")

        return step, lambda: X[0]

    def random_rows(share: float, lr: float) -> Descent:
        stepper = RandomSubmanifold(start.clone(), round(share * problem.width), lr)
        return stepper.step, lambda: stepper.X

    def descended(descent: Descent, limit: float) -> tuple[float, int]:
        step, matrix = descent
        spent, count = 0.0, 0
        while spent < limit:
            G = (matrix() - target) * weight
            spent, count = spent + seconds(partial(step, G), device), count + 1
        loss = ((matrix() - target).square() * weight).sum() / (2 * problem.width)
        return float(loss), count

    step, _ = all_rows(1.0)
    times = [seconds(partial(step, (start - target) * weight), device) for _ in range(4)]
    limit = steps * statistics.median(times[1:])
    rows: list[Row] = []
    for name, make in (
        ("all rows", all_rows),
        ("half of the rows at random (RSDM)", partial(random_rows, 1 / 2)),
        ("a quarter at random (RSDM)", partial(random_rows, 1 / 4)),
    ):
        loss, count, lr = min((*descended(make(lr), limit), lr) for lr in (0.5, 1.0, 2.0))
        what = f"gradient descent, {name}: {count} steps in equal time, lr {lr}"
        rows.append({"what": what, "loss": loss})
    return rows


def one_product(problem: Problem) -> Work:
    """One product per matrix: the unit."""
    X, G = problem.point(), problem.normal(1)
    out = torch.empty_like(X)

    def run() -> None:
        for _ in range(problem.matrices):
            torch.mm(X, G, out=out)

    return run


def add_targets(rows: list[dict[str, Any]], times: dict[str, float], public: list[str]) -> None:
    """What the project asks of its steps, and of what is public, in the same run."""
    named = {row["what"]: row for row in rows}
    for suffix, limit in LIMITS.items():
        for step, alone in (
            ("manifold step, fast", "products of the fast step"),
            (DELIVERED, "products without X^T G"),
        ):
            ratio = times[step + suffix] / times[alone + suffix]
            named[step + suffix]["target"] = f"<= 1.12 of its products: {ratio:.3f}"
        named[DELIVERED + suffix]["target"] += f"; <= {limit} products"
    for title in public:
        named[title]["target"] = f">= 1; {times[title] / times[DELIVERED]:.3f} times {DELIVERED}"


def table(
    problem: Problem, checkouts: Path | None, *, repeats: int, drift_width: int, drift_steps: int
) -> list[Row]:
    """Measure everything in one run."""
    public, missing = public_peers(checkouts)
    installed, others = peers()
    ours = manifold_steps(problem)
    factories = {**ours, **reduced_steps(problem), **installed, **public}
    work = {
        "one product": one_product(problem),
        # X^T G and X M, with D^2 and D^3 or D^2 and S V beside them.
        "products of the fast step": own_products(problem, 2, 2),
        f"products of the fast step, theta {LARGE}": own_products(problem, 1, 3),
        "products without X^T G": own_products(problem, 2, 1),
        f"products without X^T G, theta {LARGE}": own_products(problem, 1, 2),
        **{name: make(problem).step for name, make in factories.items()},
    }
    times = interleaved(work, problem.device, repeats=repeats)
    unit, plain = times["one product"], times["manifold step, fast"]
    single = replace(problem, matrices=1)
    way = walk(ours["manifold step, fast"](single))["moved"]
    rows: list[dict[str, Any]] = []
    for label, median in times.items():
        row: dict[str, Any] = {
            "what": label,
            "ms per matrix": 1e3 * median / problem.matrices,
            "in products": median / unit,
            "times the manifold step": median / plain,
        }
        if label in factories:
            contestant = factories[label](single)
            row |= {"target": contestant.target, **walk(contestant, way)}
        rows.append(row)
    add_targets(rows, times, list(public))
    rows += now_and_then(problem, 2 * repeats + 1)
    rows += [{"what": name, "in products": "not run"} for name in (*missing, *others)]
    rows += losses_at_equal_time(problem, 20)
    rows += drifts(replace(problem, width=drift_width), problem, drift_steps)
    return rows


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--matrices", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drift-width", type=int, default=256)
    parser.add_argument("--drift-steps", type=int, default=LONG_DRIFT_STEPS)
    parser.add_argument("--checkouts", type=Path, help="folder with pogo/ and landing/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a rank
    problem = Problem(arguments.width, arguments.matrices, torch.device(arguments.device))
    rows = table(
        problem,
        arguments.checkouts,
        repeats=arguments.repeats,
        drift_width=arguments.drift_width,
        drift_steps=arguments.drift_steps,
    )
    write_result(
        "optimizer_step",
        rows,
        [
            f"{arguments.matrices} matrices of width {arguments.width}, float32, lr {LR}, "
            f"constant gradients, {arguments.device}; median of at most {arguments.repeats} turns.",
            "One product has 2 n^3 operations; of the symmetric D^2 and the skew D^3 5/8 are "
            "computed, so a fast step has 3.25 products (3.625 at theta 0.28), one less where the "
            "backward pass delivers X^T G, one with exp 3.625 or more. Whether X is orthogonal "
            "afterwards differs: see the residuals.",
            f"Per step: Lookahead every {LOOKAHEAD}, correction every {CORRECT_EVERY}, polar "
            f"retraction of the fast and the slow matrix every {POLAR}, audit every {AUDIT} steps; "
            "differences of steps that take turns, median and extremes.",
            f"residual after: ||X^T X - I||_F in float64 of a fresh matrix after {STEPS} steps; "
            "moved: the sum of ||X' - X||_F of these; residual as far: when it has moved as far as "
            f"the fast manifold step in {STEPS}, empty where {FARTHEST} steps do not.",
            "gradient descent: the loss ||(X - T) W||_F^2 / 2n, W = diag(0.1 ... 1), in the time "
            "of 20 steps on all rows, without that of the gradient.",
            "drift: largest residual in steps in random directions without a polar retraction, "
            "before every correction and at the end. Steps in tf32 and bf16 are timed on CUDA "
            "alone: a CPU emulates them.",
        ],
    )


if __name__ == "__main__":
    main()
