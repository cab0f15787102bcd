import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.rng import philox_words
from data_shards.streaming.sampler import (
    Cursor,
    EpochOrder,
    Span,
    begin_order,
    position_words,
    rank_spans,
)
from data_shards.streaming.shuffle_quality import shuffle_quality

counts = st.lists(st.integers(1, 40), min_size=1, max_size=8)
seeds = st.integers(0, 2**64 - 1)


def order(shard_samples=(30, 31, 29, 30), seed=0, lanes=4, window=8, **fields):
    return EpochOrder(shard_samples, seed=seed, lanes=lanes, window=window, **fields)


@settings(max_examples=60)
@given(counts, seeds, st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 50))
def test_epoch_is_a_permutation_with_bounded_displacement(shards, seed, epoch, lanes, window):
    plan = EpochOrder(shards, seed=seed, lanes=lanes, window=window)
    sequence, permutation = plan.sequence(epoch), plan.permutation(epoch)
    total = sum(shards)
    assert np.array_equal(np.sort(sequence), np.arange(total))
    assert np.array_equal(np.sort(permutation), np.arange(total))
    lengths = [len(permutation[lane :: plan.lanes]) for lane in range(plan.lanes)]
    assert max(lengths) - min(lengths) <= 1
    begin = 0
    for lane, length in enumerate(lengths):
        piece = sequence[begin : begin + length]
        place = {sample: slot for slot, sample in enumerate(piece)}
        moved = [abs(place[s] - i) for i, s in enumerate(permutation[lane :: plan.lanes])]
        assert max(moved, default=0) < window
        begin += length


def test_shards_stay_together_before_the_shuffle():
    plan = order(window=1)
    sequence = plan.sequence(3)
    shard = np.repeat(np.arange(4), plan.shard_samples)[sequence]
    # Three borders, one more where the rotation cuts, and two for each of four rotated lanes.
    assert (np.diff(shard) != 0).sum() <= 4 + 8


def test_epochs_and_seeds_differ():
    first = order().permutation(0)
    assert np.array_equal(first, order().permutation(0))
    assert not np.array_equal(first, order().permutation(1))
    assert not np.array_equal(first, order(seed=1).permutation(0))


def test_order_does_not_change_between_releases():
    options = {"seed": 7, "lanes": 2, "window": 4}
    expected = [6, 10, 7, 11, 8, 12, 0, 13, 9, 16, 2, 14, 1, 5, 3, 17, 4, 19, 15, 18]
    assert order((5, 5, 5, 5), **options).permutation(3).tolist() == expected


def test_small_set_is_shuffled_uniformly():
    firsts = [order((10, 10), lanes=8, window=64).permutation(e)[0] for e in range(400)]
    assert np.bincount(firsts, minlength=20).max() < 60
    assert len(set(firsts)) == 20


@settings(max_examples=60)
@given(counts, seeds, st.integers(1, 12), st.data())
def test_batches_do_not_depend_on_the_number_of_ranks(shards, seed, eighths, data):
    total, batch = sum(shards), 8 * eighths
    cursor = Cursor(seed=seed, epoch=2, position=data.draw(st.integers(0, total - 1)))
    plan = EpochOrder(shards, seed=seed, lanes=3, window=16)
    endless = np.concatenate([plan.permutation(e) for e in range(2, 4 + batch // total)])
    expected = endless[cursor.position : cursor.position + batch]
    for world in (1, 2, 4, 8):
        spans = [
            span
            for rank in range(world)
            for span in rank_spans(
                cursor, samples=total, global_batch=batch, rank=rank, world_size=world
            )
        ]
        assert np.array_equal(np.concatenate([plan.take(s) for s in spans]), expected)


@given(seeds, st.integers(0, 99), st.integers(0, 1000), st.integers(0, 1000))
def test_cursor_advances_additively(seed, position, first, second):
    cursor = Cursor(seed=seed, position=position)
    assert cursor.advance(first, 100).advance(second, 100) == cursor.advance(first + second, 100)


@given(seeds, st.integers(0, 500), st.integers(1, 50))
def test_words_depend_on_position_alone(seed, start, count):
    whole = philox_words(seed, 5, purpose=3, count=start + count)
    assert np.array_equal(whole[start:], philox_words(seed, 5, purpose=3, count=count, start=start))
    spans = [Span(5, start, start + count), Span(6, 0, 2)]
    assert np.array_equal(position_words(seed, spans, purpose=3)[:count], whole[start:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_batch": 10, "world_size": 4}, "global batch 10 is not divisible by .* size 4"),
        ({"rank": 2, "world_size": 2}, r"rank 2 is not in \[0, 2\)"),
        ({"global_batch": 0}, "global batch 0"),
        ({"samples": 3}, "cursor position 5 is not below the 3 samples"),
    ],
)
def test_wrong_shares_are_refused(fields, message):
    good = {"samples": 100, "global_batch": 8, "rank": 0, "world_size": 1}
    with pytest.raises(ShardError, match=message):
        rank_spans(Cursor(seed=0, position=5), **{**good, **fields})


@pytest.mark.parametrize("fields", [{"seed": 0.5}, {"epoch": -1}, {"lanes": True}])
def test_wrong_cursor_is_refused(fields):
    with pytest.raises(ShardError, match=rf"cursor {next(iter(fields))} .* is not an integer"):
        Cursor(**{"seed": 0, **fields})


def test_wrong_orders_are_refused():
    with pytest.raises(ShardError, match="no samples"):
        order(())
    with pytest.raises(ShardError, match="lanes 0"):
        order(lanes=0)
    with pytest.raises(ShardError, match="seed -1"):
        order(seed=-1).permutation(0)


# --- the order that a sequence begins with ---------------------------------------------------


def begun(cursor, samples, *, cached=False):
    found = begin_order(cursor, samples, lanes=4, window=8, cached_whole=cached)
    return found.lanes, found.window


def test_a_set_that_is_cached_or_fits_into_the_windows_is_permuted_as_a_whole():
    start = Cursor(seed=1)
    assert begun(start, 32) == (1, 32)
    assert begun(start, 33) == (4, 8)
    assert begun(start, 33, cached=True) == (1, 33)


def test_a_sequence_keeps_the_order_that_it_began_with():
    under_way = begin_order(Cursor(seed=1), 99, lanes=2, window=3, cached_whole=False)
    assert under_way.order == 2
    assert begun(under_way.advance(200, 99), 99, cached=True) == (2, 3)


def test_the_defaults_mix_many_shards():
    """ImageNet: 550 shards of 2,330 images. Before, a batch had 15 shards, pairs met 5.8 times."""
    config = StreamConfig()
    found = shuffle_quality(
        EpochOrder([2330] * 550, seed=5, lanes=config.lanes, window=config.window), 1024
    )
    assert found.shards_per_batch > 100
    assert found.uniform_shards_per_batch == pytest.approx(464.7, abs=0.1)
    assert found.meeting_again < 1.5


def test_quality_of_known_orders():
    uniform = shuffle_quality(order([100] * 30, lanes=1, window=3000), 100)
    assert uniform.shards_per_batch == pytest.approx(uniform.uniform_shards_per_batch, rel=0.02)
    assert uniform.meeting_again == pytest.approx(1, abs=0.05)
    in_turn = shuffle_quality(order([100] * 30, lanes=1, window=1), 100)
    assert in_turn.shards_per_batch < 2.1
    assert in_turn.meeting_again > 10
    assert shuffle_quality(order(), 120).meeting_again is None


def test_lanes_do_not_pass_through_their_shards_in_step():
    """60,000 images in 16 shards: without a rotation of lanes pairs met 2.6 times as often."""
    fields = {"lanes": 128, "window": 128}
    found = shuffle_quality(order([3750] * 16, **fields), 1024)
    assert found.meeting_again < 1.1


@pytest.mark.parametrize("version", [1, 3])
def test_an_order_of_another_version_is_refused(version):
    with pytest.raises(ShardError, match=f"the cursor has order {version}, .* knows order 2"):
        begun(Cursor(seed=0, order=version, lanes=1, window=1), 9)
