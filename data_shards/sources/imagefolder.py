"""A tree `root/train/CLASS/*`, `root/val/CLASS/*` (or `test`) of image files."""

import concurrent.futures

import numpy as np

from data_shards.errors import ShardError
from data_shards.sources.archive import Members
from data_shards.sources.base import VALIDATION, Source, hold_out
from data_shards.sources.convert import Recipe
from data_shards.storage.store import Store
from untrusted.limits import UntrustedError, require

_TRAIN = "train"
_TEST = ("val", "test")
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
_LISTINGS = 16  # in flight


def imagefolder(source: str, recipe: Recipe, *, name: str | None = None) -> Source:
    """Return the images of a tree; a class is a folder, numbered in the sorted order of names.

    Args:
        source: Root of the tree, a path or any fsspec URL. The test split is `val` or, where there
            is none, `test`.
        recipe: How images are stored.
        name: Name of the set; None = name of the root.

    Raises:
        ShardError: another layout, classes that differ between the parts, or one without images.
    """
    store = Store(source)
    folders = {entry.rpartition("/")[2] for entry in store.ls()}
    second = next((part for part in _TEST if part in folders), None)
    if _TRAIN not in folders or second is None:
        raise ShardError(f"{store} has no folders {_TRAIN}/ and {_TEST[0]}/ or {_TEST[1]}/")
    classes = {part: _names(store, part) for part in (_TRAIN, second)}
    if classes[_TRAIN] != classes[second]:
        odd = ", ".join(sorted(set(classes[_TRAIN]) ^ set(classes[second]))[:5])
        raise ShardError(f"{store}: classes of {_TRAIN}/ and {second}/ differ: {odd}")
    places = [
        (part, label, f"{part}/{folder}")
        for part in (_TRAIN, second)
        for label, folder in enumerate(classes[part])
    ]
    with concurrent.futures.ThreadPoolExecutor(_LISTINGS) as executor:
        listings = list(executor.map(store.sizes, [place[2] for place in places]))
    files: list[str] = []
    labels, test, sizes = [], [], []
    for (part, label, folder), listing in zip(places, listings, strict=True):
        images = sorted(file for file in listing if file.lower().endswith(_EXTENSIONS))
        if not images:
            raise ShardError(f"{store}/{folder} has no images ({', '.join(_EXTENSIONS)})")
        try:
            for file in images:
                require(listing[file], "image_bytes", f"{store}/{file} has")
        except UntrustedError as error:
            raise ShardError(str(error)) from error
        files += images
        labels += [label] * len(images)
        test += [part != _TRAIN] * len(images)
        sizes += [listing[file] for file in images]
    numbers = np.arange(len(files))
    held = np.array(test)
    return Source(
        name=name or str(store).rpartition("/")[2],
        image_shape=(recipe.channels, recipe.size, recipe.size),
        class_names=tuple(classes[_TRAIN]),
        labels=np.array(labels, dtype=np.int64),
        test=held,
        validation=hold_out(np.array(labels, dtype=np.int64), ~held, VALIDATION),
        load=Members(store, tuple(files), numbers, np.zeros_like(numbers), np.array(sizes)),
        convert=recipe,
        uniform=recipe.uniform,
        parameters={"source": "imagefolder", **recipe.parameters()},
        sizes=np.array(sizes, dtype=np.int64),
        names=np.array([file.encode() for file in files], dtype=np.bytes_),
        other_files=sum(map(len, listings)) - len(files),
    )


def imagefolder_set(
    source: str,
    test_size: int = 224,
    long_side: int | None = None,
    jpeg_quality: int = 90,
    channels: int = 3,
    uniform: bool = False,
    name: str | None = None,
) -> Source:
    """A tree train/CLASS/*, val/CLASS/* (or test/CLASS/*) of JPEG, PNG and WebP files.

    Args:
        source: Root of the tree.
        test_size: Test images are stored at this height and width, losslessly: short side to
            256/224 of it, then the centre.
        long_side: Reduce train images with a longer side to it; None = keep all bytes.
        jpeg_quality: Of reduced train images.
        channels: 3 = colour (grey images become RGB), 1 = grey.
        uniform: All images have height and width --test-size already; nothing is resized.
        name: Name of the set; None = that of the root.

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
    return imagefolder(source, recipe, name=name)


def _names(store: Store, part: str) -> list[str]:
    names = [entry.rpartition("/")[2] for entry, size in store.sizes(part).items() if size == 0]
    return sorted(name for name in names if not name.startswith("."))
