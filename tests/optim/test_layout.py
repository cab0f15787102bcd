import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.collectives import ALIGNMENT, LocalExchange
from optim.errors import OptimizerError
from optim.zero_layout import Slot, plan_rounds


@st.composite
def layouts(draw):
    world_size = draw(st.integers(1, 1000))
    slots, offset = [], 0
    for i, n in enumerate(draw(st.lists(st.integers(1, 5000), max_size=40))):
        length = -(-n * n // world_size)
        slots.append(Slot(f"matrix{i}", (n, n), n * n, offset, length))
        offset += length
    return tuple(slots), world_size


@given(layouts(), st.integers(1, 10**8))
def test_rounds_cover_the_slots_once_and_in_order(layout, elements):
    slots, world_size = layout
    rounds = plan_rounds(slots, world_size, elements=elements)
    assert tuple(slot for plan in rounds for slot in plan.slots) == slots
    for plan in rounds:
        assert len(plan.owned) == world_size
        counts = [len(owned) for owned in plan.owned]
        assert max(counts) - min(counts) <= 1
        for owned in plan.owned:
            assert len(owned) <= 1 or sum(slot.numel for slot in owned) <= elements
    assert all(a.stop == b.start for a, b in itertools.pairwise(rounds))


@given(layouts(), st.integers(0, 999))
def test_splits_agree_between_sender_and_owner(layout, some_rank):
    slots, world_size = layout
    rank = some_rank % world_size
    for plan in plan_rounds(slots, world_size):
        sent = plan.slice_lengths()
        assert len(sent) == world_size
        assert sum(sent) == plan.stop - plan.start
        # What any rank sends to this one is what this one expects from any rank.
        assert plan.whole_lengths(rank) == [sent[rank]] * world_size
        owned = plan.owned[rank]
        padded = sum(plan.whole_lengths(rank))
        assert 0 <= padded - sum(slot.numel for slot in owned) <= len(owned) * (world_size - 1)


def test_large_matrices_travel_one_per_owner_and_small_ones_together():
    slots = tuple(Slot(f"m{i}", (4, 4), 16, 8 * i, 8) for i in range(5))
    assert [len(p.slots) for p in plan_rounds(slots, 2, elements=15)] == [2, 2, 1]
    assert [len(p.slots) for p in plan_rounds(slots, 2, elements=32)] == [4, 1]
    (plan,) = plan_rounds(slots, 2)
    assert [len(owned) for owned in plan.owned] == [2, 3]


def test_plan_refuses_no_ranks():
    with pytest.raises(OptimizerError, match="at least 1, got 0"):
        plan_rounds((), 0)


def test_local_exchange_copies_nothing_that_is_aligned_and_sends_nothing():
    exchange = LocalExchange()
    slots = (Slot("v", (2, 3), 6, 0, 6), Slot("w", (2, 2), 4, 6, 4))
    (plan,) = plan_rounds(slots, 1)
    flat, moved = torch.arange(10.0), torch.zeros(10)
    first, second = exchange.to_owner(flat, plan).wait()
    assert first.data_ptr() == flat.data_ptr()
    assert second.data_ptr() % ALIGNMENT == 0
    assert torch.equal(second, torch.arange(6.0, 10.0).view(2, 2))
    assert exchange.to_partitions([first + 1, second + 1], plan, moved).wait() is moved
    assert torch.equal(moved, flat + 1)
    assert torch.equal(exchange.gather(flat), flat)
    assert exchange.bytes_sent == 0
