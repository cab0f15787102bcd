"""The endless, resumable sequence of training batches of one rank."""

import collections
import dataclasses
import logging
import weakref
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_shards.augment import augment_batch
from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.index import ShardIndex
from data_shards.order import (
    AUGMENT,
    REPLACE,
    Cursor,
    EpochOrder,
    Span,
    position_words,
    rank_spans,
)
from data_shards.prefetch import Prefetcher
from data_shards.reader import DamagedSampleError, Encoded, decode, fetch

_logger = logging.getLogger(__name__)

_MAX_BATCHES_AHEAD = 64  # more would only cost start-up time where batches are tiny
_MAX_REPLACEMENTS = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    images: Tensor
    """uint8 (B, C, H, W), augmented."""
    labels: Tensor
    """int64 (B,)."""
    rows: npt.NDArray[np.int64]
    """Row of the index each image came from, (B,)."""
    positions: npt.NDArray[np.int64]
    """Place in the endless sequence, epoch * samples per epoch + position, (B,)."""
    cursor_after: Cursor
    """Where the next global batch begins."""
    damaged: tuple[str, ...] = ()
    """Causes of the damaged samples that were replaced in this batch."""


class SampleStream:
    """Batches without end, the same for any number of ranks, from any cursor.

    Iterate it, and close it (or use `with`): a background thread reads ahead. `cursor` counts what
    was handed out, never what was read ahead. A damaged sample is logged and replaced by another
    one, chosen by (seed, epoch, position); the stream stops with a ShardError once more than
    `damage_allowance + damage_fraction * samples seen by this rank` were.

    Args:
        index: The shard set.
        config: Order, memory, damage budget and augmentation.
        split: "train", "fit", "validation" or "test".
        global_batch: Samples of all ranks together in one batch.
        rank: This rank.
        world_size: Number of ranks W; it divides the global batch.
        cursor: Where to begin.

    Raises:
        ShardError: see `rank_spans`; or an image batch larger than half of the read-ahead.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: StreamConfig,
        *,
        split: str,
        global_batch: int,
        cursor: Cursor,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples_per_epoch = len(index.select(split))
        self.damaged: collections.Counter[str] = collections.Counter()
        """Damaged samples in the batches handed out, by cause."""
        self._cursor = cursor
        shares = _Shares(self.samples_per_epoch, global_batch, rank, world_size)
        shares.spans(cursor)  # refuses a wrong rank, batch or cursor here, not in the thread
        batch_bytes = global_batch // world_size * int(np.prod(index.image_shape))
        if 2 * batch_bytes > config.read_ahead_bytes:
            raise ShardError(
                f"a batch of {global_batch // world_size} decoded images has {batch_bytes} bytes, "
                f"more than half of read_ahead_bytes {config.read_ahead_bytes}"
            )
        producer = _Producer(index, config, split, shares, cursor)
        self._batches = Prefetcher(
            iter(producer.batches()),
            size_of=lambda batch: batch.images.nbytes,
            max_bytes=config.read_ahead_bytes // 2,
            max_items=_MAX_BATCHES_AHEAD,
        )
        # The thread knows nothing of this object, so one that is dropped unclosed ends it as well.
        self._close = weakref.finalize(self, self._batches.close)

    @property
    def cursor(self) -> Cursor:
        """Where the next batch to be handed out begins: save this to go on later."""
        return self._cursor

    def __iter__(self) -> "SampleStream":
        return self

    def __next__(self) -> Batch:
        batch = self._batches.get()
        self._cursor = batch.cursor_after
        self.damaged.update(batch.damaged)
        return batch

    def __enter__(self) -> "SampleStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread; iterating afterwards stops at once."""
        self._close()


@dataclasses.dataclass(frozen=True)
class _Shares:
    """The part of each global batch that one rank takes."""

    samples: int
    global_batch: int
    rank: int
    world_size: int

    def spans(self, cursor: Cursor) -> list[Span]:
        return rank_spans(
            cursor,
            samples=self.samples,
            global_batch=self.global_batch,
            rank=self.rank,
            world_size=self.world_size,
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    spans: list[Span]
    samples: npt.NDArray[np.int64]
    """Numbers within the split, by position."""
    cursor_after: Cursor


class _Producer:
    """Makes the batches, in the background thread."""

    def __init__(
        self, index: ShardIndex, config: StreamConfig, split: str, shares: _Shares, cursor: Cursor
    ) -> None:
        self.index = index
        self.config = config
        self.shares = shares
        self.cursor = cursor
        self.rows = index.select(split)
        shard_samples = np.unique(index.rows.shard[self.rows], return_counts=True)[1]
        self.order = EpochOrder(
            shard_samples.tolist(), seed=cursor.seed, lanes=config.lanes, window=config.window
        )
        self.broken: dict[int, str] = {}  # row -> cause: read, logged and refused once
        self.seen = 0
        self.replaced = 0
        decoded_bytes = len(self.rows) * int(np.prod(index.image_shape))
        self.cache: Tensor | None = None
        self.cached = np.zeros(len(self.rows), dtype=bool)
        if decoded_bytes <= config.cache_bytes:
            self.cache = torch.empty((len(self.rows), *index.image_shape), dtype=torch.uint8)

    def batches(self) -> Iterator[Batch]:
        """Yield batches for ever; reads for several at once, the first time for one."""
        at_once = 1
        # Half of the read-ahead is for decoded batches, a quarter for the encoded images of one
        # reading, and `fetch` holds at most as much again in gaps.
        limit = self.config.read_ahead_bytes // 4
        while True:
            plans: list[_Plan] = []
            needed: set[int] = set()
            size = 0
            while len(plans) < at_once:
                plan = self._plan(self.cursor)
                missing = set(self._missing(plan.samples)) - needed
                size += int(self.index.rows.size[list(missing)].sum())
                if plans and size > limit:
                    break
                plans.append(plan)
                needed |= missing
                self.cursor = plan.cursor_after
            encoded = fetch(self.index, sorted(needed)) if needed else {}
            for plan in plans:
                yield self._assemble(plan, encoded)
            encoded = {}  # not held while the next ones are read
            at_once = min(2 * at_once, _MAX_BATCHES_AHEAD)

    def _plan(self, cursor: Cursor) -> _Plan:
        spans = self.shares.spans(cursor)
        samples = np.concatenate([self.order.take(span) for span in spans])
        after = cursor.advance(self.shares.global_batch, self.shares.samples)
        return _Plan(spans, samples, after)

    def _missing(self, samples: npt.NDArray[np.int64]) -> list[int]:
        """Return the rows to be read for these samples."""
        rows = self.rows[samples[~self.cached[samples]]].tolist()
        return [row for row in rows if row not in self.broken]

    def _assemble(self, plan: _Plan, encoded: Encoded) -> Batch:
        samples = plan.samples
        damaged: list[str] = []
        if self.cache is not None and self.cached[samples].all():
            images = self.cache[torch.from_numpy(samples)]
        else:
            samples = samples.copy()
            images = torch.empty((len(samples), *self.index.image_shape), dtype=torch.uint8)
            for slot in range(len(samples)):
                samples[slot], images[slot] = self._sample(plan, slot, encoded, damaged)
        self._count_damage(len(samples), damaged)
        if self.config.shift_pixels or self.config.flip:
            words = position_words(self.order.seed, plan.spans, purpose=AUGMENT)
            images = augment_batch(
                images, words, shift_pixels=self.config.shift_pixels, flip=self.config.flip
            )
        rows = self.rows[samples]
        positions = [np.arange(s.start, s.stop) + s.epoch * len(self.rows) for s in plan.spans]
        return Batch(
            images=images,
            labels=torch.from_numpy(self.index.rows.label[rows].astype(np.int64)),
            rows=rows,
            positions=np.concatenate(positions),
            cursor_after=plan.cursor_after,
            damaged=tuple(damaged),
        )

    def _sample(
        self, plan: _Plan, slot: int, encoded: Encoded, damaged: list[str]
    ) -> tuple[int, Tensor]:
        """Return the sample for one slot of a batch, a replacement where it is damaged."""
        sample = int(plan.samples[slot])
        for attempt in range(_MAX_REPLACEMENTS):
            image = self._image(sample, encoded)
            if image is not None:
                return sample, image
            damaged.append(self.broken[int(self.rows[sample])])
            words = position_words(self.order.seed, plan.spans, purpose=REPLACE, attempt=attempt)
            sample = int(words[slot, 0] % np.uint64(len(self.rows)))
        raise ShardError(
            f"{_MAX_REPLACEMENTS} samples in a row are damaged in shard set {self.index.store}, "
            f"the last is {self.index.describe(int(self.rows[sample]))}"
        )

    def _image(self, sample: int, encoded: Encoded) -> Tensor | None:
        if self.cache is not None and self.cached[sample]:
            return self.cache[sample]
        row = int(self.rows[sample])
        if row in self.broken:
            return None
        data = encoded[row] if row in encoded else fetch(self.index, [row])[row]
        try:
            image = decode(self.index, row, data)
        except DamagedSampleError as error:
            self.broken[row] = error.cause
            _logger.warning("damaged sample is replaced: %s", error)
            return None
        if self.cache is not None:
            self.cache[sample] = image
            self.cached[sample] = True
        return image

    def _count_damage(self, seen: int, damaged: list[str]) -> None:
        self.seen += seen
        self.replaced += len(damaged)
        budget = self.config.damage_allowance + self.config.damage_fraction * self.seen
        if self.replaced > budget:
            causes = collections.Counter(self.broken.values())
            raise ShardError(
                f"{self.replaced} of {self.seen} samples read from shard set {self.index.store} "
                f"were damaged, more than the budget of {budget:g} (damage_allowance "
                f"{self.config.damage_allowance} + damage_fraction "
                f"{self.config.damage_fraction:g}); distinct damaged samples by cause: "
                f"{dict(causes)}"
            )
