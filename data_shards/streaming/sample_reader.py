"""Read, check and decode samples of a shard set by row number."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from data_shards.config import MIB
from data_shards.errors import ShardError
from data_shards.format import decode as codec
from data_shards.format.shard_index import Shard, ShardIndex

# A request costs tens of milliseconds, in which one connection carries about this much.
MAX_GAP = MIB
# One connection is slow: a longer range is read as several side by side.
MAX_RANGE = 8 * MIB

Encoded = Mapping[int, memoryview]
ReadRanges = Callable[[Sequence[tuple[str, int, int]]], list[bytes]]
"""Bytes [start, stop) of each (file, start, stop): of a store, or of a cache before one."""


class DamagedSampleError(ShardError):
    """A sample is not what the index says; `cause` is "digest", "decode" or "shape"."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class ShardBatch:
    """Consecutive samples of one shard, in stored order."""

    keys: list[str]
    images: Tensor
    """uint8 (B, C, H, W)."""
    labels: Tensor
    """int64 (B,)."""


@dataclasses.dataclass
class _Range:
    file: str
    shard: int
    start: int
    stop: int
    rows: list[int]


def fetch(
    index: ShardIndex,
    rows: Sequence[int] | npt.NDArray[np.int64],
    *,
    read_ranges: ReadRanges | None = None,
    max_gap: int | None = None,
) -> Encoded:
    """Read the encoded images of different rows, neighbours in a shard in one request.

    Gaps of up to `max_gap` are read through as long as all gaps together are not larger than a
    quarter of the images, or than four such gaps: what is held beside the images is bounded.

    Args:
        index: The shard set.
        rows: What to read.
        read_ranges: How to read; None = from the set's store.
        max_gap: Bytes; None = `MAX_GAP`.

    Returns:
        Row number -> bytes, views into the ranges read; shorter than stated if the shard is.

    Raises:
        ShardError: a shard cannot be read.
    """
    gap = MAX_GAP if max_gap is None else max_gap
    ranges = _plan_ranges(index, np.asarray(rows, dtype=np.int64), gap)
    try:
        blocks = (read_ranges or index.files.read_ranges)(
            [(r.file, r.start, r.stop) for r in ranges]
        )
    except OSError as error:
        files = ", ".join(sorted({r.file for r in ranges}))
        raise ShardError(f"cannot read {index.store} ({files}): {error}") from error
    encoded = {}
    for piece, block in zip(ranges, blocks, strict=True):
        view = memoryview(block)
        for row in piece.rows:
            begin = int(index.rows.offset[row]) - piece.start
            encoded[row] = view[begin : begin + int(index.rows.size[row])]
    return encoded


def decode(
    index: ShardIndex, row: int, data: memoryview, crop: npt.NDArray[np.uint64] | None = None
) -> Tensor:
    """Check the digest of an encoded image and decode it.

    Args:
        index: The shard set.
        row: Row of the image.
        data: Its encoded bytes.
        crop: Random words (4,) of a random-resized crop to the set's image shape; None = no crop.

    Returns:
        uint8 (C, H, W): the set's image shape if cropped, else the shape stored for the split.

    Raises:
        DamagedSampleError: other bytes than were written, undecodable, or of another shape.
    """
    stated = int(index.rows.xxh3_64[row])
    found = xxhash.xxh3_64_intdigest(data)
    if found != stated:
        raise DamagedSampleError(
            f"{index.describe(row)}: {len(data)} bytes with xxh3_64 {found:016x}, the index states "
            f"{index.rows.size[row]} with {stated:016x}",
            "digest",
        )
    extension = index.rows.extension[row].decode()
    try:
        if crop is None:
            image = codec.decode_image(bytes(data), extension)
        else:
            channels, height, width = index.image_shape
            image = codec.decode_crop(
                bytes(data), extension, (height, width), crop, channels=channels
            )
    except ShardError as error:
        raise DamagedSampleError(f"{index.describe(row)}: {error}", "decode") from error
    split = index.shards[index.rows.shard[row]].split
    shape = index.image_shape if crop is not None else index.stored_shape(split)
    if shape is not None and tuple(image.shape) != shape:
        raise DamagedSampleError(
            f"{index.describe(row)}: shape {tuple(image.shape)}, the set has {shape}", "shape"
        )
    return image


def read_shard(
    index: ShardIndex, shard: Shard, batch_size: int, *, split: str | None = None
) -> Iterator[ShardBatch]:
    """Yield the samples of one shard in stored order, every one of them.

    Args:
        index: The shard set.
        shard: One of its shards.
        batch_size: Samples per batch; the last one may be smaller.
        split: Only the samples of this split ("fit" or "validation" of a train shard); None = all.

    Raises:
        ShardError: a sample is damaged or the shard cannot be read. Nothing is skipped: a
            certificate speaks of the whole set.
    """
    if batch_size < 1:
        raise ShardError(f"batch size {batch_size} is not at least 1")
    if index.stored_shape(shard.split) is None:
        raise ShardError(
            f"split {split or shard.split!r} of shard set {index.store} holds images of different "
            "shapes: only the test split is stored at network size"
        )
    rows = index.rows_of(shard, split)
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        encoded = fetch(index, part)
        yield ShardBatch(
            keys=[index.rows.key[row].decode() for row in part],
            images=torch.stack([decode(index, int(row), encoded[int(row)]) for row in part]),
            labels=torch.from_numpy(index.rows.label[part].astype(np.int64)),
        )


def _plan_ranges(index: ShardIndex, rows: npt.NDArray[np.int64], max_gap: int) -> list[_Range]:
    rows = np.sort(rows)  # rows are in the order (shard, offset)
    gap_budget = max(int(index.rows.size[rows].sum()) // 4, 4 * max_gap)
    ranges: list[_Range] = []
    columns = (index.rows.shard[rows], index.rows.offset[rows], index.rows.size[rows])
    for row, shard, start, size in zip(rows.tolist(), *(c.tolist() for c in columns), strict=True):
        last = ranges[-1] if ranges else None
        if last is not None and last.shard == shard:
            gap = start - last.stop
            if gap <= min(max_gap, gap_budget) and start + size - last.start <= MAX_RANGE:
                gap_budget -= gap
                last.stop = start + size
                last.rows.append(row)
                continue
        ranges.append(_Range(index.shards[shard].file, shard, start, start + size, [row]))
    return ranges
