"""`optim.increment auto`: TF32 on GPUs while no audit finds a drift, full products from then on."""

import pytest
import torch

from optim.collectives import LocalExchange
from optim.config import OptimConfig
from pipeline.checkpoint.reader import OPTIONAL_SCALARS
from tests.fake_gpu.fake_cuda import fake_cuda, fake_ranks
from tests.fake_gpu.test_step import bound_optimizer
from tests.optim.emulation import Emulation, Problem


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, "cuda", "tf32"),
        ({}, "cpu", "full"),
        ({"increment": "bf16"}, "cuda", "bf16"),
        ({"series": "frobenius"}, "cuda", "full"),
        ({"audit_every": 0}, "cuda", "full"),
        ({"polar_every": 0}, "cuda", "full"),
        ({"residual_limit": 1e-5}, "cuda", "full"),
    ],
)
def test_a_drift_far_below_the_limit_is_expected_of_what_is_chosen(changes, device, expected):
    assert OptimConfig(**changes).precision(device, 4096) == expected


def test_an_optimizer_on_a_gpu_begins_with_tf32():
    with fake_ranks(0, 8), fake_cuda():
        assert bound_optimizer(OptimConfig(), 8).increment == "tf32"
        assert bound_optimizer(OptimConfig(increment="full"), 8).increment == "full"


def tf32_problem(**changes):
    """On CPU, where `auto` is full: as if it had chosen TF32, which computes the same there."""
    emulation = Emulation(
        Problem((24, 24), dtype=torch.float32, increment="auto", **changes), LocalExchange()
    )
    emulation.optimizer.increment = "tf32"
    return emulation


def test_an_audit_that_finds_a_drift_raises_the_precision_for_good():
    emulation = tf32_problem(polar_every=1000, lookahead_steps=0)
    optimizer = emulation.optimizer
    for step in range(4):  # an audit after the fourth
        emulation.step(step)
    assert optimizer.increment == "tf32"  # nothing has drifted
    assert "full_increments" not in optimizer.scalar_state()
    partition = optimizer.partitions[0]
    partition.flat.mul_(1.00005)  # 1e-4 sqrt(24): between a tenth of the limit and the limit
    for step in range(4, 8):
        emulation.step(step)
    assert optimizer.increment == "full"
    assert optimizer.audit.reprojections == 0
    stored = optimizer.scalar_state()
    assert set(stored) & OPTIONAL_SCALARS == {"full_increments"}

    resumed = tf32_problem().optimizer
    resumed.load_scalar_state(stored)
    assert resumed.increment == "full"


def test_tf32_stays_within_the_drift_that_is_allowed_of_it():
    tf32, full = tf32_problem(), tf32_problem()
    full.optimizer.increment = "full"
    for step in range(20):
        for emulation in (tf32, full):
            emulation.step(step)
    assert max(tf32.optimizer.residuals().values()) < 1e-4  # a tenth of the limit
    assert tf32.optimizer.increment == "tf32"
    pairs = zip(tf32.optimizer.partitions, full.optimizer.partitions, strict=True)
    assert any(not torch.equal(a.flat, b.flat) for a, b in pairs)
