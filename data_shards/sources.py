"""Where images come from: the digits of scikit-learn and a procedural set.

A source is deterministic: labels, splits and the bytes of every image depend on its parameters
alone.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_shards.errors import ShardError
from data_shards.philox import philox_words, unit_interval

# Purposes of random words; the stream half of the key is the number of an image or a class.
_TEST, _VALIDATION, _TEMPLATE, _NUISANCE, _NOISE = range(200, 205)
_HELD_OUT = 0.2
_SPLIT_SEED = 0

# Amplitudes of the procedural images around grey 0.5, on the scale [0, 1].
_TEMPLATE_AMPLITUDE = 0.055
_NUISANCE_AMPLITUDE = 0.10
_GRATING_AMPLITUDE = 0.13
_NOISE_AMPLITUDE = 0.08
_WAVELENGTHS = (4.5, 9.0)  # pixels, shortest and longest grating
_JPEG_QUALITY = 95
_MAX_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class Source:
    """Images to be written as shards.

    Args:
        name: Name of the set.
        image_shape: (C, H, W) of every image.
        class_names: One name per class.
        labels: Label of every image.
        test: True for images of the test split; the others are the train split.
        validation: True for the train images that "validation" holds and "fit" lacks.
        extension: File extension of the encoded images.
        encode: Number of an image -> its encoded bytes, the same at every call.
        parameters: What identifies the content, for the header.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    test: npt.NDArray[np.bool_]
    validation: npt.NDArray[np.bool_]
    extension: str
    encode: Callable[[int], bytes]
    parameters: Mapping[str, Any]


def digits() -> Source:
    """Return the 1,797 handwritten digits that scikit-learn ships.

    Greyscale 1x8x8: value v of 0 to 16 is stored as round(255 v / 16) in an 8-bit PNG. 360 images
    are the test split, 288 of the 1,437 others are validation.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed for writing only

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    test, validation = _stratified_splits(labels)
    return Source(
        name="digits",
        image_shape=(1, 8, 8),
        class_names=tuple(str(name) for name in data.target_names),
        labels=labels,
        test=test,
        validation=validation,
        extension="png",
        encode=lambda i: _encode(pixels[i], "PNG"),
        parameters={"source": "digits"},
    )


def synthetic(*, classes: int = 10, size: int = 32, samples: int = 2000, seed: int = 0) -> Source:
    """Return procedural RGB images of two ingredients, both weak.

    A class has a template, a smooth colour field that a linear map of the pixels finds, drowned
    partly in a random field of the same kind. It also has a grating, of an orientation and a
    wavelength of its own and of random phase: its mean over images is zero, so no linear map of the
    pixels sees it, a network does.

    Args:
        classes: Number of classes, image i has label i mod classes.
        size: Height and width in pixels.
        samples: Number of images, train and test together.
        seed: Key of all images.

    Raises:
        ShardError: a number outside its limits.
    """
    limits = (("classes", classes, 2, 2**31 - 1), ("size", size, 8, _MAX_SIZE))
    for name, value, low, high in (*limits, ("samples", samples, 2 * classes, 2**31 - 1)):
        if not low <= value <= high:
            raise ShardError(f"synthetic images: {name} {value} is not in [{low}, {high}]")
    labels = np.arange(samples, dtype=np.int64) % classes
    test, validation = _stratified_splits(labels)

    def encode(i: int) -> bytes:
        image = _synthetic_image(i, int(labels[i]), classes, size, seed)
        return _encode(image, "JPEG", quality=_JPEG_QUALITY, subsampling=0)

    return Source(
        name="synthetic",
        image_shape=(3, size, size),
        class_names=tuple(f"class {number}" for number in range(classes)),
        labels=labels,
        test=test,
        validation=validation,
        extension="jpg",
        encode=encode,
        parameters={
            "source": "synthetic",
            "classes": classes,
            "size": size,
            "samples": samples,
            "seed": seed,
        },
    )


def _synthetic_image(
    number: int, label: int, classes: int, size: int, seed: int
) -> npt.NDArray[np.uint8]:
    template = _symmetric(seed, label, _TEMPLATE, 12) * _TEMPLATE_AMPLITUDE
    nuisance = _symmetric(seed, number, _NUISANCE, 14)
    field = template + nuisance[:12] * _NUISANCE_AMPLITUDE
    axis = (np.arange(size) + 0.5) / size
    wave = np.cos(np.pi * axis)
    ones = np.ones(size)
    modes = np.stack(
        [np.outer(a, b) for a, b in ((ones, ones), (wave, ones), (ones, wave), (wave, wave))]
    )
    image = 0.5 + np.einsum("cm,mhw->hwc", field.reshape(3, 4), modes)
    image += _grating(label, classes, size, nuisance[12:])[:, :, None]
    noise = _symmetric(seed, number, _NOISE, size * size * 3).reshape(size, size, 3)
    image += noise * _NOISE_AMPLITUDE
    return np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)


def _grating(
    label: int, classes: int, size: int, nuisance: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the grating of a class, shape (size, size), at a random phase and near its angle."""
    wavelengths = max(2, round((classes / 2.5) ** 0.5))
    angles = -(-classes // wavelengths)
    short, long = _WAVELENGTHS
    which, turn = divmod(label, angles)
    wavelength = short * (long / short) ** (which / (wavelengths - 1))
    angle = np.pi * (turn + 0.5 * (which % 2) + 0.25 * nuisance[0]) / angles
    pixels = np.arange(size)
    along = np.add.outer(pixels * np.sin(angle), pixels * np.cos(angle)) / wavelength
    return _GRATING_AMPLITUDE * np.cos(2 * np.pi * along + np.pi * nuisance[1])


def _symmetric(seed: int, stream: int, purpose: int, count: int) -> npt.NDArray[np.float64]:
    """Return `count` uniform numbers in [-1, 1)."""
    words = philox_words(seed, stream, purpose=purpose, count=-(-count // 4))
    return 2 * unit_interval(words.ravel()[:count]) - 1


def _stratified_splits(
    labels: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Flag a fifth of each class as test and a fifth of each class of the rest as validation."""
    test = _hold_out(labels, np.ones(len(labels), dtype=bool), _TEST)
    return test, _hold_out(labels, ~test, _VALIDATION)


def _hold_out(
    labels: npt.NDArray[np.int64], among: npt.NDArray[np.bool_], purpose: int
) -> npt.NDArray[np.bool_]:
    """Flag a fifth of the samples in `among`, rounded up in all.

    Classes get their shares by largest remainder; the members of a class by their random words.
    """
    counts = np.bincount(labels[among])
    quotas = np.floor(counts * _HELD_OUT).astype(int)
    missing = int(np.ceil(counts.sum() * _HELD_OUT)) - quotas.sum()
    remainders = counts * _HELD_OUT - quotas
    quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
    words = philox_words(_SPLIT_SEED, 0, purpose=purpose, count=len(labels))[:, 0]
    held_out = np.zeros(len(labels), dtype=bool)
    for label, quota in enumerate(quotas):
        members = np.flatnonzero(among & (labels == label))
        held_out[members[np.argsort(words[members], kind="stable")[:quota]]] = True
    return held_out


def _encode(pixels: npt.NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
