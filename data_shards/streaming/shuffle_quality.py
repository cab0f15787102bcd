"""How well an order mixes: shards per batch, and pairs of a batch that meet again."""

import dataclasses

import numpy as np
import numpy.typing as npt

from data_shards.streaming.sampler import EpochOrder


@dataclasses.dataclass(frozen=True)
class ShuffleQuality:
    """Two epochs of an order, beside what a uniform permutation has on average."""

    shards_per_batch: float
    uniform_shards_per_batch: float
    meeting_again: float | None
    """Pairs of one batch that share a batch in the next epoch, as a multiple of the uniform share;
    None for an epoch of less than two batches."""


def shuffle_quality(order: EpochOrder, batch: int) -> ShuffleQuality:
    """Measure an order over its first two epochs, whole batches alone.

    Args:
        order: The order.
        batch: Samples of a batch.
    """
    batch = min(batch, order.samples)
    count = order.samples // batch
    whole = count * batch
    shard_of = np.repeat(np.arange(len(order.shard_samples)), order.shard_samples)
    first, second = (order.permutation(epoch)[:whole] for epoch in (0, 1))
    batch_of = np.arange(whole) // batch
    pairs = np.unique(batch_of * len(order.shard_samples) + shard_of[first])
    shares = order.shard_samples / order.samples
    return ShuffleQuality(
        shards_per_batch=len(pairs) / count,
        uniform_shards_per_batch=float((1 - (1 - shares) ** batch).sum()),
        meeting_again=_meeting_again(order.samples, first, second, batch_of, batch),
    )


def _meeting_again(
    samples: int,
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
    batch_of: npt.NDArray[np.int64],
    batch: int,
) -> float | None:
    count = len(batch_of) // batch
    if count < 2:
        return None
    later = np.full(samples, -1, dtype=np.int64)  # a sample behind the last whole batch has none
    later[second] = batch_of
    both = later[first] >= 0
    _, together = np.unique(batch_of[both] * count + later[first][both], return_counts=True)
    met = float((together * (together - 1)).sum())
    # Of a pair, the other one is in any of the batch - 1 places beside it with equal chance.
    at_random = len(first) * (batch - 1) * (len(second) / samples) * (batch - 1) / (samples - 1)
    return met / at_random
