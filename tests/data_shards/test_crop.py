"""Sets whose train images differ in shape: cropped by the stream, tested at network size."""

import dataclasses
import functools
import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format import decode, image_pixels
from data_shards.format.shard_index import load_index
from data_shards.sources.synthetic import synthetic
from data_shards.streaming.sample_reader import read_shard
from data_shards.streaming.sampler import RANDAUGMENT, Cursor, Span, position_words
from data_shards.streaming.stream import SampleStream
from data_shards.streaming.transforms import randaugment
from data_shards.writing.writer import write_shard_set
from tests.data_shards.test_index import rewrite_header

CROP = StreamConfig(crop="random-resized", flip=True, lanes=2, window=8)
SIZES = ((24, 30), (40, 17), (16, 16), (33, 33))


def images_of_many_sizes(plain, numbers):
    """Train images of another size each; test images as they are."""
    out = []
    for number, data in zip(numbers, plain(numbers), strict=True):
        image = Image.open(io.BytesIO(data))
        buffer = io.BytesIO()
        image.resize(SIZES[number % 4]).save(buffer, "JPEG", quality=95)
        out.append(buffer.getvalue())
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw")
    source = synthetic(samples=120, size=16, classes=4)
    load = functools.partial(images_of_many_sizes, source.load)
    write_shard_set(dataclasses.replace(source, load=load), str(path), samples_per_shard=20)
    rewrite_header(path, train_shape=None)
    return path


def take(folder, count=12, config=CROP, split="train", **fields):
    arguments = {"global_batch": 16, "cursor": Cursor(seed=3), "split": split, **fields}
    with SampleStream(load_index(str(folder)), config, **arguments) as stream:
        return [next(stream) for _ in range(count)]


def pixels(batches):
    return torch.cat([batch.images for batch in batches])


def test_every_image_comes_at_network_size_and_differently_each_epoch(folder):
    batches = take(folder)
    rows = np.concatenate([batch.rows for batch in batches])
    images = pixels(batches)
    assert images.shape == (192, 3, 16, 16)
    assert images.dtype == torch.uint8
    first = dict(zip(rows[:96], images[:96], strict=True))
    again = dict(zip(rows[96:], images[96:], strict=True))
    assert len(first) == 96
    assert sum(torch.equal(first[row], again[row]) for row in first) < 5


@pytest.mark.parametrize("workers", [1, 3])
def test_crops_depend_on_seed_epoch_and_position_alone(folder, workers):
    whole = take(folder)
    expected = pixels(whole)
    config = dataclasses.replace(CROP, workers=workers, read_ahead_bytes=60_000)
    assert torch.equal(pixels(take(folder, config=config)), expected)
    halves = [take(folder, config=config, rank=rank, world_size=2) for rank in (0, 1)]
    joined = [torch.cat([a.images, b.images]) for a, b in zip(*halves, strict=True)]
    assert torch.equal(torch.cat(joined), expected)
    resumed = take(folder, 5, cursor=whole[6].cursor_after)
    assert torch.equal(pixels(resumed), expected[7 * 16 :])
    other = take(folder, cursor=Cursor(seed=4))
    assert not torch.equal(pixels(other), expected)


def test_a_crop_is_asked_for_and_only_where_it_belongs(folder, synthetic_set):
    with pytest.raises(ShardError, match=r"differ in shape and a network sees .* crop=random-resi"):
        take(folder, config=StreamConfig())
    with pytest.raises(ShardError, match="never cropped: crop=none"):
        take(folder, split="test")
    assert take(synthetic_set, 1)[0].images.shape == (16, 3, 16, 16)  # augmentation alone


def test_raw_splits_are_not_read_for_certificates(folder):
    index = load_index(str(folder))
    with pytest.raises(ShardError, match="only the test split is stored at network size"):
        next(read_shard(index, index.shards_of("validation")[0], 8, split="validation"))


def test_cropped_images_are_never_kept(folder, monkeypatch):
    decoded = []
    original = decode.decode_crop

    def spy(*arguments, **options):
        decoded.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(decode, "decode_crop", spy)
    take(folder, 12)
    assert len(decoded) >= 192


def test_randaugment_changes_a_share_of_the_images(folder):
    plain = pixels(take(folder))
    some, all_ = (
        pixels(take(folder, config=dataclasses.replace(CROP, randaugment=share)))
        for share in (0.5, 1.0)
    )
    changed = [not torch.equal(a, b) for a, b in zip(some, plain, strict=True)]
    assert 0.3 < np.mean(changed) < 0.7
    # Those that both change are changed in the same way.
    for number, is_changed in enumerate(changed):
        assert not is_changed or torch.equal(some[number], all_[number])
    threads = dataclasses.replace(CROP, randaugment=1.0, workers=3)
    assert torch.equal(pixels(take(folder, config=threads)), all_)


def test_randaugment_changes_what_was_shifted_and_mirrored(folder):
    """The order of the recipe: crop, shift, mirror, RandAugment."""
    moved = dataclasses.replace(CROP, shift_pixels=3)
    plain = pixels(take(folder, 3, config=moved))
    found = pixels(take(folder, 3, config=dataclasses.replace(moved, randaugment=1.0)))
    words = position_words(3, [Span(0, 0, 48)], purpose=RANDAUGMENT)
    for image, row, expected in zip(plain, words, found, strict=True):
        assert torch.equal(randaugment(image, row), expected)


def test_certification_never_reduces(synthetic_set, monkeypatch):
    """Every JPEG of the test split is decoded whole and at its own size."""
    index, factors = load_index(str(synthetic_set)), []
    plain = image_pixels._decode_jpeg

    def watched(data, header, rows, factor):
        factors.append((factor, rows == header.height))
        return plain(data, header, rows, factor)

    monkeypatch.setattr(image_pixels, "_decode_jpeg", watched)
    monkeypatch.setattr(decode, "decode_crop", None)
    for shard in index.shards_of("test"):
        for _ in read_shard(index, shard, 8):
            pass
    assert factors == [(1, True)] * index.header.splits["test"]
