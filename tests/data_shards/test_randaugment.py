import functools

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image

from data_shards.errors import ShardError
from data_shards.streaming import transforms as module
from data_shards.streaming.transforms import apply, randaugment

PIXELS = np.random.Generator(np.random.Philox(7)).integers(40, 256, (21, 34, 3), dtype=np.uint8)
# xxh3_64 of what torchvision 0.28.0 makes of these pixels (Pillow images, nearest pixel, black
# fill) at magnitude 9 of 31 steps, in the positive and the negative direction.
REFERENCE = {
    "Identity": ("a9ec7de2b788bf14", "a9ec7de2b788bf14"),
    "ShearX": ("a70ebe2e09fe72bf", "a3742e0db9e7d970"),
    "ShearY": ("7c8cf07903ab70cb", "42e3c420406abb0f"),
    "TranslateX": ("7acd8fcb9c68c8dc", "64fe436b0fc89f5d"),
    "TranslateY": ("07d87116c8c1ecb0", "c2d61e6bf2c8231f"),
    "Rotate": ("878663cd205963ee", "0e904f04abfa86e7"),
    "Brightness": ("1a1b75fd4a7cb1f7", "72eb71a2326da3b6"),
    "Color": ("1ec4e674176dcd4c", "b3c8af14ffe89687"),
    "Contrast": ("89638c8ecac6823b", "d4fa1139ed047165"),
    "Sharpness": ("20b36e62db3e7cb1", "86f367fb9694f6dd"),
    "Posterize": ("6d769b725368b4d3", "6d769b725368b4d3"),
    "Solarize": ("d16c4a19fae1260e", "d16c4a19fae1260e"),
    "AutoContrast": ("6610d0df5c96c78f", "6610d0df5c96c78f"),
    "Equalize": ("acb6a8929b12564f", "acb6a8929b12564f"),
}


def drawn(count):
    return np.random.Generator(np.random.Philox(3)).integers(0, 2**64, (count, 4), dtype=np.uint64)


@pytest.mark.parametrize("name", REFERENCE)
def test_operations_equal_those_of_the_field(name):
    for direction, expected in zip((1, -1), REFERENCE[name], strict=True):
        found = np.array(apply(Image.fromarray(PIXELS), name, 9, direction))
        assert xxhash.xxh3_64_hexdigest(found.tobytes()) == expected


@pytest.mark.parametrize("name", sorted(set(REFERENCE) - {"AutoContrast", "Equalize", "Solarize"}))
def test_magnitude_zero_changes_nothing(name):
    for pixels in (PIXELS, PIXELS[:, :, 0]):
        assert np.array_equal(np.array(apply(Image.fromarray(pixels), name, 0, 1)), pixels)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_shape_and_type_are_kept(name, magnitude, monkeypatch):
    monkeypatch.setattr(module, "_NAMES", (name,))
    colour = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for image in (colour, colour[:1], colour.contiguous()):
        out = randaugment(image, drawn(1)[0], operations=1, magnitude=magnitude)
        assert out.shape == image.shape
        assert out.dtype == torch.uint8


def test_the_words_decide_alone():
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    before = image.clone()
    outs = [randaugment(image, words) for words in drawn(60)]
    assert torch.equal(image, before)
    for words, out in zip(drawn(60), outs, strict=True):
        assert torch.equal(randaugment(image, words), out)
        words[2:] = 0  # no word beyond the two operations
        assert torch.equal(randaugment(image, words), out)
    assert len({xxhash.xxh3_64_intdigest(out.contiguous().numpy()) for out in outs}) > 40


def test_every_operation_is_drawn_in_both_directions(monkeypatch):
    seen = set()

    def spied(name, image, strength, direction):
        seen.add((name, direction))
        return image

    for name in REFERENCE:
        monkeypatch.setitem(module._OPERATIONS, name, functools.partial(spied, name))
    for words in drawn(300):
        randaugment(torch.from_numpy(PIXELS).permute(2, 0, 1), words)
    assert seen == {(name, direction) for name in REFERENCE for direction in (1, -1)}


def test_operations_follow_one_another(monkeypatch):
    monkeypatch.setattr(module, "_NAMES", ("TranslateX",))
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    there_and_back = np.array([0, 1], dtype=np.uint64)
    out = randaugment(image, there_and_back, operations=2, magnitude=9)
    moved = int(150 / 331 * 34 * 9 / 30)
    assert torch.equal(out[:, :, :-moved], image[:, :, :-moved])
    assert not out[:, :, -moved:].any()
    assert torch.equal(randaugment(image, there_and_back, operations=0), image)


def test_wrong_settings_are_refused():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ShardError, match="5 operations need as many random words, not 4"):
        randaugment(image, drawn(1)[0], operations=5)
    with pytest.raises(ShardError, match=r"magnitude 31 is not in \[0, 30\]"):
        randaugment(image, drawn(1)[0], magnitude=31)
