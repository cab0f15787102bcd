"""The part of an image that a random-resized crop takes: a function of its random words."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.rng import philox_words, unit_interval

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
_TRIES = 10

Words = npt.NDArray[np.uint64]
"""Random 64-bit words."""


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of an image."""

    top: int
    bottom: int
    left: int
    right: int


def random_crop_box(
    height: int,
    width: int,
    words: Words,
    *,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> Box:
    """Draw the part of an image that a random-resized crop takes (Szegedy et al. 2014, the rule).

    The area is uniform in `scale`, the logarithm of width / height uniform in `ratio`, the place
    uniform. What does not fit is drawn again, ten times in all; then it is the largest part in the
    centre with an allowed width / height.

    Args:
        height: Rows of the image.
        width: Columns of the image.
        words: Random words, (4,).
        scale: Smallest and largest part of the area, in (0, 1].
        ratio: Smallest and largest width / height.

    Raises:
        ShardError: not such ranges.
    """
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ShardError(f"a crop of scale {scale} in (0, 1] and ratio {ratio} > 0 is not possible")
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for part, shape, down, across in _tries(words):
        area = height * width * (scale[0] + part * (scale[1] - scale[0]))
        aspect = math.exp(low + shape * (high - low))
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
            return Box(top, top + rows, left, left + columns)
    rows, columns = height, width
    if width < ratio[0] * height:
        rows = max(1, min(height, round(width / ratio[0])))
    elif width > ratio[1] * height:
        columns = max(1, min(width, round(height * ratio[1])))
    top, left = (height - rows) // 2, (width - columns) // 2
    return Box(top, top + rows, left, left + columns)


def _tries(words: Words) -> Iterator[list[float]]:
    """Yield four uniform numbers per try; the words themselves are enough for most images."""
    yield unit_interval(words[:4]).tolist()
    more = philox_words(int(words[0]), int(words[1]), purpose=0, count=_TRIES - 1)
    yield from unit_interval(more).tolist()
