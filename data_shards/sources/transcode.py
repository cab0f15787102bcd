"""From the bytes of an archive to the bytes of a shard.

Train images keep their bytes wherever a stream can decode them; BMP, GIF and TIFF become PNG. Test
images are brought to the size of the network once, here, by the rule of the field (short side to
256/224 of the size, bilinear and antialiased, then the centre), and stored losslessly: a
certificate speaks of the stored pixels.
"""

import dataclasses
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_shards.errors import ShardError
from data_shards.format.image_pixels import decode_pixels, decode_still, image_format, still_format
from data_shards.sources.base import encode_png
from data_shards.untrusted.limits import limits

FILE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""Names of image files that a folder is searched for; the content decides what they are."""
_SHORT_SIDE = 256 / 224  # of the size that is cut out
_EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class UndecodableError(ShardError):
    """An image cannot be stored; `cause` is "empty", "format", "decode", "shape" or "channels"."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


def image_extension(data: bytes) -> str:
    """Return the extension that fits the content: jpg, png or webp, whatever the name says.

    Raises:
        UndecodableError: empty, or none of these.
    """
    if not data:
        raise UndecodableError("no bytes", "empty")
    if kind := image_format(data):
        return _EXTENSION_OF[kind]
    raise UndecodableError(
        f"{len(data)} bytes that begin with {data[:8].hex()}: not JPEG, PNG, WebP, BMP, GIF or "
        "TIFF",
        "format",
    )


def readable(data: bytes) -> bytes:
    """Return what a shard may hold: a BMP, GIF or TIFF file of one image as PNG, others unchanged.

    Raises:
        UndecodableError: such a file cannot be decoded, or holds several images.
    """
    if not still_format(data):
        return data
    try:
        return encode_png(_plain(decode_still(data)))
    except ShardError as error:
        raise UndecodableError(str(error), "decode") from error


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the images of a set are stored.

    Args:
        channels: 3: grey images become RGB with equal channels, as the field defines the set;
            1: colour images are refused.
        size: Height and width of the network's images.
        uniform: All images have this size already; nothing is resized.
        long_side: Train images with a longer side are reduced to it and encoded anew; None = never.
        quality: JPEG quality of those.
    """

    channels: int
    size: int
    uniform: bool = False
    long_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        limits = [("size", self.size, 8, 4096), ("JPEG quality", self.quality, 1, 100)]
        if self.long_side is not None:
            limits.append(("long side", self.long_side, self.size, 1 << 16))
        if self.channels not in (1, 3):
            raise ShardError(f"images of {self.channels} channels: 1 or 3 are possible")
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise ShardError(f"{name} {value} is not in [{low}, {high}]")

    def __call__(self, data: bytes, test: bool) -> bytes:
        """Return the bytes to store.

        Raises:
            UndecodableError: the image cannot be decoded or does not fit the set.
        """
        data = readable(data)
        extension = image_extension(data)
        try:
            found = decode_pixels(data, extension)
        except ShardError as error:
            raise UndecodableError(str(error), "decode") from error
        if self.uniform:
            return self._uniform(data, extension, found, test)
        if test:
            return encode_png(_centre(self._channels(found), self.size))
        self._channels(found)
        if self.long_side is None or max(found.shape[:2]) <= self.long_side:
            return data
        return _reduced(found, self.long_side, self.quality)

    def parameters(self) -> dict[str, Any]:
        """Return what was done to the images, for the header."""
        short = "none" if self.uniform else f"short side {round(self.size * _SHORT_SIDE)}"
        train: dict[str, Any] = {"bytes": "kept"}
        if self.long_side is not None:
            train = {"long_side": self.long_side, "filter": "bicubic", "jpeg": self.quality}
        test = {"resize": short, "filter": "bilinear, antialiased", "crop": "centre"}
        return {
            "train_route": train,
            "test_route": {"size": self.size, "format": "png"} | ({} if self.uniform else test),
        }

    def _uniform(
        self, data: bytes, extension: str, found: npt.NDArray[np.uint8], test: bool
    ) -> bytes:
        height, width, channels = found.shape
        if (height, width) != (self.size, self.size):
            raise UndecodableError(
                f"image of {width} x {height} pixels in a set of {self.size} x {self.size}", "shape"
            )
        if channels == self.channels and (extension == "png" or not test):
            return data
        return encode_png(_plain(self._channels(found)))

    def _channels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        channels = pixels.shape[2]
        if channels == 1 and self.channels == 3:
            return pixels.repeat(3, axis=2)
        if channels != self.channels:
            raise UndecodableError(
                f"image of {channels} channels in a set of {self.channels}", "channels"
            )
        return pixels


def _centre(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Resize the short side and cut out the centre; rounding as in torchvision."""
    height, width, _ = pixels.shape
    short = round(size * _SHORT_SIDE)
    long = int(short * max(height, width) / min(height, width))
    if short * long > limits().image_pixels:
        raise UndecodableError(f"image of {width} x {height} pixels is too long to resize", "shape")
    width, height = (short, long) if width <= height else (long, short)
    image = Image.fromarray(_plain(pixels)).resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _reduced(pixels: npt.NDArray[np.uint8], long_side: int, quality: int) -> bytes:
    height, width, _ = pixels.shape
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(_plain(pixels)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _plain(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return (H, W) for one channel: Pillow's form of a grey image."""
    return np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
