"""Which images go into which shard, and what identifies a set before it is written."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg

from data_shards.config import MIB
from data_shards.errors import ShardError
from data_shards.format.shard_index import SCHEMA_VERSION
from data_shards.rng import philox_words
from data_shards.sources.base import Source
from data_shards.sources.transcode import UndecodableError

StoredSplit = Literal["train", "test"]

MIN_SHARDS = 4  # an evaluation has at least four parts to run side by side
_SMALL_SET_SHARDS = 16  # a set too small for many large shards has this many,
_SMALL_SHARD = 4 * MIB  # unless they would be smaller than this
_SHUFFLE = 100  # purpose of the words that shuffle the stored order
_PROBES = 64  # images whose stored size is measured
_WRITER_VERSION = 1  # of the rules that turn a source into bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a source is cut into shards.

    Args:
        samples_per_shard: Most images in one shard; None = as many as fit `shard_bytes`.
        shard_bytes: Largest target size of a shard; small sets have smaller ones, so that each
            split has at least 4, and 16 where those have 4 MiB.
        drop_duplicates: Leave out images whose bytes in the archive occurred before; of a test and
            a train image the train image.
    """

    samples_per_shard: int | None = None
    shard_bytes: int = 256 * MIB
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.samples_per_shard < 1:
            raise ShardError(f"samples per shard {self.samples_per_shard} is not at least 1")
        if not MIB <= self.shard_bytes <= 4096 * MIB:
            raise ShardError(f"shards of {self.shard_bytes} bytes are not in [1 MiB, 4096 MiB]")


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard to be written."""

    file: str
    split: StoredSplit
    members: npt.NDArray[np.int64]
    """Numbers of the images, in stored order."""


def plan_shards(
    source: Source, options: WriteOptions, kept: npt.NDArray[np.bool_]
) -> Iterator[ShardPlan]:
    """Yield the shards of a set, train first.

    The order is one shuffle of each split; sizes differ by at most one image.

    Args:
        source: The images.
        options: How to cut.
        kept: False for images that are left out beforehand.

    Raises:
        ShardError: a split has fewer images than shards.
    """
    yield from plan_split(source, options, kept, "train")
    yield from plan_split(source, options, kept, "test")


def plan_split(
    source: Source, options: WriteOptions, kept: npt.NDArray[np.bool_], split: StoredSplit
) -> Iterator[ShardPlan]:
    """Yield the shards of one split; arguments and errors as of `plan_shards`."""
    words = philox_words(0, 0, purpose=_SHUFFLE, count=len(source.labels))[:, 0]
    members = np.flatnonzero(kept & (source.test == (split == "test")))
    if len(members) < MIN_SHARDS:
        raise ShardError(
            f"split {split!r} of {source.name!r} has {len(members)} samples, fewer than the "
            f"{MIN_SHARDS} shards of a split"
        )
    members = members[np.argsort(words[members], kind="stable")]
    count = min(len(members), _shard_count(source, options, members))
    for number, part in enumerate(np.array_split(members, count)):
        yield ShardPlan(f"{split}-{number:05d}.tar", split, part)


def identity(source: Source, options: WriteOptions) -> str:
    """Return a digest of all that determines a set: the source, its archives' members, the cut."""
    fields = {
        "schema": SCHEMA_VERSION,
        "writer": _WRITER_VERSION,
        "name": source.name,
        "image_shape": source.image_shape,
        "uniform": source.uniform,
        "class_names": source.class_names,
        "parameters": dict(source.parameters),
        "options": dataclasses.asdict(options),
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    arrays = (source.labels, source.test, source.validation, source.sizes, source.names)
    for array in arrays:
        digest.update(b"|" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def progress_key(identity: str) -> str:
    """Return a name for unfinished work; another encoder may give other bytes, so it counts."""
    versions = f"{identity} pillow {PIL.__version__} simplejpeg {simplejpeg.__version__}"
    return hashlib.sha256(versions.encode()).hexdigest()[:32]


def _shard_count(source: Source, options: WriteOptions, members: npt.NDArray[np.int64]) -> int:
    if options.samples_per_shard is not None:
        return max(MIN_SHARDS, -(-len(members) // options.samples_per_shard))
    total = _stored_size(source, members[:_PROBES]) * len(members)
    target = min(options.shard_bytes, max(total / _SMALL_SET_SHARDS, _SMALL_SHARD))
    return max(MIN_SHARDS, int(np.ceil(total / target)))


def _stored_size(source: Source, probes: npt.NDArray[np.int64]) -> float:
    """Return the mean stored size of some images; the members are shuffled, so any will do."""
    numbers = probes.tolist()
    images = zip(numbers, source.load(numbers), strict=True)
    sizes = [_size_of(source, number, data) for number, data in images]
    known = [size for size in sizes if size is not None]
    if not known:
        raise ShardError(f"none of {len(sizes)} images of {source.name!r} can be stored")
    return float(np.mean(known))


def _size_of(source: Source, number: int, data: bytes) -> int | None:
    try:
        with warnings.catch_warnings():  # what Pillow has to say is told where the image is stored
            warnings.simplefilter("ignore")
            return len(source.convert(data, bool(source.test[number])))
    except UndecodableError:
        return None  # counted where the image is left out
