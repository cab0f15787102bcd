"""The invariant in one process; on several ranks in `cases.py`."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optim.collectives import LocalExchange
from optim.errors import OptimizerError
from optim.manifolds import ORTHOGONAL
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from tests.optim.emulation import Emulation, Problem, gradient

PROBLEM = Problem((12, 8), lr=0.003, lookahead_steps=6, polar_every=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measuring_changes_nothing(dtype):
    often, never = (
        Emulation(replace(PROBLEM, dtype=dtype, audit_every=every), LocalExchange())
        for every in (1, 0)
    )
    for emulation in (often, never):
        emulation.run()
    for (kind, _, a), (_, _, b) in zip(
        often.optimizer.partitioned_state(), never.optimizer.partitioned_state(), strict=True
    ):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), kind
    assert often.optimizer.audit.metrics()["orthogonality/residual_max"] < 1e-4
    assert never.optimizer.audit.metrics() == {}


def test_cost_is_one_product_per_matrix_and_audit():
    def flops(every):
        emulation = Emulation(replace(PROBLEM, audit_every=every), LocalExchange())
        with FlopCounterMode(display=False) as counter:
            emulation.run(last=9)
        return counter.get_total_flops()

    assert flops(4) - flops(0) == 2 * 2 * (12**3 + 8**3)


def test_the_record_is_the_largest_residual_before_the_repair():
    emulation = Emulation(replace(PROBLEM, polar_every=0), LocalExchange())
    emulation.run(last=3)
    for name, factor in (("matrix0", 0.99), ("matrix1", 1.5)):
        emulation.scale(name, factor)
        emulation.scale(name, factor, "slow")
    emulation.run(first=3, last=8)  # audits after 4, where both are off, and after 8
    assert emulation.optimizer.audit.metrics() == {
        "orthogonality/residual_max": pytest.approx(1.25 * math.sqrt(8), rel=1e-6),
        "orthogonality/reprojections": 2.0,
    }
    assert max(emulation.optimizer.residuals().values()) < 1e-6


def test_the_count_outlives_a_restart():
    first, second = (Emulation(PROBLEM, LocalExchange()) for _ in range(2))
    first.run(last=3)
    first.scale("matrix0", 1.01)
    first.run(first=3, last=4)
    second.optimizer.load_scalar_state(first.optimizer.scalar_state())
    second.run(first=4, last=8)
    assert second.optimizer.audit.metrics()["orthogonality/reprojections"] == 1


def test_the_reference_repairs_as_the_sharded_optimizer_does():
    emulation = Emulation(PROBLEM, LocalExchange())
    named, config = PROBLEM.parameters(), PROBLEM.config
    reference = ReferenceManifoldAdam(parameter_groups(named.items(), config), config)
    X = named["matrix1"]
    for step in range(8):
        if step == 3:
            for kind in ("master", "slow"):
                emulation.scale("matrix1", 1.02, kind)
            X.data *= 1.02
            reference.state[X]["slow"] *= 1.02
        emulation.step(step)
        for name, parameter in named.items():
            parameter.grad = gradient(name, step, tuple(parameter.shape), torch.float64)
        for group, lr in zip(reference.param_groups, emulation.base, strict=True):
            group["lr"] = PROBLEM.lr_at(step, lr)
        reference.step()
    assert reference.audit.metrics() == pytest.approx(emulation.optimizer.audit.metrics())
    assert reference.audit.reprojections == 1
    for kind, value in (("master", X.detach()), ("slow", reference.state[X]["slow"])):
        torch.testing.assert_close(emulation.whole(kind)["matrix1"], value, rtol=0, atol=1e-14)
        assert ORTHOGONAL.residual(value) < 1e-4


def test_the_reference_stops_at_what_cannot_be_repaired():
    named, config = PROBLEM.parameters(), replace(PROBLEM, audit_every=1).config
    reference = ReferenceManifoldAdam(parameter_groups(named.items(), config), config)
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(OptimizerError, match=r"residual .* nan at the start"):
        reference.step()
