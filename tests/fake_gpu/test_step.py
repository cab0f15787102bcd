"""The sharded manifold step and the export on fake CUDA tensors, as rank of 8 and of 512."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optim.collectives import ProcessGroupExchange
from optim.config import OptimConfig
from optim.manifolds import ORTHOGONAL
from optim.zero3_adam import ShardedManifoldAdam, made_ahead
from optim.zero_layout import FlatPartition, Slot
from pipeline.planner.meta_pass import MovedBytes
from pipeline.planner.step_time import LOOKAHEAD_BYTES, MANIFOLD_WORK, SLICE_BYTES, TANGENT_BYTES
from tests.fake_gpu.fake_cuda import CUDA, fake_cuda, fake_ranks

WIDTH, MATRICES = 1024, 17


# `make test` runs each retraction, `make test-slow` all increments with both.
STEPS = [
    ("full", "exp"),
    ("bf16", "fast"),
    pytest.param("tf32", "fast", marks=pytest.mark.slow),
    pytest.param("full", "fast", marks=pytest.mark.slow),
    pytest.param("tf32", "exp", marks=pytest.mark.slow),
    pytest.param("bf16", "exp", marks=pytest.mark.slow),
]


def slots(shapes, world_size, *, trivialized=False, names=None):
    found, offset = [], 0
    for number, shape in enumerate(shapes):
        numel = torch.Size(shape).numel()
        length = -(-numel // world_size)
        name = names[number] if names else f"{len(shape)}d-{number}"
        found.append(Slot(name, shape, numel, offset, length, trivialized=trivialized))
        offset += length
    return tuple(found), offset


def bound_optimizer(config, world_size, *, width=WIDTH, count=MATRICES):
    parts, names = [], []
    for shapes, manifold in (
        (((width, width),) * count, ORTHOGONAL),
        (((width,),) * 3, None),
    ):
        asked = manifold is not None and config.gradient == "trivialized"
        found, elements = slots(shapes, world_size, trivialized=asked)
        flat = torch.empty(elements, device=CUDA)
        flat.grad = torch.empty_like(flat)
        parts.append(FlatPartition(flat, found, manifold, lambda: None))
        names += [slot.name for slot in found] if manifold else []
    groups = [{"params": [part.flat], "lr": config.lr} for part in parts]
    optimizer = ShardedManifoldAdam(groups, config)
    optimizer.bind(parts, ProcessGroupExchange(), expected_matrices=names)
    return optimizer


@pytest.mark.parametrize(("increment", "retraction"), STEPS)
def test_a_step_waits_for_the_device_once(increment, retraction):
    """All host synchronisations of a step: a read of the norms of all matrices that a rank owns."""
    config = OptimConfig(increment=increment, retraction=retraction, audit_every=0, polar_every=0)
    owners = set()
    for world_size, rank in ((1, 0), (8, 0), (8, 7), (512, 0), (512, 511)):
        with fake_ranks(rank, world_size) as calls, fake_cuda() as seen:
            optimizer = bound_optimizer(config, world_size)
            seen.waits.clear()
            optimizer.step()
            first = +seen.waits
            calls.clear()
            seen.waits.clear()
            optimizer.step()
            second = +seen.waits
        rounds = optimizer._rounds(optimizer.partitions[0])
        owned = sum(len(plan.owned[rank]) for plan in rounds)
        owners.add(owned)
        # The series are a branch of the host. In a first step nothing is known of a third norm.
        assert set(first) | set(second) <= {"matrix_exp.py:read"}, (world_size, rank)
        assert first["matrix_exp.py:read"] <= 2 * (owned > 0)
        assert second["matrix_exp.py:read"] == (owned > 0), (world_size, rank)
        assert len(calls) == 5 * len(rounds)  # X, G, A, D, X: all ranks begin the same ones
    assert {0, 1, MATRICES} < owners


@pytest.mark.parametrize(("increment", "retraction"), STEPS)
def test_the_planner_counts_what_a_step_of_the_billion_does(retraction, increment):
    config = OptimConfig(
        increment=increment, retraction=retraction, audit_every=0, polar_every=0, lr=1e-3
    )
    products, owned_bytes = MANIFOLD_WORK[retraction, increment]
    for lookahead_steps, gradient in ((0, "ambient"), (6, "ambient"), (6, "trivialized")):
        slice_bytes = SLICE_BYTES + LOOKAHEAD_BYTES * (lookahead_steps > 0)
        if gradient == "trivialized":
            products, owned_bytes = products - 1, owned_bytes - TANGENT_BYTES[increment]
        config = replace(config, lookahead_steps=lookahead_steps, gradient=gradient)
        for matrices, owned in ((16, 2), (7, 0)):  # of 8 ranks, the first
            with fake_ranks(0, 8), fake_cuda():
                optimizer = bound_optimizer(config, 8, width=4096, count=matrices)
                optimizer.step()
                with MovedBytes() as seen, FlopCounterMode(display=False) as flops:
                    optimizer.step()
            expected = owned_bytes * owned + slice_bytes * matrices / 8
            assert seen.moved / 4096**2 == pytest.approx(expected, rel=0.02)
            assert flops.get_total_flops() == pytest.approx(
                products * owned * 2 * 4096**3, rel=0.02
            )


def test_lookahead_moves_the_slow_matrix_on_the_device():
    config = OptimConfig(lookahead_steps=1, polar_every=0, audit_every=0)
    with fake_ranks(0, 8) as calls, fake_cuda() as seen:
        optimizer = bound_optimizer(config, 8)
        seen.waits.clear()
        optimizer.step()
    assert set(seen.waits) <= {"matrix_exp.py:read"}
    assert len(calls) == 6 * len(optimizer._rounds(optimizer.partitions[0]))


def test_values_are_made_ahead_in_order_and_are_the_same():
    found, _ = slots(((4, 4),) * 9, 1)
    made = []

    def value(slot):
        made.append(slot.name)
        return torch.full((4, 4), float(slot.name.split("-")[1]))

    for threads in (1, 3):
        with made_ahead(value, found, threads) as get:
            first = get(found[0])
            assert len(made) <= max(threads, 1)
            values = [first] + [get(slot) for slot in found[1:]]
        assert [float(v[0, 0]) for v in values] == list(range(9))
        made.clear()


def test_an_owner_that_fails_ahead_fails_where_it_is_asked():
    found, _ = slots(((2, 2),) * 3, 1)

    def value(slot):
        raise ValueError(slot.name)

    with made_ahead(value, found, 2) as get, pytest.raises(ValueError, match="2d-0"):
        get(found[0])
