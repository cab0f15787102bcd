import io

import numpy as np
import pytest
from PIL import Image

from data_shards.errors import ShardError
from data_shards.format.decode import decode_image
from data_shards.sources.transcode import Recipe, UndecodableError, image_extension
from tests.data_shards.imagenet_archive import encode, pixels_of


def shape_of(data):
    return tuple(decode_image(data, image_extension(data)).shape)


def picture(width, height, mode="RGB", kind="PNG"):
    return encode(Image.fromarray(pixels_of(1, 2, (width, height))).convert(mode), kind)


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (300, 300), (40, 900), (9, 9)]
)
@pytest.mark.parametrize("size", [32, 224])
def test_test_images_have_the_size_of_the_network(width, height, size):
    stored = Recipe(channels=3, size=size)(picture(width, height, kind="JPEG"), True)
    assert image_extension(stored) == "png"
    assert shape_of(stored) == (3, size, size)


def test_test_images_are_the_centre_after_the_short_side_is_resized():
    """A ramp of x in red and of y in green: the values of a pixel are its place in the original."""
    width, height, size = 512, 384, 224
    x, y = np.meshgrid(np.arange(width) / 2, np.arange(height) / 2)
    ramp = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    stored = Recipe(channels=3, size=size)(encode(Image.fromarray(ramp), "PNG"), True)
    found = decode_image(stored, "png").numpy().astype(float)
    scale = height / 256  # the short side becomes 256
    left, top = (width / scale - size) / 2, (256 - size) / 2
    expected_x = ((np.arange(size) + left + 0.5) * scale - 0.5) / 2
    expected_y = ((np.arange(size) + top + 0.5) * scale - 0.5) / 2
    assert np.abs(found[0] - expected_x[None, :]).max() < 1.6
    assert np.abs(found[1] - expected_y[:, None]).max() < 1.6


def test_resizing_is_antialiased():
    """Stripes of one pixel become grey; taking every n-th pixel would keep black and white."""
    stripes = np.zeros((896, 896, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    stored = Recipe(channels=3, size=112)(encode(Image.fromarray(stripes), "PNG"), True)
    found = decode_image(stored, "png").numpy()
    assert found.min() > 110
    assert found.max() < 145


def test_grey_becomes_three_equal_channels_in_a_colour_set():
    stored = Recipe(channels=3, size=32)(picture(60, 50, "L", "JPEG"), True)
    image = decode_image(stored, "png").numpy()
    assert image.shape == (3, 32, 32)
    assert (image[0] == image[1]).all()
    assert (image[0] == image[2]).all()
    assert image.std() > 5
    assert shape_of(Recipe(channels=1, size=32)(picture(60, 50, "L"), True)) == (1, 32, 32)
    with pytest.raises(UndecodableError, match="3 channels in a set of 1") as caught:
        Recipe(channels=1, size=32)(picture(60, 50), True)
    assert caught.value.cause == "channels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_train_images_keep_their_bytes(kind):
    data = picture(60, 50, kind=kind)
    assert Recipe(channels=3, size=32)(data, False) == data
    assert Recipe(channels=3, size=32, long_side=60)(data, False) == data


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_long_train_images_are_reduced(width, height, mode):
    data = picture(width, height, mode, "JPEG")
    stored = Recipe(channels=3, size=32, long_side=100)(data, False)
    channels = 3 if mode == "RGB" else 1
    assert shape_of(stored) == (channels, *((75, 100) if width > height else (100, 75)))
    assert image_extension(stored) == "jpg"
    assert len(Recipe(channels=3, size=32, long_side=100, quality=30)(data, False)) < len(stored)


def test_uniform_images():
    recipe = Recipe(channels=3, size=32, uniform=True)
    jpeg, png, grey = picture(32, 32, kind="JPEG"), picture(32, 32), picture(32, 32, "L", "JPEG")
    assert recipe(jpeg, False) == jpeg
    assert recipe(png, True) == png
    assert recipe(jpeg, True) != jpeg
    same = decode_image(recipe(jpeg, True), "png") == decode_image(jpeg, "jpg")
    assert same.all()
    for test in (False, True):
        assert shape_of(recipe(grey, test)) == (3, 32, 32)
    with pytest.raises(UndecodableError, match="32 x 33 pixels in a set of 32 x 32"):
        recipe(picture(32, 33), False)


def test_causes():
    recipe = Recipe(channels=3, size=32)
    cases = {
        b"": "empty",
        b"FORMAT....": "format",
        b"GIF89a....": "decode",
        picture(60, 50, kind="JPEG")[:700]: "decode",
        picture(60, 50)[:-40]: "decode",
        picture(1, 5000): "shape",
    }
    for data, cause in cases.items():
        with pytest.raises(UndecodableError) as caught:
            Recipe(channels=3, size=224)(data, True)
        assert caught.value.cause == cause
    with pytest.raises(UndecodableError):
        recipe(picture(60, 50, kind="JPEG")[:700], False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4}, r"size 4 is not in \[8"),
        ({"long_side": 20}, r"long side 20 is not in \[32"),
        ({"quality": 0}, r"JPEG quality 0"),
        ({"channels": 2}, "2 channels"),
    ],
)
def test_limits(fields, message):
    with pytest.raises(ShardError, match=message):
        Recipe(**{"channels": 3, "size": 32, **fields})


def test_pixels_of_a_stored_test_image_survive():
    stored = Recipe(channels=3, size=32)(picture(60, 50), True)
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert (np.asarray(image) == decode_image(stored, "png").permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("test", [False, True])
def test_single_images_of_other_formats_are_stored_as_png_with_the_same_pixels(kind, test):
    image = Image.fromarray(pixels_of(1, 2, (32, 32))).quantize(200)
    stored = Recipe(channels=3, size=32, uniform=True)(encode(image, kind), test)
    assert image_extension(stored) == "png"
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(stored, "png").numpy(), expected)


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_a_file_of_several_images_is_refused(kind):
    images = [Image.fromarray(pixels_of(1, seed, (32, 32))) for seed in range(2)]
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    with pytest.raises(UndecodableError, match=f"{kind} .* holds more than one image"):
        Recipe(channels=3, size=32)(file.getvalue(), False)


def test_damage_and_depth_of_other_formats_are_refused():
    whole = picture(32, 32, kind="TIFF")
    with pytest.raises(UndecodableError, match="damaged TIFF"):
        Recipe(channels=3, size=32)(whole[: len(whole) // 2], False)
    deep = encode(Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)), "TIFF")
    with pytest.raises(UndecodableError, match="colour mode I;16"):
        Recipe(channels=1, size=32)(deep, False)
