import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from data_shards.errors import ShardError
from data_shards.format.crop_box import random_crop_box
from data_shards.format.decode import decode_crop, decode_image

GREY = (np.arange(48).reshape(6, 8) * 5).astype(np.uint8)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)
NOISE = np.asarray(
    Image.fromarray(
        np.random.Generator(np.random.Philox(1)).integers(0, 256, (22, 31, 3), dtype=np.uint8)
    ).resize((187, 141), Image.Resampling.BICUBIC)
)


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def cmyk_jpeg(pixels, *, ycck=False):
    """A JPEG as Adobe's programs write it: inverted inks, marked in an APP14 segment."""
    inks = Image.fromarray(pixels).convert("CMYK")
    if ycck:
        inverted = 255 - np.array(inks)
        return simplejpeg.encode_jpeg(inverted, 98, colorspace="CMYK", colorsubsampling="444")
    buffer = io.BytesIO()
    inks.save(buffer, "JPEG", quality=98)
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


def test_the_content_decides_the_format():
    data = encoded(COLOUR, "png")
    assert torch.equal(decode_image(data, "jpeg"), decode_image(data, "png"))
    jpeg = encoded(COLOUR, "jpeg")
    assert torch.equal(decode_image(jpeg, "png"), decode_image(jpeg, "jpg"))
    with pytest.raises(ShardError, match=r"begins with '47494638.*', like no PNG, JPEG or WebP"):
        decode_image(encoded(GREY, "gif"), "png")


@pytest.mark.parametrize(("kind", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_truncated(kind, extension):
    data = encoded(COLOUR, kind)
    with pytest.raises(ShardError, match="damaged"):
        decode_image(data[: len(data) * 2 // 3], extension)
    with pytest.raises(ShardError, match="damaged"):
        decode_image(b"", extension)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_other_png_modes_become_grey_or_rgb(mode):
    """What a mode states without its alpha; a palette is only another way to write RGB."""
    image = Image.fromarray(COLOUR).convert("RGBA" if mode == "P" else mode)
    expected = np.array(image.convert("L" if mode in ("LA", "1") else "RGB"))
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
        image.info["transparency"] = bytes(range(48))
        expected = np.array(image.convert("RGBA").convert("RGB"))
    elif mode != "1":
        image.putalpha(7)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    found = decode_image(buffer.getvalue(), "png").permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected.reshape(found.shape))


def test_16_bits_are_refused():
    grey, colour = (
        encoded(np.full((4, 4), 999, np.uint16), "png"),
        bytearray(encoded(COLOUR, "png")),
    )
    colour[24] = 16  # the depth in the header
    for data in (grey, bytes(colour)):
        with pytest.raises(ShardError, match="16 bits per channel"):
            decode_image(data, "png")


@pytest.mark.parametrize("space", ["CMYK", "YCCK"])
def test_cmyk_jpeg_is_decoded_as_by_pillow(space):
    """Adobe's files are inverted; a white image that comes out black would show it."""
    flat = np.full((16, 16, 3), (255, 200, 40), np.uint8)
    data = cmyk_jpeg(flat, ycck=space == "YCCK")
    assert simplejpeg.decode_jpeg_header(data)[2] == space
    found = decode_image(data, "jpg").permute(1, 2, 0).numpy().astype(int)
    assert np.array_equal(found, np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(found - flat).max() <= 4


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    plain = decode_image(encoded(NOISE, "jpeg"), "jpg")
    assert torch.equal(decode_image(encoded(NOISE, "jpeg", exif=exif), "jpg"), plain)
    cmyk = Image.fromarray(NOISE).convert("CMYK")  # the route through Pillow
    for image, extension in ((cmyk, "jpeg"), (Image.fromarray(NOISE), "png")):
        data = [io.BytesIO(), io.BytesIO()]
        image.save(data[0], extension)
        image.save(data[1], extension, exif=exif)
        first, second = (decode_image(d.getvalue(), "jpg") for d in data)
        assert first.shape == (3, *NOISE.shape[:2])
        assert torch.equal(first, second)


def test_bytes_left_over_are_no_damage():
    data = encoded(NOISE, "jpeg")
    padded = data[:-2] + b"\0" * 40 + data[-2:]
    assert torch.equal(decode_image(padded, "jpg"), decode_image(data, "jpg"))


def crop_of_the_whole(data, words, size):
    """Decode all, cut, scale: what `decode_crop` must equal."""
    whole = decode_image(data, "jpg")
    box = random_crop_box(whole.shape[1], whole.shape[2], words)
    part = whole[None, :, box.top : box.bottom, box.left : box.right]
    part = torch.nn.functional.interpolate(part, size=size, mode="bilinear", antialias=True)[0]
    return part.expand(3, *size)


def drawn(count):
    return np.random.Generator(np.random.Philox(5)).integers(0, 2**64, (count, 4), dtype=np.uint64)


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90, "subsampling": "4:2:0"},
        {"quality": 90, "subsampling": "4:2:2"},
        {"quality": 99, "subsampling": "4:4:4"},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"optimize": True, "comment": b"\xff\xc0 no header"},
    ],
)
def test_rows_that_are_not_decoded_change_nothing(options):
    for pixels in (NOISE, NOISE[:, :, 0]):
        data = encoded(pixels, "jpeg", **options)
        for words in drawn(40):
            found = decode_crop(data, "jpg", (96, 100), words)
            assert found.shape == (3, 96, 100)
            assert torch.equal(found, crop_of_the_whole(data, words, (96, 100)))


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(monkeypatch):
    smooth = Image.fromarray(NOISE[::24, ::24]).resize((900, 700), Image.Resampling.BICUBIC)
    data = encoded(np.asarray(smooth), "jpeg", quality=95)
    shapes = set()
    original = simplejpeg.decode_jpeg

    def spy(*arguments, buffer, **options):
        shapes.add(buffer.shape[1])
        return original(*arguments, buffer=buffer, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    pairs = [
        (decode_crop(data, "jpg", (64, 64), words), crop_of_the_whole(data, words, (64, 64)))
        for words in drawn(60)
    ]
    assert shapes == {900, 450, 225, 113}
    differences = [(a.float() - b.float()).abs().mean() for a, b in pairs]
    assert max(differences) < 4  # of 255; at most half a pixel of the smaller image is lost


def test_reduced_decoding_differs_by_about_a_grey_level():
    """Before, edges were rounded to reduced pixels: 2.4 grey levels on average."""
    for kind in ("RGB", "L"):
        differences = []
        for photograph in load_sample_images().images:
            picture = Image.fromarray(photograph).convert(kind)
            data = encoded(np.asarray(picture), "jpeg", quality=92)
            for words in drawn(20):
                whole = crop_of_the_whole(data, words, (48, 48))
                found = decode_crop(data, "jpg", (48, 48), words)
                differences.append(float((found.float() - whole.float()).abs().mean()))
        assert max(differences) < 4
        assert np.mean(differences) < 1.5


def test_crop_of_other_formats_equals_the_crop_of_their_pixels():
    for data in (encoded(NOISE, "png"), encoded(NOISE[:, :, 1], "png"), cmyk_jpeg(NOISE)):
        for words in drawn(10):
            found = decode_crop(data, "jpeg", (96, 100), words)
            assert torch.equal(found, crop_of_the_whole(data, words, (96, 100)))


def test_channels_of_a_crop():
    words = drawn(1)[0]
    grey = encoded(NOISE[:, :, 0], "jpeg")
    assert torch.equal(*decode_crop(grey, "jpg", (9, 9), words)[:2])
    assert decode_crop(grey, "jpg", (9, 9), words, channels=1).shape == (1, 9, 9)
    with pytest.raises(ShardError, match="image of 3 channels where 1 is asked for"):
        decode_crop(encoded(NOISE, "jpeg"), "jpg", (9, 9), words, channels=1)


def test_damage_down_to_the_last_row_of_a_crop_is_found():
    data = encoded(NOISE, "jpeg", quality=90)
    for words in drawn(40):
        with pytest.raises(ShardError, match="damaged JPEG"):
            decode_crop(data[:-300], "jpg", (96, 100), words)
        bottom = random_crop_box(NOISE.shape[0], NOISE.shape[1], words).bottom
        # Ends early, and says so: nothing below the crop is looked at.
        ended = data[: len(data) * bottom // NOISE.shape[0] // 2] + b"\xff\xd9"
        with pytest.raises(ShardError, match="damaged JPEG"):
            decode_crop(ended, "jpg", (96, 100), words)


@pytest.mark.parametrize(("kind", "extension"), [("png", "png"), ("jpeg", "jpg")])
def test_size_limit(kind, extension, monkeypatch):
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_IMAGE_PIXELS", "40")
    with pytest.raises(ShardError, match=r"8 x 6 has 48 pixels, the limit is 40"):
        decode_image(encoded(COLOUR, kind), extension)


@pytest.mark.parametrize("progressive", [True, False])
def test_a_small_jpeg_of_many_scans_is_refused(progressive):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40, 3), np.uint8))
    buffer = io.BytesIO()
    picture.resize((2000, 2000)).save(buffer, "JPEG", progressive=progressive, quality=30)
    data = buffer.getvalue()
    assert decode_image(data, "jpg").shape == (3, 2000, 2000)
    last = data.rindex(b"\xff\xda")
    many = data[:last] + 200 * data[last:-2] + data[-2:]
    if not progressive:  # all colours in one scan: a decoder stops behind it
        assert decode_image(data + 200 * b"\xff\xda", "jpg").shape == (3, 2000, 2000)
        many = many[: last + 4] + b"\1" + many[last + 5 :]
    words = np.zeros(4, dtype=np.uint64)
    for decoded in (
        lambda d: decode_image(d, "jpg"),
        lambda d: decode_crop(d, "jpg", (8, 8), words),
    ):
        with pytest.raises(
            ShardError, match=r"JPEG of 2000 x 2000 in 2.. scans: multiplied .* the limit is"
        ):
            decoded(many)
