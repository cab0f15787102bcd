"""One step of the matrices of a partition: what a round does, and how rounds overlap.

A round is written as a coroutine that yields wherever it waits for the other ranks, or for norms
that decide how its matrices move. Run one after the other, rounds are the plain algorithm;
interleaved, what one sends travels while another one multiplies, and the norms of all of them leave
the device together. The ranks begin the same collectives in the same order in either case, also
those that own nothing, and rounds share no element, so the results are the same bit for bit.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optim.adam_update import adam_increment, update_moments
from optim.collective_errors import Guard
from optim.collectives import Exchange, Transfer
from optim.config import OptimConfig
from optim.manifolds import Manifold
from optim.matmul import Precision, float32_products
from optim.matrix_exp import Decisions, Expected, Move, finished
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
    expected: MutableMapping[tuple[str, bool], Expected]
    """By name of a matrix, and whether it moves at a synchronisation."""
    decisions: Decisions = field(default_factory=Decisions)
    """Of the moves that have begun; the first round that goes on takes all of them."""

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
            Where there is nothing to do but wait: for the others, or until moves are decided.
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
        moves = self._begin_moves(plan, X, increments.wait())
        yield
        returning = self._send_moved(plan, moves, master)
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

    def _begin_moves(self, plan: Round, X: list[Tensor], D: list[Tensor]) -> list[Move]:
        """Queue what decides how the matrices move; X and D are used up."""
        moves = []
        with float32_products(self.increment):
            for slot in plan.owned[self.exchange.rank]:
                expected = self.expected.setdefault((slot.name, self.synchronises), Expected())
                move = self.manifold.move(
                    X.pop(0), D.pop(0), self.config.rule, self.increment, expected
                )
                self.decisions.begin(move)
                moves.append(move)
        return moves

    def _send_moved(self, plan: Round, moves: list[Move], master: Tensor) -> Transfer[Tensor]:
        """Move the matrices, correct, project and measure them where due, begin to send them."""
        slots = plan.owned[self.exchange.rank]
        X = []
        with float32_products(self.increment):
            self.decisions.take()
            while moves:
                X.append(finished(moves.pop(0)))
                if self.corrects:
                    X[-1] = self.manifold.correct(X[-1])
        if self.projects:
            X[:] = self.guard.call(slots, lambda x, slot: self.manifold.project(x), X)
        if self.audit.due(self.state["step"]):
            for x, slot in zip(X, slots, strict=True):
                self.audit.measure(slot.name, x, self.manifold)
        return self.exchange.to_partitions(X, plan, master)

    def _follow(self, plan: Round, cut: slice) -> None:
        """Let the slow matrices follow a synchronisation or a projection."""
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
    t - 1, whose increments have travelled meanwhile, begins its moves; and t, whose tangents have
    travelled meanwhile, sends its increments. When all moves have begun, each round finishes its
    own and sends the matrices, and the one before it ends. So an owner holds the matrices of all
    rounds, their increments and the powers of these (`optim.zero_layout.concurrent_rounds`).
    """
    for tick in range(-1, len(rounds) + 1):
        _advance(rounds, tick + 1, tick, tick - 1, tick)
    for number in range(len(rounds) + 1):
        _advance(rounds, number, number - 1)


def _advance(rounds: Sequence[Iterator[None]], *numbers: int) -> None:
    for number in numbers:
        if 0 <= number < len(rounds):
            next(rounds[number], None)
