"""One step of the matrices of a partition: what a round does, and how rounds overlap.

A round is written as a coroutine that yields wherever it waits for the other ranks. Run one after
the other, rounds are the plain algorithm; interleaved, what one sends travels while another one
multiplies. The ranks begin the same collectives in the same order in either case, also those that
own nothing, and rounds share no element, so the results are the same bit for bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.adam import adam_increment, update_moments
from optim.collectives import Exchange, Transfer
from optim.config import OptimConfig
from optim.failure_sync import Guard
from optim.manifolds import Manifold
from optim.matmul import Precision
from optim.orthogonality_audit import Audit
from optim.retraction import correction_due
from optim.zero_layout import FlatPartition, Round


@dataclass(frozen=True)
class ManifoldStep:
    """One step of the matrices of one partition, of which `flat.grad` is this rank's gradient."""

    partition: FlatPartition
    manifold: Manifold
    state: dict[str, Any]
    """Of the partition, its step counter advanced already."""
    lr: float
    config: OptimConfig
    exchange: Exchange
    audit: Audit
    guard: Guard
    increment: Precision
    """Of the products that make an increment."""

    @property
    def synchronises(self) -> bool:
        """Whether this step ends with a Lookahead synchronisation."""
        steps = self.config.lookahead_steps
        return steps > 0 and self.state["step"] % steps == 0

    @property
    def projects(self) -> bool:
        """Whether this step ends with a polar projection."""
        every = self.config.polar_every
        return every > 0 and self.state["step"] % every == 0

    @property
    def corrects(self) -> bool:
        """Whether this step ends with a correction of the matrices that it moves."""
        config = self.config
        due = correction_due(self.state["step"], config.lookahead_steps)
        return config.retraction == "fast" and due

    def update(self, plan: Round) -> Iterator[None]:
        """Update the matrices of one round, in the order of the reference. Collective.

        Yields:
            Four times, with nothing to do but wait for the others.
        """
        config, exchange = self.config, self.exchange
        cut = slice(plan.start, plan.stop)
        master, gradient = self.partition.flat[cut], self.partition.flat.grad[cut]  # type: ignore[index]

        points, gradients = exchange.to_owner(master, plan), exchange.to_owner(gradient, plan)
        yield
        X = points.wait()
        tangents = self._send_tangents(plan, X, gradients.wait(), torch.empty_like(master))
        yield
        increment = self._increment(cut, tangents.wait())
        if self.synchronises:  # the fast matrix is about to be replaced: only the slow one moves
            # The fast matrices are let go before the slow ones arrive.
            X, points = [], exchange.to_owner(self.state["slow"][cut], plan)
            increment = self.state["tangent_sum"][cut] * config.lookahead_factor
        increments = exchange.to_owner(increment, plan)
        # A range of the partition less while the rounds wait.
        del increment
        yield
        X = points.wait() if self.synchronises else X
        returning = self._send_moved(plan, X, increments.wait(), master)
        del X
        yield
        returning.wait()
        self._follow(plan, cut)

    def _send_tangents(
        self, plan: Round, X: list[Tensor], G: list[Tensor], out: Tensor
    ) -> Transfer[Tensor]:
        """Begin to send the tangents; of each gradient its tangent takes the place."""
        for number, slot in enumerate(plan.owned[self.exchange.rank]):
            if slot.trivialized:  # skew after the sum: it may round (i, j) and (j, i) differently
                G[number] = self.manifold.algebra_part(G[number])
            else:
                G[number] = self.manifold.tangent(X[number], G[number], self.increment)
        return self.exchange.to_partitions(G, plan, out)

    def _increment(self, cut: slice, tangent: Tensor) -> Tensor:
        """Advance Adam's moments, element by element, and the sum of the increments."""
        config, state = self.config, self.state
        moments = state["exp_avg"][cut], state["exp_avg_sq"][cut]
        update_moments(tangent, *moments, config.betas)
        increment = adam_increment(*moments, state["step"], self.lr, config.betas, config.eps)
        if config.lookahead_steps:
            state["tangent_sum"][cut] += increment
        return increment

    def _send_moved(
        self, plan: Round, X: list[Tensor], D: list[Tensor], master: Tensor
    ) -> Transfer[Tensor]:
        """Move the matrices, correct, retract and measure them where due, begin to send them.

        X and D are used up: of each matrix its successor takes the place.
        """
        config, slots = self.config, plan.owned[self.exchange.rank]
        for number in range(len(X)):
            X[number] = self.manifold.retract(X[number], D.pop(0), config.rule, self.increment)
            if self.corrects:
                X[number] = self.manifold.correct(X[number])
        if self.projects:
            X[:] = self.guard.call(slots, lambda x, slot: self.manifold.project(x), X)
        if self.audit.due(self.state["step"]):
            for x, slot in zip(X, slots, strict=True):
                self.audit.measure(slot.name, x, self.manifold)
        return self.exchange.to_partitions(X, plan, master)

    def _follow(self, plan: Round, cut: slice) -> None:
        """Let the slow matrices follow a synchronisation or a retraction."""
        state, exchange = self.state, self.exchange
        if self.synchronises:
            state["slow"][cut] = self.partition.flat[cut]
            state["tangent_sum"][cut] = 0.0
        elif self.projects and self.config.lookahead_steps:
            slow = exchange.to_owner(state["slow"][cut], plan).wait()
            slots = plan.owned[exchange.rank]
            # Both copies or neither: one that is off would pull the other when they synchronise.
            projected = self.guard.call(slots, lambda x, slot: self.manifold.project(x), slow)
            exchange.to_partitions(projected, plan, state["slow"][cut]).wait()


def in_sequence(rounds: Sequence[Iterator[None]]) -> None:
    """Run rounds one after the other."""
    for update in rounds:
        for _ in update:
            pass


def interleaved(rounds: Sequence[Iterator[None]]) -> None:
    """Run rounds of `ManifoldStep.update` so that each product hides what was sent before it.

    At tick t, in this order, round t + 1 asks for its X and G; t forms its tangents and sends them;
    t - 2, whose matrices have travelled meanwhile, ends; t - 1 applies its exponentials and sends
    its matrices; and t, whose tangents have travelled meanwhile, sends its increments. So at an
    owner lie the matrices of one round, X and G of the next, and X and A or D of the one between.
    """
    for tick in range(-1, len(rounds) + 2):
        for number in (tick + 1, tick, tick - 2, tick - 1, tick):
            if 0 <= number < len(rounds):
                next(rounds[number], None)
