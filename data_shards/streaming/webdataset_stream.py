"""Shard sets without an index, by stock WebDataset: shards drawn at random, nothing exact.

What an index gives is lost: samples repeat or stay out, the order depends on the number of ranks, a
resumed run sees other samples, and damage is found only where a tar or an image cannot be read. No
URL starts a process and nothing is unpickled: shards are opened through the store, WebDataset's own
openers and decoders are not used, and members other than images and labels are not read.
"""

import collections
import fnmatch
import logging
import random
import re
import tarfile
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format import decode as codec
from data_shards.format.crop_box import Words
from data_shards.format.image_pixels import EXTENSIONS
from data_shards.storage.store import Store
from data_shards.streaming.batcher import Batch, put
from data_shards.streaming.prefetch import Prefetcher
from data_shards.streaming.sampler import AUGMENT, CROP, RANDAUGMENT, Cursor, Span, position_words

_logger = logging.getLogger(__name__)

_SHUFFLE_BUFFER = 2000
_MAX_BATCHES_AHEAD = 64
_LABEL = "cls"
_SPLIT = re.compile(r"(?<![a-z])(train|test|val|valid|validation|dev|eval)(?![a-z])")
_LISTED = 5
_LONGEST_KIND = 12


class UnindexedStream:
    """Batches without end; the interface of `SampleStream` without its promises.

    Args:
        url: Directory of the tars, each sample an image and a `.cls` with its label; or with a
            pattern behind it, as `DIRECTORY/train-*.tar`, where names say more than one split.
        config: Augmentation, memory and damage budget; order and caches do not apply.
        image_shape: (C, H, W) that a network sees.
        num_classes: Labels are below it.
        samples_per_epoch: What counts as an epoch.
        global_batch: Samples of all ranks together in one batch.
        cursor: Counts samples; where it begins changes the draw and repeats nothing.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ShardError: no shards, shards of several splits, or a batch that the ranks cannot share.
            While it streams: damage over the budget, or not one image or label in all shards.
    """

    def __init__(
        self,
        url: str,
        config: StreamConfig,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        samples_per_epoch: int,
        global_batch: int,
        cursor: Cursor,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if global_batch % world_size:
            raise ShardError(
                f"global batch {global_batch} is not divisible by the world size {world_size}"
            )
        self.samples_per_epoch = samples_per_epoch
        self.damaged: collections.Counter[str] = collections.Counter()
        self.waited_s = 0.0
        self.cursor = cursor
        self._store, shards = _find_shards(url)
        _logger.warning(
            "%s is read without an index: samples repeat and stay out, and a resumed run sees "
            "other ones",
            self._store,
        )
        samples = _samples(self._store, shards, cursor, rank)
        producer = _Producer(self._store, config, image_shape, num_classes, samples)
        batches = producer.batches(global_batch, world_size, samples_per_epoch, cursor, rank)
        self._batches = Prefetcher(
            batches,
            size_of=lambda batch: batch.images.nbytes,
            max_bytes=config.read_ahead_bytes // 2,
            max_items=_MAX_BATCHES_AHEAD,
        )
        self._producer = producer
        self._close = weakref.finalize(self, self._batches.close)

    @property
    def retries(self) -> int:
        """Repeated requests for listings; those inside a shard are the client's and not counted."""
        return self._store.retries

    def __iter__(self) -> "UnindexedStream":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        batch = self._batches.get()
        self.waited_s += time.perf_counter() - begin
        self.cursor = batch.cursor_after
        self.damaged = self._producer.damaged.copy()
        return batch

    def __enter__(self) -> "UnindexedStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread; iterating afterwards stops at once."""
        self._close()


def _find_shards(url: str) -> tuple[Store, list[str]]:
    folder, _, last = url.rstrip("/").rpartition("/")
    given = any(sign in last for sign in "*?[") or last.endswith(".tar")
    store = Store(folder or "." if given else url)
    shards = [name for name in store.ls() if name.endswith(".tar")]
    if given:
        shards = [name for name in shards if fnmatch.fnmatchcase(name, last)]
    if not shards:
        raise ShardError(f"there are no shards ({last if given else '*.tar'}) at {store}")
    splits = collections.Counter(_split_of(name) for name in shards)
    if len(splits) > 1:
        counts = ", ".join(f"{n} {split or 'without one'}" for split, n in sorted(splits.items()))
        raise ShardError(
            f"names of shards at {store} say more than one split ({counts}): give a pattern, as "
            f"{store}/{'train' if splits['train'] else next(iter(splits))}-*.tar"
        )
    return store, shards


def _split_of(name: str) -> str:
    """Return "train", "test", "val" and so on as a name says it, or nothing."""
    found = _SPLIT.search(name.lower())
    return "val" if found and found[1].startswith("val") else found[1] if found else ""


def _samples(
    store: Store, shards: list[str], cursor: Cursor, rank: int
) -> Iterator[dict[str, Any]]:
    """Yield samples without end: WebDataset's resampling, tar reader, grouping and shuffle."""
    import webdataset
    from webdataset import tariterators

    wanted = (*EXTENSIONS, _LABEL)
    seen: collections.Counter[str] = collections.Counter()

    def is_wanted(name: str) -> bool:
        kind = name.rpartition("/")[2].lower().rpartition(".")[2]
        seen[kind if len(kind) < _LONGEST_KIND else "other"] += 1
        return kind in wanted

    def opened(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for source in sources:
            with store.open(source["url"]) as stream:
                yield {**source, "stream": stream}

    seeds = (cursor.seed, cursor.epoch, cursor.position)
    resampled = webdataset.ResampledShards(
        shards, seed=hash(seeds), worker_seed=lambda: rank, deterministic=True
    )

    def names() -> Iterator[dict[str, Any]]:
        """Every shard once, then shards at random: a set without samples would have no end."""
        once = sorted(shards)
        random.Random(hash((*seeds, rank))).shuffle(once)
        yield from ({"url": name} for name in once)
        if not any(seen[kind] for kind in wanted):
            kinds = ", ".join(f"{n} .{kind}" for kind, n in seen.most_common(_LISTED))
            raise ShardError(
                f"{store}: none of {len(shards)} shards has an image or a .{_LABEL}; they hold "
                f"{kinds or 'no files'}"
            )
        yield from resampled

    members = tariterators.tar_file_expander(opened(names()), select_files=is_wanted)
    grouped = tariterators.group_by_keys(members)
    generator = random.Random(hash((*seeds, rank)))
    yield from webdataset.shuffle(_SHUFFLE_BUFFER, rng=generator)(grouped)


class _Producer:
    """Makes the batches, in the background thread."""

    def __init__(
        self,
        store: Store,
        config: StreamConfig,
        image_shape: tuple[int, int, int],
        num_classes: int,
        samples: Iterator[dict[str, Any]],
    ) -> None:
        self.damaged: collections.Counter[str] = collections.Counter()
        self._store = store
        self._config = config
        self._shape = image_shape
        self._classes = num_classes
        self._samples = samples
        self._seen = 0

    def batches(
        self, global_batch: int, world_size: int, per_epoch: int, cursor: Cursor, rank: int
    ) -> Iterator[Batch]:
        count = global_batch // world_size
        while True:
            start = cursor.position + rank * count
            spans = [Span(cursor.epoch, start, start + count)]  # keys of random words, no more
            crop, moved, changed = (
                position_words(cursor.seed, spans, purpose=purpose)
                for purpose in (CROP, AUGMENT, RANDAUGMENT)
            )
            images = torch.empty((count, *self._shape), dtype=torch.uint8)
            labels = torch.empty(count, dtype=torch.int64)
            for slot in range(count):
                image, labels[slot] = self._next(crop[slot])
                put(images[slot], image, moved[slot], changed[slot], self._config)
            cursor = cursor.advance(global_batch, per_epoch)
            unknown = np.full(count, -1, dtype=np.int64)
            yield Batch(images, labels, unknown, unknown, cursor)

    def _next(self, crop: Words) -> tuple[Tensor, int]:
        """Return the next sample that is whole; the others are counted, up to the budget."""
        while True:
            try:
                sample = next(self._samples)
            except (OSError, EOFError, ValueError, tarfile.TarError) as error:
                raise ShardError(f"cannot read {self._store}: {error}") from error
            self._seen += 1
            try:
                return self._decode(sample, crop)
            except ShardError as error:
                self.damaged["sample"] += 1
                where = f"{sample.get('__url__')} of {self._store}"
                _logger.warning("sample %r in %s is left out: %s", sample["__key__"], where, error)
                budget = self._config.damage_allowance + self._config.damage_fraction * self._seen
                if self.damaged["sample"] > budget:
                    raise ShardError(
                        f"{self.damaged['sample']} of {self._seen} samples of {self._store} are "
                        f"damaged, more than the budget of {budget:g}"
                    ) from error

    def _decode(self, sample: dict[str, Any], crop: Words) -> tuple[Tensor, int]:
        extensions = [name for name in EXTENSIONS if name in sample]
        text = sample.get(_LABEL, b"").decode(errors="replace")
        if not extensions or not text.isascii() or not text.isdigit() or int(text) >= self._classes:
            raise ShardError(f"no image, or label {text!r} not in [0, {self._classes})")
        data = sample[extensions[0]]
        if self._config.crop == "none":
            image = codec.decode_image(data, extensions[0])
        else:
            channels, height, width = self._shape
            image = codec.decode_crop(data, extensions[0], (height, width), crop, channels=channels)
        if tuple(image.shape) != self._shape:
            raise ShardError(f"image of shape {tuple(image.shape)}, the network sees {self._shape}")
        return image, int(text)
