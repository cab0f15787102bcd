"""The digits of scikit-learn."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_shards.sources.base import TEST, VALIDATION, Source, encode_png, hold_out


def digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn ships, 1x8x8, 10 classes.

    Greyscale 1x8x8: value v of 0 to 16 is stored as round(255 v / 16) in an 8-bit PNG. 360 images
    are the test split, 288 of the 1,437 others are validation.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed for writing only

    data = load_digits()
    labels = data.target.astype(np.int64)
    test = hold_out(labels, np.ones(len(labels), dtype=bool), TEST)
    return Source(
        name="digits",
        image_shape=(1, 8, 8),
        class_names=tuple(str(name) for name in data.target_names),
        labels=labels,
        test=test,
        validation=hold_out(labels, ~test, VALIDATION),
        load=functools.partial(_load, np.rint(data.images * (255 / 16)).astype(np.uint8)),
        parameters={"source": "digits"},
    )


def _load(pixels: npt.NDArray[np.uint8], numbers: Sequence[int]) -> list[bytes]:
    return [encode_png(pixels[i]) for i in numbers]
