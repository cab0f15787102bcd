"""The order of samples: pure integer arithmetic on (seed, epoch, position).

Position i of epoch e names one sample. Shards are permuted per epoch and laid end to end, the
sequence is rotated by a random amount and cut into C lanes, each rotated by an amount of its own;
inside a lane samples are shuffled over a bounded window (sort by place + window * U). Position i is
served by lane i mod C, so lane lengths differ by at most one and nothing is dropped. The endless
sequence of epochs is cut into global batches; rank r of W takes the r-th of W equal parts of each.
Nothing here depends on W, except which part a rank takes.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.rng import WORDS_PER_COUNTER, philox_words, unit_interval

# Purposes of random words that share the key (seed, epoch).
_SHARDS, _ROTATION, _WINDOW, AUGMENT, REPLACE, CROP, RANDAUGMENT, _LANES = range(8)
ORDER = 2  # version of the rules by which samples are ordered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where the endless sequence of samples goes on: the position of the next sample.

    `order` (its version), `lanes` and `window` are the order that the sequence began with, 0 before
    a stream has chosen it. They say how samples are ordered: equal places are equal cursors.
    """

    seed: int
    epoch: int = 0
    position: int = 0
    order: int = dataclasses.field(default=0, compare=False)
    lanes: int = dataclasses.field(default=0, compare=False)
    window: int = dataclasses.field(default=0, compare=False)

    def __post_init__(self) -> None:
        for name in ("seed", "epoch", "position", "order", "lanes", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
                raise ShardError(f"cursor {name} {value!r} is not an integer in [0, 2**64)")

    def advance(self, count: int, samples: int) -> "Cursor":
        """Return the cursor `count` samples later, for epochs of `samples` samples."""
        epochs, position = divmod(self.position + count, samples)
        return dataclasses.replace(self, epoch=self.epoch + epochs, position=position)


class Span(NamedTuple):
    """Positions [start, stop) of one epoch."""

    epoch: int
    start: int
    stop: int


def rank_spans(
    cursor: Cursor, *, samples: int, global_batch: int, rank: int, world_size: int
) -> list[Span]:
    """Return the positions of this rank in the global batch at `cursor`, in order.

    The global batch is the next `global_batch` positions; rank r takes
    [r * G / W, (r + 1) * G / W) of them. More than one span where an epoch ends inside.

    Raises:
        ShardError: W does not divide G, or the rank is not in [0, W).
    """
    if samples < 1 or global_batch < 1 or world_size < 1:
        raise ShardError(
            f"samples {samples}, global batch {global_batch} and world size {world_size} "
            "must be at least 1"
        )
    if global_batch % world_size:
        raise ShardError(
            f"global batch {global_batch} is not divisible by the world size {world_size}: "
            "every rank takes the same number of samples"
        )
    if not 0 <= rank < world_size:
        raise ShardError(f"rank {rank} is not in [0, {world_size})")
    if cursor.position >= samples:
        raise ShardError(
            f"cursor position {cursor.position} is not below the {samples} samples of an epoch: "
            "it belongs to another data set or split"
        )
    share = global_batch // world_size
    here = cursor.advance(rank * share, samples)
    spans = []
    while share:
        stop = min(here.position + share, samples)
        spans.append(Span(here.epoch, here.position, stop))
        share -= stop - here.position
        here = here.advance(stop - here.position, samples)
    return spans


def begin_order(
    cursor: Cursor, samples: int, *, lanes: int, window: int, cached_whole: bool
) -> Cursor:
    """Return the cursor with the order that its sequence has, chosen now where it states none.

    A set that is cached whole, or that has no more samples than all windows together, is permuted
    as a whole: nothing is read twice for it, and no more is held. A cursor of a run under way keeps
    its order.

    Args:
        cursor: Where the stream begins.
        samples: Samples of an epoch.
        lanes: Option of the stream.
        window: Option of the stream.
        cached_whole: All images stay in memory or on the disk once they were read.

    Raises:
        ShardError: an order that this program does not know.
    """
    if cursor.order == ORDER:
        return cursor
    if cursor.order:
        raise ShardError(f"the cursor has order {cursor.order}, this program knows order {ORDER}")
    if cached_whole or samples <= lanes * window:
        lanes, window = 1, samples
    return dataclasses.replace(cursor, order=ORDER, lanes=lanes, window=window)


class EpochOrder:
    """The permutation of every epoch.

    Args:
        shard_samples: Number of samples in each shard, in stored order.
        seed: Key of all permutations, in [0, 2**64).
        lanes: Most lanes to use; fewer where a lane would be shorter than the window.
        window: Shuffle window W in samples: inside its lane a sample moves less than W places.
    """

    def __init__(self, shard_samples: Sequence[int], *, seed: int, lanes: int, window: int) -> None:
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.samples = int(self.shard_samples.sum())
        if self.samples < 1:
            raise ShardError("there are no samples to order")
        if lanes < 1 or window < 1:
            raise ShardError(f"lanes {lanes} and window {window} must be at least 1")
        self.seed = seed
        self.window = window
        self.lanes = max(1, min(lanes, self.samples // window))
        self._recent: dict[int, npt.NDArray[np.int64]] = {}

    def sequence(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return all samples before the lanes' shuffle: shards permuted, laid end to end, rotated.

        Lane j is the j-th of `lanes` consecutive pieces, each rotated once more: otherwise lanes
        would pass through their shards in step, and far neighbours meet in every epoch.
        """
        starts = np.cumsum(self.shard_samples) - self.shard_samples
        shards = philox_words(self.seed, epoch, purpose=_SHARDS, count=len(starts))[:, 0]
        pieces = [
            np.arange(starts[shard], starts[shard] + self.shard_samples[shard])
            for shard in np.argsort(shards, kind="stable")
        ]
        rotation = philox_words(self.seed, epoch, purpose=_ROTATION, count=1)[0, 0]
        whole = np.roll(np.concatenate(pieces), int(rotation % np.uint64(self.samples)))
        if self.lanes == 1:
            return whole
        turns = philox_words(self.seed, epoch, purpose=_LANES, count=self.lanes)[:, 0]
        lengths = [len(range(lane, self.samples, self.lanes)) for lane in range(self.lanes)]
        lanes = np.split(whole, np.cumsum(lengths)[:-1])
        turned = zip(lanes, turns % np.array(lengths, dtype=np.uint64), strict=True)
        return np.concatenate([np.roll(lane, int(turn)) for lane, turn in turned])

    def permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the sample numbers of one epoch by position; each of [0, samples) once.

        The array is shared between calls and read-only.
        """
        if epoch not in self._recent:
            if len(self._recent) == 2:  # a batch spans two epochs at most times
                del self._recent[min(self._recent)]
            self._recent[epoch] = self._permute(epoch)
        return self._recent[epoch]

    def take(self, span: Span) -> npt.NDArray[np.int64]:
        """Return the sample numbers at the positions of a span."""
        return self.permutation(span.epoch)[span.start : span.stop]

    def _permute(self, epoch: int) -> npt.NDArray[np.int64]:
        sequence = self.sequence(epoch)
        out = np.empty_like(sequence)
        begin = 0
        for lane in range(self.lanes):
            end = begin + len(out[lane :: self.lanes])
            keys = self._jitter(epoch, begin, end)
            if end - begin > self.window:  # a shorter lane is shuffled uniformly
                keys += np.arange(end - begin)
            out[lane :: self.lanes] = sequence[begin:end][np.argsort(keys, kind="stable")]
            begin = end
        out.flags.writeable = False
        return out

    def _jitter(self, epoch: int, begin: int, end: int) -> npt.NDArray[np.float64]:
        """Return window * U for places [begin, end) of the sequence."""
        first = begin // WORDS_PER_COUNTER
        count = -(-end // WORDS_PER_COUNTER) - first
        words = philox_words(self.seed, epoch, purpose=_WINDOW, count=count, start=first).ravel()
        begin, end = begin - first * WORDS_PER_COUNTER, end - first * WORDS_PER_COUNTER
        return unit_interval(words[begin:end]) * self.window


def position_words(
    seed: int, spans: Sequence[Span], *, purpose: int, attempt: int = 0
) -> npt.NDArray[np.uint64]:
    """Return four random words per position of the spans, keyed by (seed, epoch, position).

    Returns:
        Words (number of positions, 4).
    """
    return np.concatenate(
        [
            philox_words(
                seed,
                span.epoch,
                purpose=purpose,
                count=span.stop - span.start,
                start=span.start,
                attempt=attempt,
            )
            for span in spans
        ]
    )
