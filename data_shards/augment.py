"""Random parts of images, integer shifts and mirroring.

What happens to a sample depends on its random words alone, which the stream keys by
(seed, epoch, position): the same pixels for any batch size and number of ranks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_shards.errors import ShardError
from data_shards.philox import philox_words, unit_interval

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
_TRIES = 10


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of an image."""

    top: int
    bottom: int
    left: int
    right: int


def random_crop_box(
    height: int,
    width: int,
    words: npt.NDArray[np.uint64],
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


def _tries(words: npt.NDArray[np.uint64]) -> Iterator[list[float]]:
    """Yield four uniform numbers per try; the words themselves are enough for most images."""
    yield unit_interval(words[:4]).tolist()
    more = philox_words(int(words[0]), int(words[1]), purpose=0, count=_TRIES - 1)
    yield from unit_interval(more).tolist()


def augment_batch(
    images: Tensor, words: npt.NDArray[np.uint64], *, shift_pixels: int, flip: bool
) -> Tensor:
    """Translate each image by up to `shift_pixels` per direction and mirror half of them.

    Args:
        images: uint8 (B, C, H, W).
        words: Random words (B, 4): vertical shift, horizontal shift, mirror, spare.
        shift_pixels: Largest shift in pixels; zeros move in. 0 = none.
        flip: Mirror left to right where the lowest bit of the third word is set.

    Returns:
        uint8 (B, C, H, W); the input itself when both are off.
    """
    if not shift_pixels and not flip:
        return images
    batch, channels, height, width = images.shape
    choices = np.uint64(2 * shift_pixels + 1)
    # A source coordinate in the padded image: padding + own coordinate - shift.
    offsets = torch.from_numpy((words[:, :2] % choices).astype(np.int64))
    columns = torch.arange(width).expand(batch, width)
    if flip:
        mirrored = torch.from_numpy((words[:, 2] & np.uint64(1)).astype(bool))
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = torch.arange(height)[None, :] + offsets[:, :1]
    columns = columns + offsets[:, 1:]
    padded = torch.nn.functional.pad(images, (shift_pixels,) * 4)
    return padded[
        torch.arange(batch)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
