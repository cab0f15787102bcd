"""A procedural set of images, of any size and number."""

import functools
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_shards.errors import ShardError
from data_shards.rng import philox_words, unit_interval
from data_shards.sources.base import TEST, VALIDATION, Source, hold_out

# Purposes of random words; the stream half of the key is the number of an image or a class.
_TEMPLATE, _NUISANCE, _NOISE = range(202, 205)

# Amplitudes of the procedural images around grey 0.5, on the scale [0, 1].
_TEMPLATE_AMPLITUDE = 0.055
_NUISANCE_AMPLITUDE = 0.10
_GRATING_AMPLITUDE = 0.13
_NOISE_AMPLITUDE = 0.08
_WAVELENGTHS = (4.5, 9.0)  # pixels, shortest and longest grating
_JPEG_QUALITY = 95
_MAX_SIZE = 4096


def synthetic(*, classes: int = 10, size: int = 32, samples: int = 2000, seed: int = 0) -> Source:
    """Procedural RGB images of two ingredients, both weak.

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
    test = hold_out(labels, np.ones(samples, dtype=bool), TEST)
    return Source(
        name="synthetic",
        image_shape=(3, size, size),
        class_names=tuple(f"class {number}" for number in range(classes)),
        labels=labels,
        test=test,
        validation=hold_out(labels, ~test, VALIDATION),
        load=functools.partial(_load, classes, size, seed),
        parameters={
            "source": "synthetic",
            "classes": classes,
            "size": size,
            "samples": samples,
            "seed": seed,
        },
    )


def _load(classes: int, size: int, seed: int, numbers: Sequence[int]) -> list[bytes]:
    images = (_synthetic_image(i, i % classes, classes, size, seed) for i in numbers)
    return [_encode_jpeg(image) for image in images]


def _encode_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


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
