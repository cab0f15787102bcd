"""Image files for prediction: found, decoded, and brought to a network's shape only if asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from data_shards.format.decode import decode_image
from data_shards.format.image_pixels import EXTENSIONS
from data_shards.sources.convert import Recipe, image_extension
from data_shards.storage.store import Store
from jobs.evaluation.sample_records import EvaluationError


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


def find_pictures(inputs: list[str]) -> tuple[list[Picture], int]:
    """Image files among files and folders, and how many other files the folders hold.

    Args:
        inputs: paths or URLs; folders are searched with everything below them, in sorted order.

    Raises:
        EvaluationError: an input is not there or is no image by its name, or there is no image.
    """
    found: list[Picture] = []
    others = 0
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
                f"{text} is neither a folder of images nor a .{', .'.join(EXTENSIONS)} file"
            )
        images = [name for name in names if _is_image(name)]
        others += len(names) - len(images)
        found += [Picture(store.url, name) for name in images]
    if not found:
        raise EvaluationError(f"no .{', .'.join(EXTENSIONS)} file among {others} files")
    return found, others


def prepare(data: bytes, shape: tuple[int, int, int], *, resize: bool) -> PreparedImage:
    """Decode one file for a network.

    With `resize` it goes the way of a test set's images (`data_shards.sources.convert`): grey is
    copied to three channels for a colour network, the short side is brought to 256/224 of the
    network's, bilinear and antialiased, and the centre is cut out.

    Args:
        data: the encoded image.
        shape: (C, H, W) of the network.
        resize: allow it. Otherwise pixels reach the network as they are, or not at all.

    Raises:
        ShardError: undecodable.
        EvaluationError: another shape than the network's, and no `resize`; or colour for a network
            of grey images.
    """
    extension = image_extension(data)
    image = decode_image(data, extension)
    channels, height, width = image.shape
    size = f"{width}x{height}x{channels}"
    if tuple(image.shape) == shape:
        return PreparedImage(image, size, None)
    wanted = f"{shape[2]}x{shape[1]}x{shape[0]}"
    if channels > shape[0]:
        raise EvaluationError(f"the image is {size}, in colour; the network takes grey ones only")
    if not resize:
        raise EvaluationError(
            f"the image is {size}, the network takes {wanted} (width x height x channels): "
            "resizing or copying channels changes what a radius means; --resize does it and says so"
        )
    uniform = (height, width) == shape[1:]
    if not uniform and shape[1] != shape[2]:
        raise EvaluationError(f"the image is {size}; only square networks have a resize rule")
    recipe = Recipe(channels=shape[0], size=shape[1], uniform=uniform)
    pixels = decode_image(recipe(data, test=True), "png")
    return PreparedImage(pixels, size, _words(size, wanted, recipe, min(height, width), channels))


def _words(size: str, wanted: str, recipe: Recipe, short: int, channels: int) -> str:
    steps = []
    if channels != recipe.channels:
        steps.append(f"grey copied to {recipe.channels} channels")
    route = recipe.parameters()["test_route"]
    if not recipe.uniform:
        verb = "enlarged" if int(route["resize"].split()[-1]) > short else "resized"
        steps.append(f"{verb} to {route['resize']}, {route['filter']}, {route['crop']} cut out")
    return f"{size} to {wanted}: {'; '.join(steps)}; the radius is of its pixels"


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _below(store: Store, prefix: str) -> Iterator[str]:
    """Names of all files below a folder, sorted."""
    for name, size in sorted(store.sizes(prefix).items()):
        below = list(_below(store, name)) if size == 0 and not _is_image(name) else []
        if below:
            yield from below
        elif size or _is_image(name):
            yield name
