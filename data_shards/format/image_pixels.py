"""Encoded image bytes to uint8 arrays, for an allow-list of formats.

The content decides the format: ImageNet has a PNG and CMYK files among its `.JPEG` names. Pixels
are taken as stored: EXIF orientation is not applied, as everywhere in the field. Palettes become
RGB, alpha is dropped and CMYK is converted as Pillow does; 16-bit images are refused.
"""

import contextlib
import io
import math
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from data_shards.errors import ShardError
from data_shards.format.crop_box import RATIO, SCALE, Box, Words, random_crop_box
from data_shards.untrusted.limits import UntrustedError, require

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which would warn below that of `_check_size`
_JPEG_COLOURS = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}
# Pillow's mode -> the modes it goes through. RGBA first: a palette may have transparent entries.
_CONVERSIONS = {
    "L": (), "RGB": (), "1": ("L",), "LA": ("L",), "P": ("RGBA", "RGB"), "PA": ("RGBA", "RGB"),
    "RGBA": ("RGB",), "RGBX": ("RGB",), "CMYK": ("RGB",), "YCbCr": ("RGB",),
}  # fmt: skip
_PILLOW_FAILURES = (
    OSError,
    ValueError,
    SyntaxError,
)
# Of rows that are not decoded, and in files of the official sets, which Pillow accepts too.
_LEFT_OVER = re.compile("extraneous bytes before marker")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MARGIN = 8
_SCAN = b"\xff\xda"  # never inside coded pixels; a thumbnail has some of its own
_BASELINE = (0xC0, 0xC1)
_PNG_DEPTH = 24  # place of the bits per channel in a PNG file

_STILL = (b"BM", "BMP"), (b"GIF8", "GIF"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF")
"""First bytes of formats that no shard holds; a source reads their single images."""

Pixels = npt.NDArray[np.uint8]
"""(H, W, C), C = 1 or 3."""


class _Header(NamedTuple):
    height: int
    width: int
    colours: str
    height_place: int | None
    """See `_height_place`."""


def image_format(data: bytes) -> str:
    """Return what the first bytes say: "JPEG", "PNG", "WEBP", or "" for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def still_format(data: bytes) -> str:
    """Return "BMP", "GIF" or "TIFF", which a source reads and no shard holds, or ""."""
    return next((kind for start, kind in _STILL if data.startswith(start)), "")


def decode_still(data: bytes) -> Pixels:
    """Decode a BMP, GIF or TIFF file that holds one image.

    Args:
        data: The encoded image, of a `still_format`.

    Raises:
        ShardError: as in `decode_pixels`, or more than one image: an animation, or pages.
    """
    kind = still_format(data)
    with _opened(data, kind) as image:
        with contextlib.suppress(EOFError):
            image.seek(1)
            raise ShardError(f"{kind} of {len(data)} bytes holds more than one image")
        image.seek(0)
    return _decode_pillow(data, kind)


def decode_pixels(data: bytes, extension: str) -> Pixels:
    """Decode one image.

    Args:
        data: The encoded image.
        extension: One of `EXTENSIONS`; the content may be in the format of another one.

    Returns:
        uint8 (H, W, C): C = 1 for greyscale, 3 for RGB. Grey is never copied to three channels
        here: that would multiply l2 distances.

    Raises:
        ShardError: a format outside the list, damaged bytes, 16 bits per channel, or more pixels
            (of a JPEG: pixels times scans) than the limits.
    """
    kind = _format(data, extension)
    header = _jpeg_header(data) if kind == "JPEG" else None
    if header is None:
        return _decode_pillow(data, kind)
    return _decode_jpeg(data, header, header.height, factor=1)


def decoded_shape(data: bytes, extension: str) -> tuple[int, int, int]:
    """Return the (C, H, W) of an image after decoding all of it.

    Raises:
        ShardError: as in `decode_pixels`.
    """
    height, width, channels = decode_pixels(data, extension).shape
    return channels, height, width


def probe_shape(data: bytes, extension: str) -> tuple[int, int, int]:
    """Return what `decoded_shape` would return, from the header of an image alone.

    Raises:
        ShardError: as in `decode_pixels`, apart from damage behind the header.
    """
    kind = _format(data, extension)
    header = _jpeg_header(data) if kind == "JPEG" else None
    if header is not None:
        return 1 if header.colours == "GRAY" else 3, header.height, header.width
    with _opened(data, kind) as image:
        grey = "L" in (image.mode, *_CONVERSIONS[image.mode])
        return 1 if grey else 3, image.height, image.width


def decode_part(
    data: bytes,
    extension: str,
    size: tuple[int, int],
    words: Words,
    *,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> Pixels:
    """Decode a random part of an image: `random_crop_box`.

    A JPEG is decoded down to the last row of the part alone, and at 1/2, 1/4 or 1/8 of its size
    where the part still has the pixels asked for; edges that fall between reduced pixels are kept
    as fractions.

    Args:
        data: The encoded image.
        extension: One of `EXTENSIONS`; the content may be in the format of another one.
        size: Height and width that the part will be scaled to.
        words: Random words, (4,).
        scale: Smallest and largest part of the area.
        ratio: Smallest and largest width / height.

    Returns:
        uint8 (H, W, C), C = 1 or 3: the part as it is stored, or brought to `size` where it was
        decoded at a smaller size.

    Raises:
        ShardError: as in `decode_pixels`.
    """
    kind = _format(data, extension)
    header = _jpeg_header(data) if kind == "JPEG" else None
    if header is None:
        whole = _decode_pillow(data, kind)
        height, width, _ = whole.shape
        box = random_crop_box(height, width, words, scale=scale, ratio=ratio)
        return whole[box.top : box.bottom, box.left : box.right]
    box = random_crop_box(header.height, header.width, words, scale=scale, ratio=ratio)
    return _decode_jpeg_part(data, header, box, size)


def _format(data: bytes, extension: str) -> str:
    if extension not in EXTENSIONS:
        raise ShardError(f"image extension {extension!r} is not one of {', '.join(EXTENSIONS)}")
    kind = image_format(data)
    if not kind:
        raise ShardError(
            f"damaged .{extension} image of {len(data)} bytes: it begins with {data[:8].hex()!r}, "
            "like no PNG, JPEG or WebP"
        )
    return kind


def _jpeg_header(data: bytes) -> _Header | None:
    """Return what simplejpeg can decode; None for CMYK, YCCK and what else Pillow may know."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in _JPEG_COLOURS:
        return None
    _check_size(width, height)
    place = _height_place(data)
    if place is None:
        _check_scans(data, width, height)
    return _Header(height, width, _JPEG_COLOURS[colours], place)


def _decode_jpeg_part(data: bytes, header: _Header, box: Box, size: tuple[int, int]) -> Pixels:
    fits = min((box.bottom - box.top) // size[0], (box.right - box.left) // size[1])
    factor = next((f for f in (8, 4, 2) if f <= fits), 1)
    # Rows below are never looked at; a margin lets chroma be interpolated as in the whole image.
    pixels = _decode_jpeg(data, header, min(header.height, box.bottom + _MARGIN), factor)
    if factor == 1:
        return pixels[box.top : box.bottom, box.left : box.right]
    return _scaled(pixels, tuple(edge / factor for edge in box), size)


def _scaled(pixels: Pixels, box: tuple[float, ...], size: tuple[int, int]) -> Pixels:
    """Scale the part between fractional edges (top, bottom, left, right), bilinear, antialiased."""
    top, bottom, left, right = box
    rows, columns = pixels.shape[:2]
    up, first = math.floor(top), math.floor(left)
    part = pixels[up : math.ceil(bottom), first : math.ceil(right)]
    image = Image.fromarray(part[:, :, 0] if pixels.shape[2] == 1 else part)
    edges = (left - first, top - up, min(right, columns) - first, min(bottom, rows) - up)
    scaled = np.array(image.resize(size[::-1], Image.Resampling.BILINEAR, box=edges))
    return scaled.reshape(*size, -1)


def _decode_jpeg(data: bytes, header: _Header, rows: int, factor: int) -> Pixels:
    """Decode the first `rows` rows or more, at 1 / factor of the size."""
    place = header.height_place if rows < header.height else None
    source: bytes | bytearray = data
    if place is None:
        rows = header.height
    else:
        source = bytearray(data)
        source[place : place + 2] = struct.pack(">H", rows)
    height, width = -(-rows // factor), -(-header.width // factor)
    pixels = np.empty((height, width, 1 if header.colours == "GRAY" else 3), dtype=np.uint8)
    try:
        simplejpeg.decode_jpeg(
            source, colorspace=header.colours, min_height=height, min_width=width, buffer=pixels
        )
    except ValueError as error:
        # libjpeg went on to the last row. What rots later is found by the digest, not by a decoder.
        if not _LEFT_OVER.search(str(error)):
            raise ShardError(f"damaged JPEG of {len(data)} bytes: {error}") from error
    return pixels


def _height_place(data: bytes) -> int | None:
    """Return where a JPEG states its height; None if its rows are not coded in one single scan."""
    place, height, components = 2, None, 0
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _SCAN[1]:
            return height if data[place + 4] == components else None
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker in _BASELINE:
            height, components = place + 5, data[place + 9]
        elif 0xC0 <= marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):
            return None  # progressive, lossless or arithmetic
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _decode_pillow(data: bytes, kind: str) -> Pixels:
    with _opened(data, kind) as image:
        plain: Image.Image = image
        for mode in _CONVERSIONS[image.mode]:
            plain = plain.convert(mode)
        pixels = np.array(plain)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


@contextlib.contextmanager
def _opened(data: bytes, kind: str) -> Iterator[Image.Image]:
    """Open an image that can be decoded; what Pillow meets later becomes a ShardError, too."""
    if kind == "PNG" and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10":
        raise ShardError(f"PNG of {len(data)} bytes has 16 bits per channel, 8 are possible")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            _check_size(*image.size)
            if kind == "JPEG":
                _check_scans(data, *image.size)
            if image.mode not in _CONVERSIONS:
                raise ShardError(f"{kind} colour mode {image.mode} is not greyscale or RGB")
            yield image
    except ShardError:
        raise
    except _PILLOW_FAILURES as error:
        text = _ADDRESS.sub("", str(error))  # reports are the same every time
        raise ShardError(f"damaged {kind} of {len(data)} bytes: {text}") from error


def _check_size(width: int, height: int) -> None:
    _require(width * height, "image_pixels", f"image of {width} x {height} has")


def _check_scans(data: bytes, width: int, height: int) -> None:
    scans = data.count(_SCAN)
    what = f"JPEG of {width} x {height} in {scans} scans: multiplied"
    _require(width * height * scans, "image_scanned_pixels", what)


def _require(value: int, limit: str, what: str) -> None:
    try:
        require(value, limit, what)
    except UntrustedError as error:
        raise ShardError(str(error)) from error
