"""Augmentation of a uint8 batch by integer shifts and mirroring.

What happens to a sample depends on its random words alone, which the stream keys by
(seed, epoch, position): the same pixels for any batch size and number of ranks.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


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
