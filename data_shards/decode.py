"""Encoded image bytes to uint8 tensors, for an allow-list of formats."""

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from data_shards.errors import ShardError

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 1 << 25
_PILLOW_FORMATS = {"png": "PNG", "webp": "WEBP"}
_JPEG_COLOURS = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}
_PILLOW_FAILURES = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode_image(data: bytes, extension: str) -> Tensor:
    """Decode one image.

    Args:
        data: The encoded image.
        extension: One of `EXTENSIONS`; it must match the content.

    Returns:
        uint8 tensor (C, H, W): C = 1 for greyscale, 3 for RGB. Grey is never copied to three
        channels: that would multiply l2 distances.

    Raises:
        ShardError: a format outside the list, damaged bytes, another colour mode, or more than
            `MAX_PIXELS` pixels.
    """
    if extension in _PILLOW_FORMATS:
        pixels = _decode_pillow(data, _PILLOW_FORMATS[extension])
    elif extension in EXTENSIONS:
        pixels = _decode_jpeg(data)
    else:
        raise ShardError(f"image extension {extension!r} is not one of {', '.join(EXTENSIONS)}")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _decode_jpeg(data: bytes) -> np.ndarray:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ShardError(f"damaged JPEG of {len(data)} bytes: {error}") from error
    _check_size(width, height)
    if colours not in _JPEG_COLOURS:
        raise ShardError(f"JPEG colours {colours} are not greyscale or RGB")
    try:
        return simplejpeg.decode_jpeg(data, colorspace=_JPEG_COLOURS[colours])
    except ValueError as error:
        raise ShardError(f"damaged JPEG of {len(data)} bytes: {error}") from error


def _decode_pillow(data: bytes, kind: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            _check_size(*image.size)
            if image.mode not in ("L", "RGB"):
                raise ShardError(f"{kind} colour mode {image.mode} is not L or RGB")
            pixels = np.array(image)
    except ShardError:
        raise
    except _PILLOW_FAILURES as error:
        raise ShardError(f"damaged {kind} of {len(data)} bytes: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ShardError(f"image of {width} x {height} pixels is over the limit {MAX_PIXELS}")
