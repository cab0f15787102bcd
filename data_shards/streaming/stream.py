"""The endless, resumable sequence of training batches of one rank.

Three stages in three threads: bytes are read ahead (`fetcher.py`), decoded ahead (`batcher.py`, in
`workers` more threads) and handed out here.
"""

import collections
import time
import weakref

import numpy as np

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format.shard_index import ShardIndex
from data_shards.streaming.batcher import Assembler, Batch
from data_shards.streaming.corruption_log import CorruptionLog
from data_shards.streaming.fetcher import MAX_BATCHES_AHEAD, Reading, Shares, SplitReader
from data_shards.streaming.prefetch import Prefetcher
from data_shards.streaming.sampler import Cursor


class SampleStream:
    """Batches without end, the same for any number of ranks and workers, from any cursor.

    Iterate it, and close it (or use `with`): background threads read ahead. `cursor` counts what
    was handed out, never what was read ahead. A damaged sample is logged, quarantined and replaced
    by another one, chosen by (seed, epoch, position); the stream stops with a ShardError once more
    than `damage_allowance + damage_fraction * samples seen by this rank` were.

    Args:
        index: The shard set.
        config: Order, memory, damage budget and augmentation.
        split: "train", "fit", "validation" or "test".
        global_batch: Samples of all ranks together in one batch.
        rank: This rank.
        world_size: Number of ranks W; it divides the global batch.
        cursor: Where to begin.
        corruption_log: Where damaged samples are recorded; None = in the log alone.
        decode_first: Decode a split that is kept in memory here and not while its first epoch is
            handed out, so that every batch costs the same.

    Attributes:
        samples_per_epoch: Samples of the split.
        damaged: Damaged samples in the batches handed out, by cause.
        waited_s: Seconds that `next` has waited for batches.

    Raises:
        ShardError: see `rank_spans` and `require_crop`; an image batch larger than a quarter of the
            read-ahead.
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
        corruption_log: CorruptionLog | None = None,
        decode_first: bool = False,
    ) -> None:
        self.samples_per_epoch = len(index.select(split))
        self.damaged: collections.Counter[str] = collections.Counter()
        self.waited_s = 0.0
        self._cursor = cursor
        self._files = index.files
        self._corruption_log = corruption_log
        require_crop(index, config, split)
        shares = Shares(self.samples_per_epoch, global_batch, rank, world_size)
        shares.spans(cursor)  # refuses a wrong rank, batch or cursor here, not in the thread
        # At most an eighth waits, or one batch; one is made unless it waits; one is consumed.
        batch_bytes = global_batch // world_size * int(np.prod(index.image_shape))
        if 4 * batch_bytes > config.read_ahead_bytes:
            raise ShardError(
                f"a batch of {global_batch // world_size} decoded images has {batch_bytes} bytes, "
                f"more than a quarter of read_ahead_bytes {config.read_ahead_bytes}"
            )
        reader = SplitReader(index, config, split, shares, cursor)
        assembler = Assembler(reader)
        if decode_first:
            assembler.decode_all()
        readings: Prefetcher[Reading] = Prefetcher(
            reader.readings(), size_of=lambda reading: 1, max_bytes=1, max_items=1
        )
        self._batches: Prefetcher[Batch] = Prefetcher(
            assembler.batches(iter(readings)),
            size_of=lambda batch: batch.images.nbytes,
            max_bytes=config.read_ahead_bytes // 8,
            max_items=MAX_BATCHES_AHEAD,
        )
        # The threads know nothing of this object: one that is dropped unclosed ends them too.
        self._close = weakref.finalize(self, _close, readings, self._batches)

    @property
    def cursor(self) -> Cursor:
        """Where the next batch to be handed out begins: save this to go on later."""
        return self._cursor

    @property
    def retries(self) -> int:
        """Requests to the store that were repeated, those of loading the index included."""
        return self._files.retries

    def __iter__(self) -> "SampleStream":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        batch = self._batches.get()
        self.waited_s += time.perf_counter() - begin
        self._cursor = batch.cursor_after
        if batch.damaged:
            self.damaged.update(damage.cause for damage in batch.damaged)
            if self._corruption_log is not None:
                self._corruption_log.add(batch.damaged)
        return batch

    def __enter__(self) -> "SampleStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background threads; iterating afterwards stops at once."""
        self._close()


def require_crop(index: ShardIndex, config: StreamConfig, split: str) -> None:
    """Check that images of a split come out of the stream at the set's image shape.

    Raises:
        ShardError: they would not; the message names the option.
    """
    shape = index.stored_shape(split)
    if config.crop == "none" and shape != index.image_shape:
        stored = "differ in shape" if shape is None else f"have shape {shape}"
        raise ShardError(
            f"images of split {split!r} of shard set {index.store} {stored} and a network sees "
            f"{index.image_shape}: give crop=random-resized"
        )
    if config.crop != "none" and split == "test":
        raise ShardError("the test split is stored at network size and never cropped: crop=none")


def _close(readings: Prefetcher[Reading], batches: Prefetcher[Batch]) -> None:
    readings.close()
    batches.close()
