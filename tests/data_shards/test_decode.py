import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards import decode
from data_shards.decode import decode_image
from data_shards.errors import ShardError

GREY = (np.arange(48).reshape(6, 8) * 5).astype(np.uint8)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {"lossless": True})])
def test_lossless_colour(kind, options):
    image = decode_image(encoded(COLOUR, kind, **options), kind)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), COLOUR)


def test_grey_stays_one_channel():
    assert np.array_equal(decode_image(encoded(GREY, "png"), "png").numpy(), GREY[None])
    assert decode_image(encoded(GREY, "jpeg"), "jpg").shape == (1, 6, 8)


def test_jpeg_colour():
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    image = decode_image(encoded(flat, "jpeg", quality=95), "jpeg")
    assert image.shape == (3, 16, 16)
    assert (image.int() - torch.tensor([200, 40, 90])[:, None, None]).abs().max() <= 3


@pytest.mark.parametrize("extension", ["gif", "pkl", "npy", "tiff", ""])
def test_other_extensions_are_refused(extension):
    with pytest.raises(ShardError, match="is not one of png"):
        decode_image(encoded(GREY, "png"), extension)


def test_content_must_match_the_extension():
    with pytest.raises(ShardError, match="damaged PNG"):
        decode_image(encoded(GREY, "gif"), "png")
    with pytest.raises(ShardError, match="damaged JPEG"):
        decode_image(encoded(GREY, "png"), "jpg")


@pytest.mark.parametrize(("kind", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_truncated(kind, extension):
    data = encoded(COLOUR, kind)
    with pytest.raises(ShardError, match="damaged"):
        decode_image(data[: len(data) * 2 // 3], extension)
    with pytest.raises(ShardError, match="damaged"):
        decode_image(b"", extension)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "I;16"])
def test_other_modes_are_refused(mode):
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "png")
    with pytest.raises(ShardError, match="not L or RGB"):
        decode_image(buffer.getvalue(), "png")


def test_cmyk_jpeg_is_refused():
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(buffer, "jpeg")
    with pytest.raises(ShardError, match="not greyscale or RGB"):
        decode_image(buffer.getvalue(), "jpg")


@pytest.mark.parametrize(("kind", "extension"), [("png", "png"), ("jpeg", "jpg")])
def test_size_limit(kind, extension, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 40)
    with pytest.raises(ShardError, match=r"8 x 6 pixels is over the limit 40"):
        decode_image(encoded(COLOUR, kind), extension)
