"""ImageNet-1k (ILSVRC 2012) from the official archives.

The train archive is a tar of one tar per class. Its headers are read once, by class side by side;
after that every image is a range of bytes of the one file. Nothing is unpacked to disk.
"""

import concurrent.futures
import dataclasses
import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from data_shards.errors import ShardError
from data_shards.format.tar import Member, walk
from data_shards.sources.archive import Members, open_file, require
from data_shards.sources.base import VALIDATION, Source, hold_out
from data_shards.sources.imagenet_devkit import DEVKIT, Devkit, read_devkit
from data_shards.sources.transcode import Recipe
from data_shards.storage.store import Store
from data_shards.untrusted.terminal import PlainConsole

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
_SCANS = 16  # classes scanned side by side; on a remote store each holds a few blocks of 4 MiB
_VAL_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_([0-9]{8})\.JPEG")


@dataclasses.dataclass(frozen=True)
class _Scan:
    """Images of one archive, by name."""

    names: npt.NDArray[np.bytes_]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    other: int

    def __len__(self) -> int:
        return len(self.names)


def imagenet(
    source: str, recipe: Recipe, *, advance: Callable[[int], None] = lambda classes: None
) -> Source:
    """Return ImageNet-1k; classes are numbered in the sorted order of their WordNet ids.

    Train images are those of the train archive; the val images are the test split.

    Args:
        source: Folder of `ILSVRC2012_img_train.tar`, `ILSVRC2012_img_val.tar` and
            `ILSVRC2012_devkit_t12.tar.gz`, a path or any fsspec URL.
        recipe: How images are stored.
        advance: Called as classes have been scanned.

    Raises:
        ShardError: an archive is missing, damaged, or does not hold what the devkit states.
    """
    store = Store(source)
    require(store, TRAIN, VAL, DEVKIT)
    devkit = read_devkit(store)
    val = _scan_val(store, devkit)
    train = _scan_train(store, devkit, advance)
    count = sum(map(len, train))
    labels = np.concatenate(
        [np.repeat(np.arange(len(train)), [len(scan) for scan in train]), devkit.val_labels]
    )
    test = np.arange(len(labels)) >= count
    scans = [*train, val]
    sizes = np.concatenate([scan.size for scan in scans])
    offsets = np.concatenate([scan.offset for scan in scans])
    return Source(
        name="imagenet-1k",
        image_shape=(recipe.channels, recipe.size, recipe.size),
        class_names=tuple(
            f"{wnid} {words}" for wnid, words in zip(devkit.wnids, devkit.words, strict=True)
        ),
        labels=labels,
        test=test,
        validation=hold_out(labels, ~test, VALIDATION),
        load=Members(store, (TRAIN, VAL), test.astype(np.int64), offsets, sizes),
        convert=recipe,
        uniform=recipe.uniform,
        parameters={"source": "imagenet", **recipe.parameters()},
        sizes=sizes,
        names=np.concatenate([scan.names for scan in scans]),
        other_files=sum(scan.other for scan in scans),
    )


def imagenet_set(
    source: str, test_size: int = 224, long_side: int | None = None, jpeg_quality: int = 90
) -> Source:
    """ImageNet-1k from the official archives; the val images are the test split.

    Shows on standard error how many classes have been scanned.

    Args:
        source: Folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
            ILSVRC2012_devkit_t12.tar.gz.
        test_size: Test images are stored at this height and width, losslessly: short side to
            256/224 of it, then the centre.
        long_side: Reduce train images with a longer side to it; None = keep all bytes.
        jpeg_quality: Of reduced train images.

    Raises:
        ShardError: see `imagenet`.
    """
    recipe = Recipe(channels=3, size=test_size, long_side=long_side, quality=jpeg_quality)
    with Progress(console=PlainConsole(stderr=True)) as progress:
        task = progress.add_task("reading the headers of the archives", total=None)
        found = imagenet(source, recipe, advance=lambda n: progress.update(task, advance=n))
        progress.update(task, total=1, completed=1)
    return found


def _scan_train(store: Store, devkit: Devkit, advance: Callable[[int], None]) -> list[_Scan]:
    where = f"{store}/{TRAIN}"
    with open_file(store, TRAIN) as file:
        found = {m.name: m for m in walk(file, 0, store.size(TRAIN), where) if m.kind is None}
    wanted = [f"{wnid}.tar" for wnid in devkit.wnids]
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))
        raise ShardError(
            f"{where}: {len(found)} members, the devkit has {len(wanted)} classes; "
            f"differing: {', '.join(odd[:5])}"
        )
    scans = []
    executor = concurrent.futures.ThreadPoolExecutor(_SCANS)
    try:
        parts = executor.map(lambda name: _scan_class(store, found[name]), wanted)
        for name, expected, scan in zip(wanted, devkit.train_images, parts, strict=True):
            if len(scan) != expected:
                raise ShardError(
                    f"{where}: {name} has {len(scan)} images, the devkit states {expected}"
                )
            scans.append(scan)
            advance(1)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return scans


def _scan_class(store: Store, archive: Member) -> _Scan:
    where = f"{store}/{TRAIN}/{archive.name}"
    with open_file(store, TRAIN) as file:
        members = list(walk(file, archive.offset, archive.offset + archive.size, where))
    prefix = archive.name.removesuffix(".tar") + "_"
    return _scan(members, lambda name: name.startswith(prefix) and name.endswith(".JPEG"), where)


def _scan_val(store: Store, devkit: Devkit) -> _Scan:
    where = f"{store}/{VAL}"
    with open_file(store, VAL) as file:
        members = list(walk(file, 0, store.size(VAL), where))
    scan = _scan(members, lambda name: _VAL_NAME.fullmatch(name) is not None, where)
    numbers = [int(name[-len("00000000.JPEG") :][:8]) for name in scan.names.tolist()]
    if numbers != list(range(1, len(devkit.val_labels) + 1)):
        raise ShardError(
            f"{where}: {len(numbers)} val images, the ground truth has {len(devkit.val_labels)} "
            "labels, for the numbers from 1 on"
        )
    return scan


def _scan(members: list[Member], is_image: Callable[[str], bool], where: str) -> _Scan:
    images = sorted((m for m in members if m.kind is None and is_image(m.name)),
                    key=lambda member: member.name)  # fmt: skip
    names = [member.name for member in images]
    if len(set(names)) != len(names):
        raise ShardError(f"{where}: {len(names) - len(set(names))} names occur more than once")
    return _Scan(
        np.array([name.encode() for name in names], dtype=np.bytes_),
        np.array([member.offset for member in images], dtype=np.int64),
        np.array([member.size for member in images], dtype=np.int64),
        len(members) - len(images),
    )
