"""Image files for prediction: found, decoded, and brought to a network's shape only if asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from data_shards.format.decode import decode_image
from data_shards.sources.base import encode_png
from data_shards.sources.transcode import FILE_EXTENSIONS, Recipe, image_extension, readable
from data_shards.storage.store import Store
from jobs.errors import EvaluationError


class Picture(NamedTuple):
    """One file."""

    folder: str
    """URL of its folder."""
    name: str
    """Name in the folder, with `/`."""

    @property
    def path(self) -> str:
        """Where it lies, as a person writes it."""
        store = Store(self.folder)
        return str(store.local_path() or store) + f"/{self.name}"


class PreparedImage(NamedTuple):
    """An image as the network sees it."""

    pixels: Tensor
    """uint8 (C, H, W)."""
    size: str
    """Width, height and channels of the file."""
    resize: str | None
    """What was done to the pixels before the network, in words; None: nothing."""


def find_pictures(inputs: list[str]) -> tuple[list[Picture], list[str]]:
    """Image files among files and folders, and the paths of the other files in the folders.

    Args:
        inputs: paths or URLs; folders are searched with everything below them, in sorted order.

    Raises:
        EvaluationError: an input is not there or is no image by its name, or there is no image.
    """
    found: list[Picture] = []
    others: list[str] = []
    for text in inputs:
        if _is_image(text):
            url = str(text)
            folder, _, name = url.rpartition("/")
            picture = Picture(folder or ".", name)
            if not Store(picture.folder).exists(name):
                raise EvaluationError(f"there is no file {text}")
            found.append(picture)
            continue
        store = Store(text)
        names = list(_below(store, ""))
        if not names:
            raise EvaluationError(
                f"{text} is neither a folder of images nor a .{', .'.join(FILE_EXTENSIONS)} file"
            )
        images = [name for name in names if _is_image(name)]
        others += [Picture(store.url, name).path for name in names if not _is_image(name)]
        found += [Picture(store.url, name) for name in images]
    if not found:
        raise EvaluationError(
            f"no .{', .'.join(FILE_EXTENSIONS)} file among {len(others)} files; the first is "
            f"{others[0]}"
        )
    return found, others


def prepare(data: bytes, shape: tuple[int, int, int], *, resize: bool) -> PreparedImage:
    """Decode one file for a network.

    With `resize` it goes the way of a test set's images (`data_shards.sources.transcode`): grey is
    copied to three channels for a colour network, of three equal channels a grey network gets one,
    the short side is brought to 256/224 of the network's, bilinear and antialiased, and the centre
    is cut out.

    Args:
        data: the encoded image.
        shape: (C, H, W) of the network.
        resize: allow it. Otherwise pixels reach the network as they are, or not at all.

    Raises:
        ShardError: undecodable.
        EvaluationError: another shape than the network's, and no `resize`; or colour for a network
            of grey images.
    """
    data = readable(data)
    image = decode_image(data, image_extension(data))
    channels, height, width = image.shape
    size = f"{width}x{height}x{channels}"
    if tuple(image.shape) == shape:
        return PreparedImage(image, size, None)
    wanted = f"{shape[2]}x{shape[1]}x{shape[0]}"
    if channels > shape[0] and not bool((image == image[:1]).all()):
        raise EvaluationError(f"the image is {size}, in colour; the network takes grey ones only")
    if not resize:
        raise EvaluationError(
            f"the image is {size}, the network takes {wanted} (width x height x channels): "
            "resizing, copying or dropping channels changes what a radius means; --resize does it "
            "and says so"
        )
    if channels > shape[0]:
        data = encode_png(image[0].numpy())
    uniform = (height, width) == shape[1:]
    if not uniform and shape[1] != shape[2]:
        raise EvaluationError(f"the image is {size}; only square networks have a resize rule")
    recipe = Recipe(channels=shape[0], size=shape[1], uniform=uniform)
    pixels = decode_image(recipe(data, test=True), "png")
    return PreparedImage(pixels, size, _words(size, wanted, recipe, min(height, width), channels))


def _words(size: str, wanted: str, recipe: Recipe, short: int, channels: int) -> str:
    steps = []
    if channels < recipe.channels:
        steps.append(f"grey copied to {recipe.channels} channels")
    elif channels > recipe.channels:
        steps.append(f"one of {channels} equal channels taken")
    route = recipe.parameters()["test_route"]
    if not recipe.uniform:
        verb = "enlarged" if int(route["resize"].split()[-1]) > short else "resized"
        steps.append(f"{verb} to {route['resize']}, {route['filter']}, {route['crop']} cut out")
    return f"{size} to {wanted}: {'; '.join(steps)}; the radius is of its pixels"


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in FILE_EXTENSIONS


def _below(store: Store, prefix: str) -> Iterator[str]:
    """Names of all files below a folder, sorted."""
    for name, size in sorted(store.sizes(prefix).items()):
        below = list(_below(store, name)) if size == 0 and not _is_image(name) else []
        if below:
            yield from below
        elif size or _is_image(name):
            yield name
