"""Second stage of the stream: encoded bytes to batches, with damaged samples replaced."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import mmap
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_shards.config import MIB, StreamConfig
from data_shards.errors import ShardError
from data_shards.format.crop_box import Words
from data_shards.format.shard_index import ShardIndex
from data_shards.rng import unit_interval
from data_shards.streaming.fetcher import DecodedSet, Part, Reading, ReadPlan, SplitReader
from data_shards.streaming.sample_reader import DamagedSampleError, Encoded, decode
from data_shards.streaming.sampler import (
    AUGMENT,
    CROP,
    RANDAUGMENT,
    REPLACE,
    Cursor,
    position_words,
)
from data_shards.streaming.transforms import place, randaugment

_logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 16
_DECODED_TOGETHER = 1024
"""Images of a small split that are read at once where all are decoded before the first batch."""


@dataclasses.dataclass(frozen=True)
class Corruption:
    """A sample that was asked for, found damaged and replaced."""

    cause: str
    """"digest", "decode" or "shape"."""
    shard: str
    key: str
    position: int
    """Place in the endless sequence, epoch * samples per epoch + position."""
    message: str


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
    damaged: tuple[Corruption, ...] = ()
    """The damaged samples that were replaced in this batch."""


class _Draft:
    """A batch in the making."""

    def __init__(self, plan: ReadPlan, shape: tuple[int, int, int], seed: int) -> None:
        self.plan = plan
        self.samples = plan.samples.copy()
        self.images = _empty((len(plan.samples), *shape))
        self.damaged: list[list[tuple[int, DamagedSampleError]]] = [[] for _ in plan.samples]
        self.crop, self.augment, self.randaugment = (
            position_words(seed, plan.spans, purpose=purpose)
            for purpose in (CROP, AUGMENT, RANDAUGMENT)
        )


class Assembler:
    """Decodes, checks and augments.

    Args:
        reader: The split that is read.
    """

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self._index: ShardIndex = reader.index
        self._config = reader.config
        self._broken: dict[int, DamagedSampleError] = {}  # read, logged and refused once
        self._seen = 0
        self._replaced = 0

    def batches(self, readings: Iterable[Reading]) -> Iterator[Batch]:
        """Yield the batches of the readings, in order.

        Raises:
            ShardError: more damage than the budget.
        """
        shape, seed = self._index.image_shape, self._reader.order.seed
        draft: _Draft | None = None
        with _each(self._config.workers) as each:
            for reading in readings:
                for part in reading.parts:
                    if draft is None:
                        draft = _Draft(part.plan, shape, seed)
                    if not self._copied(draft, part):
                        fill = functools.partial(self._fill, draft, reading.encoded)
                        each(fill, range(part.start, part.stop))
                    if part.stop == len(draft.samples):
                        yield self._finish(draft)
                        draft = None

    def decode_all(self) -> None:
        """Decode every image of a split that is kept in memory; of a larger one, none.

        A damaged image is left to the batch that asks for it.

        Raises:
            ShardError: a shard cannot be read.
        """
        reader = self._reader
        if reader.decoded is None:
            return
        with _each(self._config.workers) as each:
            for begin in range(0, len(reader.rows), _DECODED_TOGETHER):
                samples = range(begin, min(begin + _DECODED_TOGETHER, len(reader.rows)))
                encoded = reader.read(np.asarray(samples), fill=True)
                each(functools.partial(self._keep, reader.decoded, encoded), samples)

    def _keep(self, kept: DecodedSet, encoded: Encoded, sample: int) -> None:
        row = int(self._reader.rows[sample])
        with contextlib.suppress(DamagedSampleError):
            kept.put(sample, decode(self._index, row, encoded[row]))

    def _copied(self, draft: _Draft, part: Part) -> bool:
        """Fill slots at once from images decoded before, if all were and none is augmented."""
        decoded, samples = self._reader.decoded, draft.samples[part.start : part.stop]
        config = self._config
        augmented = config.randaugment > 0 or config.shift_pixels > 0 or config.flip
        if decoded is None or augmented or not decoded.have(samples):
            return False
        draft.images[part.start : part.stop] = decoded.images[torch.from_numpy(samples)]
        return True

    def _fill(self, draft: _Draft, encoded: Encoded, slot: int) -> None:
        """Put the sample of one slot into a batch, a replacement where it is damaged."""
        order, rows = self._reader.order, self._reader.rows
        for attempt in range(_MAX_REPLACEMENTS):
            sample = int(draft.samples[slot])
            image = self._image(draft, slot, sample, encoded)
            if isinstance(image, Tensor):
                moved, changed = draft.augment[slot], draft.randaugment[slot]
                put(draft.images[slot], image, moved, changed, self._config)
                return
            draft.damaged[slot].append((int(rows[sample]), image))
            words = position_words(order.seed, draft.plan.spans, purpose=REPLACE, attempt=attempt)
            draft.samples[slot] = int(words[slot, 0] % np.uint64(len(rows)))
        raise ShardError(
            f"{_MAX_REPLACEMENTS} samples in a row are damaged in shard set {self._index.store}, "
            f"the last is {self._index.describe(int(rows[sample]))}"
        )

    def _image(
        self, draft: _Draft, slot: int, sample: int, encoded: Encoded
    ) -> Tensor | DamagedSampleError:
        """Return a decoded and cropped image, or what is wrong with it."""
        decoded = self._reader.decoded
        image = decoded.get(sample) if decoded is not None else None
        if image is None:
            row = int(self._reader.rows[sample])
            if row in self._broken:
                return self._broken[row]
            crop = None if self._config.crop == "none" else draft.crop[slot]
            try:
                image = self._decode(row, encoded.get(row), crop)
            except DamagedSampleError as error:
                self._broken[row] = error
                _logger.warning("damaged sample is replaced: %s", error)
                return error
            if decoded is not None:
                decoded.put(sample, image)
        return image

    def _decode(self, row: int, data: memoryview | None, crop: Words | None) -> Tensor:
        """Decode one image; wrong bytes are asked for once more, from the store itself."""
        if data is None:  # a replacement
            data = self._reader.read_again(row, damaged=False)
        try:
            return decode(self._index, row, data, crop)
        except DamagedSampleError as error:
            if error.cause != "digest":
                raise
            return decode(self._index, row, self._reader.read_again(row, damaged=True), crop)

    def _finish(self, draft: _Draft) -> Batch:
        rows, spans = self._reader.rows, draft.plan.spans
        per_epoch = len(rows)
        spread = [np.arange(s.start, s.stop) + s.epoch * per_epoch for s in spans]
        positions = np.concatenate(spread)
        damaged = tuple(
            self._describe(row, error, int(positions[slot]))
            for slot, found in enumerate(draft.damaged)
            for row, error in found
        )
        self._count_damage(len(draft.samples), len(damaged))
        return Batch(
            images=draft.images,
            labels=torch.from_numpy(self._index.rows.label[rows[draft.samples]].astype(np.int64)),
            rows=rows[draft.samples],
            positions=positions,
            cursor_after=draft.plan.cursor_after,
            damaged=damaged,
        )

    def _describe(self, row: int, error: DamagedSampleError, position: int) -> Corruption:
        return Corruption(
            cause=error.cause,
            shard=self._index.shards[self._index.rows.shard[row]].file,
            key=self._index.rows.key[row].decode(),
            position=position,
            message=str(error),
        )

    def _count_damage(self, seen: int, damaged: int) -> None:
        config = self._config
        self._seen += seen
        self._replaced += damaged
        budget = config.damage_allowance + config.damage_fraction * self._seen
        if self._replaced > budget:
            causes = collections.Counter(error.cause for error in self._broken.values())
            raise ShardError(
                f"{self._replaced} of {self._seen} samples read from shard set "
                f"{self._index.store} were damaged, more than the budget of {budget:g} "
                f"(damage_allowance {config.damage_allowance} + damage_fraction "
                f"{config.damage_fraction:g}); distinct damaged samples by cause: {dict(causes)}"
            )


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Return uint8 memory that goes back to the system with the tensor.

    Made in one thread and freed in another, batches of tens of MiB would stay with the allocator.
    """
    size = math.prod(shape)
    if size < MIB:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(shape)


def put(slot: Tensor, image: Tensor, moved: Words, changed: Words, config: StreamConfig) -> None:
    """Put an image into its slot of a batch: shifted, mirrored, then changed by RandAugment.

    Args:
        slot: Overwritten, uint8 (C, H, W).
        image: uint8 (C, H, W).
        moved: Random words of shift and mirroring, (4,).
        changed: Random words of RandAugment, (4,); the last one decides whether it is applied.
        config: What is done, and to which share of the images.
    """
    place(slot.numpy(), image.numpy(), moved, shift_pixels=config.shift_pixels, flip=config.flip)
    if config.randaugment and unit_interval(changed[3:])[0] < config.randaugment:
        slot.numpy()[:] = randaugment(slot, changed).numpy()


@contextlib.contextmanager
def _each(workers: int) -> Iterator[Callable[[Callable[[int], None], range], None]]:
    """Yield a function that calls another for every slot of a range and waits for all of them."""

    def run(task: Callable[[int], None], slots: range) -> None:
        for slot in slots:
            task(slot)

    if not workers:
        yield run
        return
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="data_shards")

    def run_in_threads(task: Callable[[int], None], slots: range) -> None:
        # Every thread takes slots in turn: a future per image would cost as much as a small image.
        turns = [pool.submit(run, task, slots[first::workers]) for first in range(workers)]
        for turn in turns:
            turn.result()

    try:
        yield run_in_threads
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
