"""First stage of the stream: which samples come next, and their encoded bytes, read ahead."""

import collections
import dataclasses
import functools
from collections.abc import Generator, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format.shard_index import ShardIndex
from data_shards.streaming.block_cache import BlockCache
from data_shards.streaming.sample_reader import Encoded, fetch
from data_shards.streaming.sampler import Cursor, EpochOrder, Span, begin_order, rank_spans

MAX_BATCHES_AHEAD = 64  # more would only cost start-up time where batches are tiny
# Encoded images are held three times: being read, waiting, being decoded; `fetch` holds a quarter
# more in gaps.
_PLANNED = 3  # readings whose blocks are fetched to the disk at the same time
_READING = 16  # part of the read-ahead that one reading may have
_FEWER = 2  # blocks for so many images of a first batch cost no more than these images alone


@dataclasses.dataclass(frozen=True)
class Shares:
    """The part of each global batch that one rank takes."""

    samples: int
    global_batch: int
    rank: int
    world_size: int

    def spans(self, cursor: Cursor) -> list[Span]:
        """Return the positions of this rank in the global batch at `cursor`."""
        return rank_spans(
            cursor,
            samples=self.samples,
            global_batch=self.global_batch,
            rank=self.rank,
            world_size=self.world_size,
        )


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """One batch of this rank, before it is read."""

    spans: list[Span]
    samples: npt.NDArray[np.int64]
    """Numbers within the split, by slot, (B,)."""
    cursor_after: Cursor


@dataclasses.dataclass(frozen=True)
class Part:
    """Slots [start, stop) of a batch."""

    plan: ReadPlan
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """Encoded images that were read together; it may hold many batches or a part of one."""

    parts: list[Part]
    encoded: Encoded
    size: int
    """Bytes of the images."""


class DecodedSet:
    """All images of a small split, filled while the first epoch is decoded."""

    def __init__(self, samples: int, shape: tuple[int, int, int]) -> None:
        self.images = torch.empty((samples, *shape), dtype=torch.uint8)
        self.asked = np.zeros(samples, dtype=bool)
        """Read, or on the way: decoded before any later reading is."""
        self._present = np.zeros(samples, dtype=bool)

    def get(self, sample: int) -> Tensor | None:
        """Return an image, None if it was not decoded yet."""
        return self.images[sample] if self._present[sample] else None

    def have(self, samples: npt.NDArray[np.int64]) -> bool:
        """Tell whether all of these images were decoded."""
        return bool(self._present[samples].all())

    def put(self, sample: int, image: Tensor) -> None:
        """Keep an image."""
        self.images[sample] = image
        self._present[sample] = True


class SplitReader:
    """The endless sequence of one rank, read in pieces of bounded size.

    Args:
        index: The shard set.
        config: Options of the stream.
        split: Name of the split.
        shares: The part of each batch that is read here.
        cursor: Where to begin.

    Attributes:
        rows: Row of the index by number within the split.
        order: The permutation of every epoch.
        decoded: Images that need no reading; None for a large split.
        cache: The disk cache; None without one.
    """

    def __init__(
        self, index: ShardIndex, config: StreamConfig, split: str, shares: Shares, cursor: Cursor
    ) -> None:
        self.index = index
        self.config = config
        self.rows = index.select(split)
        shape = index.stored_shape(split)
        self.decoded: DecodedSet | None = None
        decoded_bytes = len(self.rows) * int(np.prod(shape or (0,)))
        if config.crop == "none" and shape is not None and decoded_bytes <= config.cache_bytes:
            self.decoded = DecodedSet(len(self.rows), shape)
        shard_samples = np.unique(index.rows.shard[self.rows], return_counts=True)[1]
        self._shares = shares
        self._cursor = begin_order(
            cursor,
            len(self.rows),
            lanes=config.lanes,
            window=config.window,
            cached_whole=self.decoded is not None or self._fits_on_disk(),
        )
        self.order = EpochOrder(
            shard_samples.tolist(),
            seed=cursor.seed,
            lanes=self._cursor.lanes,
            window=self._cursor.window,
        )
        self.cache = self._open_cache()

    def _fits_on_disk(self) -> bool:
        config, index = self.config, self.index
        if not config.disk_cache or index.files.local:
            return False
        shards = np.unique(index.rows.shard[self.rows])
        return sum(index.shards[shard].size for shard in shards) <= config.disk_cache_bytes

    def _open_cache(self) -> BlockCache | None:
        config, index = self.config, self.index
        if not config.disk_cache or index.files.local:
            return None
        # Places of the sequence whose samples may be asked for at about the same time.
        alive = min(len(self.rows), 2 * self.order.lanes * self.order.window)
        needed = int(alive * float(index.rows.size[self.rows].mean()))
        if config.disk_cache_bytes < needed:
            raise ShardError(
                f"disk_cache_bytes {config.disk_cache_bytes} is less than the {needed} bytes of "
                f"shard set {index.store} among which samples are shuffled (2 * lanes * window "
                "samples): every block would be read many times"
            )
        return BlockCache(index, config.disk_cache, config.disk_cache_bytes)

    def readings(self) -> Generator[Reading, None, None]:
        """Yield readings for ever: of one batch at first, then of twice as many each time.

        Raises:
            ShardError: a shard cannot be read.
        """
        plans = self._plans()
        parts, size = next(plans)
        yield Reading(parts, self._fetch(parts, fill=self._few_blocks(parts)), size)
        ahead: collections.deque[tuple[list[Part], int]] = collections.deque()
        try:
            while True:
                while len(ahead) < (_PLANNED if self.cache else 1):
                    ahead.append(next(plans))
                    self._prefetch(ahead[-1][0])
                parts, size = ahead.popleft()
                yield Reading(parts, self._fetch(parts, fill=True), size)
        finally:
            if self.cache is not None:
                self.cache.close()

    def _plans(self) -> Iterator[tuple[list[Part], int]]:
        """Yield what to read together and its bytes: one batch, then twice as many each time."""
        limit = max(1, self.config.read_ahead_bytes // _READING)
        whole = self._parts()
        held: Part | None = None
        batches = 1
        while True:
            taken: list[Part] = []
            size, count = 0, 0
            while count < batches and size < limit:
                part = held or next(whole)
                part, held, part_size = self._cut(part, limit - size, at_least=not taken)
                if part.stop > part.start:
                    taken.append(part)
                size += part_size
                if held is not None:
                    break
                count += 1
            yield taken, size
            batches = min(2 * batches, MAX_BATCHES_AHEAD)

    def _parts(self) -> Iterator[Part]:
        """Yield every batch of this rank as one part."""
        while True:
            spans = self._shares.spans(self._cursor)
            samples = np.concatenate([self.order.take(span) for span in spans])
            after = self._cursor.advance(self._shares.global_batch, self._shares.samples)
            self._cursor = after
            yield Part(ReadPlan(spans, samples, after), 0, len(samples))

    def _cut(self, part: Part, room: int, *, at_least: bool) -> tuple[Part, Part | None, int]:
        """Return as much of a part as fits in `room` bytes, the rest, and the bytes."""
        samples = part.plan.samples[part.start : part.stop]
        sizes = np.where(self._asked(samples), 0, self.index.rows.size[self.rows[samples]])
        ends = np.cumsum(sizes)
        fits = max(int(np.searchsorted(ends, room, side="right")), int(at_least))
        if fits >= len(samples):
            return part, None, int(ends[-1])
        middle = part.start + fits
        size = int(ends[fits - 1]) if fits else 0
        return Part(part.plan, part.start, middle), Part(part.plan, middle, part.stop), size

    def _asked(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        if self.decoded is None:
            return np.zeros(len(samples), dtype=bool)
        return self.decoded.asked[samples]

    def _wanted(self, parts: list[Part]) -> npt.NDArray[np.int64]:
        """Return the samples of a reading that were not asked for before, each once."""
        samples = np.unique(np.concatenate([p.plan.samples[p.start : p.stop] for p in parts]))
        return samples[~self._asked(samples)]

    def _extents(self, parts: list[Part]) -> list[tuple[str, int, int]]:
        return [self._extent(row) for row in self.rows[self._wanted(parts)]]

    def _prefetch(self, parts: list[Part]) -> None:
        if self.cache is not None:
            self.cache.prefetch(self._extents(parts))

    def _few_blocks(self, parts: list[Part]) -> bool:
        """Whether whole blocks, which are needed soon anyway, are few beside the images in them."""
        if self.cache is None:
            return False
        extents = self._extents(parts)
        return _FEWER * self.cache.lacking(extents) <= len(extents)

    def _fetch(self, parts: list[Part], *, fill: bool) -> Encoded:
        samples = self._wanted(parts)
        return self.read(samples, fill=fill) if len(samples) else {}

    def read(self, samples: npt.NDArray[np.int64], *, fill: bool) -> Encoded:
        """Read the images of different samples; `fill`: whole blocks into the disk cache.

        Raises:
            ShardError: a shard cannot be read.
        """
        if self.decoded is not None:
            self.decoded.asked[samples] = True
        rows = self.rows[samples]
        if self.cache is None:
            return fetch(self.index, rows)
        # Whole blocks would keep the first batch of a run waiting, unless they are few.
        read_ranges = functools.partial(self.cache.read_ranges, fill=fill)
        return fetch(self.index, rows, read_ranges=read_ranges, max_gap=0)

    def _extent(self, row: int) -> tuple[str, int, int]:
        start, size = int(self.index.rows.offset[row]), int(self.index.rows.size[row])
        return self.index.shards[self.index.rows.shard[row]].file, start, start + size

    def read_again(self, row: int, *, damaged: bool) -> memoryview:
        """Read one image from the store itself, after dropping what the cache has if `damaged`."""
        if damaged and self.cache is not None:
            self.cache.forget(self._extent(row))
        return fetch(self.index, [row])[row]
