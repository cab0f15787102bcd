"""A tree `root/train/CLASS/**`, `root/val/CLASS/**` (or `test`), or `root/CLASS/**`, of images."""

import dataclasses
import os
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data_shards.errors import ShardError
from data_shards.sources.archive import Members
from data_shards.sources.base import VALIDATION, Source, hold_out, hold_out_test, printable
from data_shards.sources.folder_tree import EXTENSIONS, FolderTree, Listing, NotTaken
from data_shards.sources.transcode import Recipe
from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError, require

_TRAIN = "train"
_TEST = ("val", "test")
_BESIDE = "a file beside the folders"
_HASHED_AT_ONCE = 64


def imagefolder(
    source: str,
    recipe: Recipe,
    *,
    name: str | None = None,
    held_out: float | None = None,
    follow_links: bool = False,
) -> Source:
    """Return the images of a tree; a class is a folder, numbered in the sorted order of names.

    Images are found at any depth below the folder of their class. Every entry that is not taken is
    named with its cause in `Source.not_taken`.

    Args:
        source: Root of the tree, a path or any fsspec URL. The test split is `val` or, where there
            is none, `test`.
        recipe: How images are stored.
        name: Name of the set; None = name of the root.
        held_out: For a tree `root/CLASS/**`: the part of the different images that becomes the test
            split, of every class alike. Images with the same bytes stay together.
        follow_links: Follow symbolic links that lead out of the root, too.

    Raises:
        ShardError: another layout, classes that differ between the parts, or one without images.
    """
    store = Store(source)
    tree = FolderTree(store, follow_links)
    places, not_taken = _places(tree, split=held_out is None)
    listings = tree.images([place.folder for place in places])
    for place, listing in zip(places, listings, strict=True):
        if not listing.files:
            raise ShardError(_no_images(store, place.folder, listing))
        not_taken += listing.not_taken
    images = [
        (file, size, place)
        for place, listing in zip(places, listings, strict=True)
        for file, size in sorted(listing.files.items())
    ]
    try:
        for file, size, _ in images:
            require(size, "image_bytes", f"{store}/{file} has")
    except UntrustedError as error:
        raise ShardError(str(error)) from error
    files = tuple(file for file, _, _ in images)
    sizes = np.array([size for _, size, _ in images], dtype=np.int64)
    labels = np.array([place.label for _, _, place in images], dtype=np.int64)
    numbers = np.arange(len(files))
    load = Members(store, files, numbers, np.zeros_like(numbers), sizes)
    parameters: dict[str, Any] = {"source": "imagefolder", **recipe.parameters()}
    if held_out is None:
        test = np.array([place.test for _, _, place in images], dtype=bool)
    else:
        test = hold_out_test(labels, _first_of_same_bytes(load), held_out)
        parameters["hold_out"] = held_out
    return Source(
        name=name or str(store).rpartition("/")[2],
        image_shape=(recipe.channels, recipe.size, recipe.size),
        class_names=_class_names(store, places),
        labels=labels,
        test=test,
        validation=hold_out(labels, ~test, VALIDATION),
        load=load,
        convert=recipe,
        uniform=recipe.uniform,
        parameters=parameters,
        sizes=sizes,
        names=np.array([os.fsencode(file) for file in files], dtype=np.bytes_),
        other_files=len(not_taken),
        not_taken=tuple(not_taken),
    )


def imagefolder_set(
    source: str,
    test_size: int = 224,
    long_side: int | None = None,
    jpeg_quality: int = 90,
    channels: int = 3,
    uniform: bool = False,
    name: str | None = None,
    hold_out: float | None = None,
    follow_links: bool = False,
) -> Source:
    """A tree train/CLASS/**, val/CLASS/** (or test/) or CLASS/** of images.

    JPEG, PNG, WebP, and single images of BMP, GIF and TIFF files, which are stored as PNG.

    Args:
        source: Root of the tree.
        test_size: Test images are stored at this height and width, losslessly: short side to
            256/224 of it, then the centre.
        long_side: Reduce train images with a longer side to it; None = keep all bytes.
        jpeg_quality: Of reduced train images.
        channels: 3 = colour (grey images become RGB), 1 = grey.
        uniform: All images have height and width --test-size already; nothing is resized.
        name: Name of the set; None = that of the root.
        hold_out: For a tree without train/ and val/: the part of the images, in (0, 1), that
            becomes the test split.
        follow_links: Follow symbolic links that lead out of the root, too.

    Raises:
        ShardError: see `imagefolder`.
    """
    recipe = Recipe(
        channels=channels,
        size=test_size,
        uniform=uniform,
        long_side=long_side,
        quality=jpeg_quality,
    )
    return imagefolder(source, recipe, name=name, held_out=hold_out, follow_links=follow_links)


@dataclasses.dataclass(frozen=True)
class _Place:
    """The folder of a class in one part of the set."""

    folder: str
    label: int
    test: bool

    @property
    def name(self) -> str:
        return self.folder.rpartition("/")[2]


def _places(tree: FolderTree, *, split: bool) -> tuple[list[_Place], NotTaken]:
    """Return the folders of classes, train first, and what lies beside them."""
    root = tree.listing()
    second = next((part for part in _TEST if part in root.folders), None)
    if not split:
        if _TRAIN in root.folders and second is not None:
            raise ShardError(
                f"{tree.store} has {_TRAIN}/ and {second}/ already: nothing is to be held out"
            )
        if root.folders == [_TRAIN]:
            raise ShardError(f"{tree.store} has {_TRAIN}/ alone: give that folder as the source")
        return _classes(root, test=False), _beside(root)
    if _TRAIN not in root.folders or second is None:
        hint = f"; with {_TRAIN}/ alone, of that folder" if _TRAIN in root.folders else ""
        raise ShardError(
            f"{tree.store} has no folders {_TRAIN}/ and {_TEST[0]}/ or {_TEST[1]}/. A tree of "
            f"CLASS/* is split by --hold-out 0.1{hint}"
        )
    train, test = tree.listing(_TRAIN), tree.listing(second)
    places = _classes(train, test=False), _classes(test, test=True)
    first, other = ([place.name for place in part] for part in places)
    if first != other:
        odd = ", ".join(map(printable, sorted(set(first) ^ set(other))[:5]))
        raise ShardError(f"{tree.store}: classes of {_TRAIN}/ and {second}/ differ: {odd}")
    others = [(name, "not train or test") for name in root.folders if name not in (_TRAIN, second)]
    return places[0] + places[1], [*_beside(root), *others, *_beside(train), *_beside(test)]


def _classes(part: Listing, *, test: bool) -> list[_Place]:
    return [_Place(folder, label, test) for label, folder in enumerate(sorted(part.folders))]


def _beside(part: Listing) -> NotTaken:
    return [*part.not_taken, *((name, _BESIDE) for name in part.files)]


def _no_images(store: Store, folder: str, listing: Listing) -> str:
    causes = Counter(cause for _, cause in listing.not_taken).most_common()
    found = "".join(f"; {count} entries: {cause}" for cause, count in causes)
    return (
        f"{store}/{printable(folder)} has no images ({', '.join(EXTENSIONS)}){found}; a folder of "
        "the source is a class: give it images or remove it"
    )


def _class_names(store: Store, places: list[_Place]) -> tuple[str, ...]:
    names = tuple(printable(place.name) for place in places if not place.test)
    if not names:
        raise ShardError(f"{store} has no folders of classes")
    if len(set(names)) < len(names):
        again = next(name for name, count in Counter(names).items() if count > 1)
        raise ShardError(f"{store}: two folders of classes are called {again!r}")
    return names


def _first_of_same_bytes(images: Members) -> npt.NDArray[np.int64]:
    """Return the number of the first image with the same bytes, of every image.

    Only files of equal size are read.
    """
    _, kind, counts = np.unique(images.size, return_inverse=True, return_counts=True)
    hashed = np.flatnonzero(counts[kind] > 1)
    first = np.arange(len(images.size))
    seen: dict[tuple[int, int], int] = {}
    for begin in range(0, len(hashed), _HASHED_AT_ONCE):
        numbers = hashed[begin : begin + _HASHED_AT_ONCE].tolist()
        for number, data in zip(numbers, images(numbers), strict=True):
            digest = (len(data), xxhash.xxh3_64_intdigest(data))
            first[number] = seen.setdefault(digest, number)
    return first
