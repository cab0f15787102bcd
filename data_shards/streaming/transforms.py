"""Random changes of images: integer shifts, mirroring and RandAugment (arXiv 1909.13719).

What happens to a sample depends on its random words alone, which the stream keys by
(seed, epoch, position): the same pixels for any batch size and number of ranks.

RandAugment: the fourteen operations, their ranges and the 31 steps of magnitude are those that
training code of the field uses; every operation is Pillow's, on uint8. Nothing else is drawn: an
operation that can go two ways takes its direction from the same word.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from data_shards.errors import ShardError
from data_shards.format.crop_box import Words

OPERATIONS = 2
MAGNITUDE = 9
MAX_MAGNITUDE = 30
# Shares of the width or height; the paper's 150 pixels of an image of 331.
_TRANSLATION = 150 / 331

Operation = Callable[[Image.Image, float, int], Image.Image]
"""(image, strength in [0, 1], direction +1 or -1) -> image of the same size and mode."""


def randaugment(
    image: Tensor,
    words: npt.NDArray[np.uint64],
    *,
    operations: int = OPERATIONS,
    magnitude: int = MAGNITUDE,
) -> Tensor:
    """Change an image by `operations` operations, drawn with replacement.

    Args:
        image: uint8 (C, H, W), C = 1 or 3.
        words: Random words, one per operation; more are ignored.
        operations: How many are applied, one after another.
        magnitude: How strongly, in [0, 30].

    Returns:
        uint8 (C, H, W). Pixels that move in are black.

    Raises:
        ShardError: too few words, or a magnitude out of range.
    """
    if not 0 <= operations <= len(words):
        raise ShardError(f"{operations} operations need as many random words, not {len(words)}")
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ShardError(f"magnitude {magnitude} is not in [0, {MAX_MAGNITUDE}]")
    grey = image.shape[0] == 1
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    for word in words[:operations].tolist():
        name = _NAMES[(word >> 32) % len(_NAMES)]
        picture = apply(picture, name, magnitude, direction=1 - 2 * (word & 1))
    changed = torch.from_numpy(np.array(picture))
    return changed[None] if grey else changed.permute(2, 0, 1)


def apply(image: Image.Image, name: str, magnitude: int, direction: int) -> Image.Image:
    """Apply one named operation; `direction` is +1 or -1."""
    return _OPERATIONS[name](image, magnitude / MAX_MAGNITUDE, direction)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Take every pixel from where the matrix [[a, b, c], [d, e, f]] leads, the nearest one."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _shear_x(image: Image.Image, strength: float, direction: int) -> Image.Image:
    return _affine(image, 1, direction * 0.3 * strength, 0, 0, 1, 0)


def _shear_y(image: Image.Image, strength: float, direction: int) -> Image.Image:
    return _affine(image, 1, 0, 0, direction * 0.3 * strength, 1, 0)


def _translate_x(image: Image.Image, strength: float, direction: int) -> Image.Image:
    return _affine(image, 1, 0, -direction * int(_TRANSLATION * image.width * strength), 0, 1, 0)


def _translate_y(image: Image.Image, strength: float, direction: int) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, -direction * int(_TRANSLATION * image.height * strength))


def _rotate(image: Image.Image, strength: float, direction: int) -> Image.Image:
    return image.rotate(direction * 30 * strength, Image.Resampling.NEAREST)


def _posterize(image: Image.Image, strength: float, direction: int) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * strength))


def _solarize(image: Image.Image, strength: float, direction: int) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(255 * (1 - strength)))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def operation(image: Image.Image, strength: float, direction: int) -> Image.Image:
        return kind(image).enhance(1 + direction * 0.9 * strength)

    return operation


_OPERATIONS: dict[str, Operation] = {
    "Identity": lambda image, strength, direction: image,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": lambda image, strength, direction: ImageOps.autocontrast(image),
    "Equalize": lambda image, strength, direction: ImageOps.equalize(image),
}
_NAMES = tuple(_OPERATIONS)


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
