"""Rounds that overlap give what rounds in sequence give, bit for bit, at any number of ranks."""

from dataclasses import replace

import pytest
import torch

from optim.collectives import LocalExchange, ProcessGroupExchange
from optim.errors import OptimizerError
from optim.manifold_step import in_sequence, interleaved
from optim.manifolds import ORTHOGONAL, Orthogonal
from tests.harness import run_ranks
from tests.optim.emulation import Emulation, Problem, digest

# A matrix per owner and round: four rounds at two ranks, three at three; the last is not full.
# Step 12 has a synchronisation, a retraction and an audit; 4 and 8 a retraction without.
PROBLEM = Problem(
    (30, 17, 8, 5, 12, 9, 4),
    dtype=torch.float32,
    steps=6,  # of which the last has all of them
    lr=0.01,
    lookahead_steps=2,
    polar_every=3,
    audit_every=2,
    round_elements=1,
)
STAGES = 6


def logged(number, log):
    for stage in range(STAGES):
        log.append((number, stage))
        if stage < STAGES - 1:
            yield


@pytest.mark.parametrize("run", [in_sequence, interleaved])
@pytest.mark.parametrize("rounds", range(6))
def test_every_round_runs_to_its_end(run, rounds):
    log = []
    run([logged(number, log) for number in range(rounds)])
    for number in range(rounds):
        assert [stage for which, stage in log if which == number] == list(range(STAGES))


class Watched(LocalExchange):
    """Notes when collectives begin and when they are waited for."""

    def __init__(self, log):
        super().__init__()
        self.log, self.begun = log, 0

    def _all_to_all(self, buffer, send, recv, out):
        self.begun += 1
        self.log.append(("begin", self.begun))
        received, _ = super()._all_to_all(buffer, send, recv, out)
        return received, Work(self.log, self.begun)


class Work:
    def __init__(self, log, number):
        self.log, self.number = log, number

    def wait(self):
        self.log.append(("wait", self.number))


class Noted(Orthogonal):
    """Notes its products."""

    log: list

    def __init__(self, log):
        object.__setattr__(self, "log", log)

    def tangent(self, *arguments):
        self.log.append(("product",))
        return ORTHOGONAL.tangent(*arguments)

    def move(self, *arguments):
        move = ORTHOGONAL.move(*arguments)
        asked = next(move)
        while True:
            self.log.append(("product",))
            asked = move.send((yield asked))


@pytest.mark.parametrize("run", [in_sequence, interleaved])
def test_products_of_other_rounds_hide_every_collective(run, monkeypatch):
    """X, G, A, D and the matrices, of seven rounds."""
    log = []
    problem = replace(PROBLEM, lookahead_steps=0, polar_every=0, audit_every=0)
    exchange = Watched(log)
    emulation = Emulation(problem, exchange)
    monkeypatch.setattr("optim.zero3_adam.in_sequence", run)
    matrices = emulation.partitions[0]
    matrices = emulation.partitions[0] = replace(matrices, manifold=Noted(log))
    emulation.optimizer.bind(
        emulation.partitions,
        emulation.exchange,
        expected_matrices=[slot.name for slot in matrices.slots],
    )
    log.clear()
    exchange.begun = 0
    emulation.step(0)
    during = []
    for number in range(1, exchange.begun + 1):
        between = log[log.index(("begin", number)) : log.index(("wait", number))]
        during.append(("product",) in between)
    assert len(during) == 5 * len(problem.sizes)
    # At the ends: X, G and A of the first round, D and the matrices of the last.
    assert during.count(False) == (len(during) if run is in_sequence else 5)


def digests(rank, world_size):
    """Of every state tensor at the end, by precision; the same with and without overlap."""
    exchange = ProcessGroupExchange() if world_size > 1 else LocalExchange()
    found = {}
    variants = [(increment, "exp") for increment in ("full", "tf32", "bf16")]
    for increment, retraction in (*variants, ("full", "fast"), ("bf16", "fast")):
        both = []
        for overlap in (True, False):
            problem = replace(PROBLEM, increment=increment, retraction=retraction, overlap=overlap)
            emulation = Emulation(problem, exchange)
            emulation.run()
            kinds = ("master", "exp_avg", "exp_avg_sq", "slow", "tangent_sum")
            both.append({kind: digest(emulation.whole(kind)) for kind in kinds})
        assert both[0] == both[1], (increment, retraction)
        found[increment, retraction] = both[0]
    if world_size > 1:
        check_failure(exchange)
    return found


def check_failure(exchange):
    """A matrix that its owner cannot retract stops every rank, while other rounds are under way."""
    emulation = Emulation(PROBLEM, exchange)
    emulation.run(last=1)
    emulation.scale("matrix1", float("nan"))
    emulation.scale("matrix1", float("nan"), "slow")
    with pytest.raises(OptimizerError, match=r"'matrix1': .*does not converge"):
        emulation.run(first=1)
    emulation = Emulation(PROBLEM, exchange)
    emulation.run(last=1)  # the ranks still understand each other


@pytest.fixture(scope="module")
def alone():
    return digests(0, 1)


def test_precisions_and_retractions_differ(alone):
    assert len({found["master"] for found in alone.values()}) == 5


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_overlap_changes_no_bit(world_size, alone):
    assert run_ranks(digests, world_size)[0] == alone
