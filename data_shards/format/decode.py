"""Encoded image bytes to uint8 tensors: what streams, evaluations and predictions see.

What writes and checks shards uses `image_pixels` alone and needs no torch.
"""

import torch
from torch import Tensor

from data_shards.errors import ShardError
from data_shards.format.crop_box import RATIO, SCALE, Words
from data_shards.format.image_pixels import decode_part, decode_pixels


def decode_image(data: bytes, extension: str) -> Tensor:
    """Return `decode_pixels` as a uint8 tensor (C, H, W).

    Raises:
        ShardError: as there.
    """
    return torch.from_numpy(decode_pixels(data, extension)).permute(2, 0, 1).contiguous()


def decode_crop(
    data: bytes,
    extension: str,
    size: tuple[int, int],
    words: Words,
    *,
    channels: int = 3,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> Tensor:
    """Decode a random part of an image (`decode_part`) and scale it to one size, bilinear.

    Scaling is antialiased. Where a JPEG is decoded at a part of its size, the result differs on
    photographs by about one grey level on average from the full route
    (docs/explanation/architecture.md). Only random crops of training come this way.

    Args:
        data: The encoded image.
        extension: One of `EXTENSIONS`; the content may be in the format of another one.
        size: Height and width to return.
        words: Random words, (4,).
        channels: 3: grey becomes RGB with equal channels, for sets of mixed images; 1: colour is
            refused.
        scale: Smallest and largest part of the area.
        ratio: Smallest and largest width / height.

    Returns:
        uint8 (channels, *size), not always contiguous.

    Raises:
        ShardError: as in `decode_part`, or colour where one channel is asked for.
    """
    pixels = decode_part(data, extension, size, words, scale=scale, ratio=ratio)
    found = pixels.shape[2]
    if found != channels and (found, channels) != (1, 3):
        raise ShardError(f"image of {found} channels where {channels} is asked for")
    # Channels last, with the strides of a batch: another layout takes half as long again.
    batch = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]
    return scaled.expand(channels, *size)
