"""What every world size must satisfy; run in spawned ranks and in the test process."""

from dataclasses import replace

import pytest
import torch

from optim.collectives import Exchange, LocalExchange, ProcessGroupExchange
from optim.errors import OptimizerError
from optim.manifolds import ORTHOGONAL, manifold_of
from tests.optim.emulation import Emulation, Problem, digest, run_reference

UNEVEN = (30, 64, 17, 48, 8)
PROBLEMS = {
    "equal": Problem((64,) * 5, lr=0.003, steps=10),
    "one matrix per owner": Problem((64,) * 5, lr=0.003, steps=10, round_elements=1),
    "two matrices per owner": Problem((64,) * 5, lr=0.003, steps=10, round_elements=2 * 64 * 64),
    "uneven": Problem(UNEVEN, matrices_per_group=3),
    "tiny": Problem((5, 4, 3, 12), matrices_per_group=2, lookahead_steps=5, lr=0.3),
    "large_increment": Problem((30, 17), lr=0.2, lookahead_steps=6, polar_every=4),
    "plain": Problem((12, 7), lookahead_steps=0, polar_every=0, euclidean="adamw", steps=10),
    # Corrected at step 21 under Lookahead, 24 without it; increments of every form.
    "fast": Problem(
        UNEVEN, retraction="fast", steps=24, polar_every=0, matrices_per_group=3, lr=0.06
    ),
    "fast, plain": Problem(
        (30, 17), retraction="fast", steps=26, lookahead_steps=0, polar_every=0, lr=0.02
    ),
    "fast, large": Problem((30, 17), retraction="fast", lr=0.2, lookahead_steps=6, polar_every=4),
    "fast, fp32": Problem(
        UNEVEN, retraction="fast", dtype=torch.float32, matrices_per_group=2, lr=0.003
    ),
    "X^T G": Problem(
        UNEVEN, retraction="fast", gradient="trivialized", matrices_per_group=3, lr=0.06
    ),
    "fp32": Problem(UNEVEN, dtype=torch.float32, matrices_per_group=2, lr=0.003, steps=10),
}
# Round-off of 20 steps in float64; float32 is measured against the float32 reference.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


def check_everything(rank: int, world_size: int) -> dict[str, str]:
    """All cases of one world size; returns digests of the final masters (rank 0 only)."""
    exchange = ProcessGroupExchange() if world_size > 1 else LocalExchange()
    digests = {}
    for name, problem in PROBLEMS.items():
        digests[name] = check_problem(problem, exchange)
    check_resume(exchange)
    check_bytes(exchange)
    check_common_failure(exchange)
    digests["repaired"] = check_audit(exchange)
    check_what_cannot_be_repaired(exchange)
    return digests


def check_problem(problem: Problem, exchange: Exchange) -> str:
    """Sharded equals reference; moments are symmetric; export equals averaged; residuals."""
    emulation = Emulation(problem, exchange)
    optimizer = emulation.optimizer
    assert emulation.published == list(range(len(emulation.partitions)))
    assert optimizer.partitioned_matrices == (exchange.world_size > 1) * len(problem.sizes)
    emulation.run()

    kinds = ["master", "exp_avg", "exp_avg_sq"]
    kinds += ["slow", "tangent_sum"] if problem.lookahead_steps else []
    whole = {kind: emulation.whole(kind) for kind in kinds}
    residuals = optimizer.residuals()
    before = [flat.clone() for _, _, flat in optimizer.partitioned_state()]
    exported = {name: value for name, value in optimizer.export() if value is not None}
    for old, (_, _, flat) in zip(before, optimizer.partitioned_state(), strict=True):
        assert torch.equal(old.nan_to_num(), flat.nan_to_num()), "export changed the state"

    assert sorted(residuals) == [f"matrix{i}" for i in range(len(problem.sizes))]
    if exchange.rank != 0:
        assert not exported
        return ""
    named, reference = run_reference(problem)
    for name, parameter in named.items():
        state = reference.state[parameter] | {"master": parameter.detach()}
        for kind in kinds:
            if name not in whole[kind]:
                assert kind == "tangent_sum"
                continue
            error = (whole[kind][name] - state[kind]).abs().max().item()
            assert error <= TOLERANCE[problem.dtype], f"{name} {kind}: {error}"
        torch.testing.assert_close(
            exported[name], reference.averaged(parameter).float(), rtol=0, atol=1e-6
        )
        if name in residuals:
            manifold = manifold_of(parameter)
            expected = manifold.residual(whole["master"][name])
            assert residuals[name] == pytest.approx(expected, abs=1e-15)
            assert manifold.residual(exported[name]) < 1e-6 * parameter.shape[0]
            m, v = whole["exp_avg"][name], whole["exp_avg_sq"][name]
            assert torch.equal(m, -m.T)
            assert torch.equal(v, v.T)
    return digest(whole["master"])


def check_resume(exchange: Exchange) -> None:
    """State saved between two Lookahead synchronisations continues bit by bit."""
    uneven = PROBLEMS["uneven"]
    for problem in (uneven, replace(uneven, dtype=torch.float32), PROBLEMS["X^T G"]):
        first = Emulation(problem, exchange)
        first.run(last=10)
        saved = [tensor.clone() for _, _, tensor in first.optimizer.partitioned_state()]
        scalars = first.optimizer.scalar_state()
        assert scalars["step"] == 10
        first.run(first=10)

        second = Emulation(problem, exchange)
        targets = second.optimizer.partitioned_state()
        for (_, _, target), value in zip(targets, saved, strict=True):
            target.copy_(value)
        second.optimizer.load_scalar_state(scalars)
        second.run(first=10)
        for (kind, _, a), (_, _, b) in zip(
            first.optimizer.partitioned_state(), second.optimizer.partitioned_state(), strict=True
        ):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), kind


def check_bytes(exchange: Exchange) -> None:
    """20 N / W bytes per plain step, 24 at a synchronisation, 8 more at a polar projection.

    The vote of a retraction is a float32 per rank, the summary of an audit two float64.
    """
    W = exchange.world_size
    problem = Problem(
        (12,) * W, dtype=torch.float32, lookahead_steps=2, polar_every=3, audit_every=2
    )
    emulation = Emulation(problem, exchange)
    unit = (W - 1) * 144 // W
    for number, per_element in enumerate((20, 24, 28)):
        before = exchange.bytes_sent
        emulation.step(number)
        small = (W - 1) * {0: 0, 1: 16, 2: 4}[number]
        assert exchange.bytes_sent - before == per_element * unit + small


def check_common_failure(exchange: Exchange) -> None:
    """What one owner cannot do is an error on every rank, not a hang."""
    emulation = Emulation(PROBLEMS["plain"], exchange)

    def fail_on_last(slot):
        if slot.name == "matrix1":
            raise RuntimeError("cannot make it")
        return torch.zeros(slot.shape)

    with pytest.raises(OptimizerError, match=r"'matrix1': RuntimeError: cannot make it"):
        emulation.optimizer.initialise(fail_on_last)
    with pytest.raises(OptimizerError, match=r"has shape \(2,\)"):
        emulation.optimizer.initialise(lambda slot: torch.zeros(2))
    emulation.optimizer.initialise(lambda slot: torch.zeros(slot.shape))
    with pytest.raises(OptimizerError, match=r"'matrix0'.* does not converge: residual"):
        list(emulation.optimizer.export())


def check_audit(exchange: Exchange) -> str:
    """One matrix off by 1e-2, fast or slow, is found at the next audit, repaired and counted."""
    digests = []
    for kind, lookahead_steps in (("master", 0), ("slow", 6)):
        problem = replace(
            PROBLEMS["uneven"], lookahead_steps=lookahead_steps, polar_every=0, lr=0.003
        )
        emulation, calm = Emulation(problem, exchange), Emulation(problem, exchange)
        audit = emulation.optimizer.audit
        for each in (emulation, calm):
            each.run(last=5)
        assert audit.metrics()["orthogonality/reprojections"] == 0
        assert audit.metrics() == {}
        emulation.scale("matrix1", 1.01, kind)
        for each in (emulation, calm):
            each.run(first=5, last=8)
        # X becomes 1.01 X, so X^T X - I becomes 0.0201 I.
        assert audit.metrics() == {
            "orthogonality/residual_max": pytest.approx(0.0201 * 8, rel=1e-3),
            "orthogonality/reprojections": 1.0,
        }
        assert emulation.optimizer.residuals()["matrix1"] < 1e-13
        assert emulation.optimizer.scalar_state()["reprojections"] == 1
        whole, expected = emulation.whole(), calm.whole()
        for name, value in whole.items():
            if name == "matrix1":  # the polar factor of 1.01 X, and X is near it
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
            else:
                assert torch.equal(value, expected[name]), name
        if lookahead_steps and exchange.rank == 0:
            assert ORTHOGONAL.residual(emulation.whole("slow")["matrix1"]) < 1e-13
        elif lookahead_steps:
            emulation.whole("slow")
        digests.append(digest(whole))
    return " ".join(digests)


def check_what_cannot_be_repaired(exchange: Exchange) -> None:
    """A matrix that is not finite or singular stops all ranks; each names it."""
    for factor, residual in ((float("nan"), "nan"), (0.0, "2.83")):
        emulation = Emulation(replace(PROBLEMS["plain"], sizes=(12, 8)), exchange)
        emulation.scale("matrix1", factor)
        with pytest.raises(OptimizerError, match=rf"'matrix1': .* {residual} at the start"):
            emulation.run(last=4)
