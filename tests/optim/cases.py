"""What every world size must satisfy; run in spawned ranks and in the test process."""

from dataclasses import replace

import pytest
import torch

from optim.errors import OptimizerError
from optim.exchange import Exchange, LocalExchange, ProcessGroupExchange
from tests.optim.emulation import Emulation, Problem, digest, run_reference

UNEVEN = (30, 64, 17, 48, 8)
PROBLEMS = {
    "equal": Problem((64,) * 5, lr=0.003),
    "one matrix per owner": Problem((64,) * 5, lr=0.003, round_elements=1),
    "two matrices per owner": Problem((64,) * 5, lr=0.003, round_elements=2 * 64 * 64),
    "uneven": Problem(UNEVEN, matrices_per_group=3),
    "tiny": Problem((5, 4, 3, 12), matrices_per_group=2, lookahead_steps=5, lr=0.3),
    "large_increment": Problem((30, 17), lr=0.2, lookahead_steps=6, polar_every=4),
    "plain": Problem((12, 7), lookahead_steps=0, polar_every=0, euclidean="adamw"),
    "fp32": Problem(UNEVEN, dtype=torch.float32, matrices_per_group=2, lr=0.003),
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
            manifold = parameter.manifold
            expected = manifold.residual(whole["master"][name])
            assert residuals[name] == pytest.approx(expected, abs=1e-15)
            assert manifold.residual(exported[name]) < 1e-6 * parameter.shape[0]
            m, v = whole["exp_avg"][name], whole["exp_avg_sq"][name]
            assert torch.equal(m, -m.T)
            assert torch.equal(v, v.T)
    return digest(whole["master"])


def check_resume(exchange: Exchange) -> None:
    """State saved between two Lookahead synchronisations continues bit by bit."""
    for dtype in (torch.float64, torch.float32):
        problem = replace(PROBLEMS["uneven"], dtype=dtype)
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
    """20 N / W bytes per plain step, 24 at a synchronisation, 8 more at a polar retraction."""
    W = exchange.world_size
    problem = Problem((12,) * W, dtype=torch.float32, lookahead_steps=2, polar_every=3)
    emulation = Emulation(problem, exchange)
    unit = (W - 1) * 144 // W
    for number, per_element in enumerate((20, 24, 28)):
        before = exchange.bytes_sent
        emulation.step(number)
        vote = 4 * (W - 1) if number == 2 else 0
        assert exchange.bytes_sent - before == per_element * unit + vote


def check_common_failure(exchange: Exchange) -> None:
    """What one owner cannot do is an error on every rank, not a hang."""
    emulation = Emulation(PROBLEMS["plain"], exchange)

    def fail_on_last(slot):
        if slot.name == "matrix1":
            raise RuntimeError("cannot make it")
        return torch.zeros(slot.shape)

    with pytest.raises(OptimizerError, match=r"cannot make it|failed on rank \[\d\]"):
        emulation.optimizer.initialise(fail_on_last)
    with pytest.raises(OptimizerError, match=r"has shape \(2,\)|failed on rank"):
        emulation.optimizer.initialise(lambda slot: torch.zeros(2))
    emulation.optimizer.initialise(lambda slot: torch.zeros(slot.shape))
    with pytest.raises(OptimizerError, match=r"does not converge: residual|failed on rank"):
        list(emulation.optimizer.export())
