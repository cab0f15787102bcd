"""Random parts of images, integer shifts and mirroring.

What happens to a sample depends on its random words alone, which the stream keys by
(seed, epoch, position): the same pixels for any batch size and number of ranks.
"""

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


def place(
    slot: npt.NDArray[np.uint8],
    image: npt.NDArray[np.uint8],
    words: Words,
    *,
    shift_pixels: int,
    flip: bool,
) -> None:
    """Copy an image into its slot of a batch, translated and mirrored as its random words say.

    Args:
        slot: Overwritten, (C, H, W).
        image: (C, H, W).
        words: Random words (4,): vertical shift, horizontal shift, mirror, spare.
        shift_pixels: Largest shift per direction in pixels; zeros move in. 0 = none.
        flip: Mirror left to right, after the shift, where the lowest bit of the third word is set.
    """
    # NumPy, not torch: a copy of torch would start threads of its own in every thread that decodes.
    if flip and int(words[2]) & 1:
        slot = slot[:, :, ::-1]
    if not shift_pixels:
        slot[:] = image
        return
    down, right = (int(word) % (2 * shift_pixels + 1) - shift_pixels for word in words[:2])
    slot[:] = 0
    to_rows, rows = _overlap(down, image.shape[1])
    to_columns, columns = _overlap(right, image.shape[2])
    slot[:, to_rows, to_columns] = image[:, rows, columns]


def _overlap(offset: int, size: int) -> tuple[slice, slice]:
    """Return the places i of [0, size) that have i + offset in it too, and those places."""
    low = min(size, max(0, -offset))
    high = max(low, size - max(0, offset))
    return slice(low, high), slice(low + offset, high + offset)
