"""Write a shard set: `python -m data_shards.write imagenet --source DIR --out URL`.

Every source is a local path or any fsspec URL. A run that was stopped goes on where it was when the
same command is given again.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress

from data_shards.config import MIB
from data_shards.errors import ShardError
from data_shards.format.index import HEADER_FILE
from data_shards.sources import (
    Source,
    cifar10,
    cifar100,
    digits,
    imagefolder,
    imagenet,
    mnist,
    synthetic,
    tiny_imagenet,
)
from data_shards.sources.convert import Recipe
from data_shards.storage.store import Store
from data_shards.writing.process_pool import usable_cpus
from data_shards.writing.shard_plan import WriteOptions
from data_shards.writing.write_report import REPORT_FILE, summary
from data_shards.writing.writer import write_shard_set

__all__ = ["main", "write_shard_set"]

_INTERRUPTED = 130
_SMALL_SET = 20_000  # images; one process is done before others have started


@dataclasses.dataclass(frozen=True)
class Output:
    """Where and how a set is written."""

    out: str
    """Directory of the set, any fsspec URL."""
    samples_per_shard: int | None = None
    """Most samples in one shard; None = as many as fit --shard-mib."""
    shard_mib: int = 256
    """Largest target size of a shard in MiB; small sets have smaller shards."""
    drop_duplicates: bool = False
    """Leave out images whose bytes occurred before (reads the source twice)."""
    workers: int | None = None
    """Processes that write; None = one per usable CPU, one for small sets."""


_Flat = Annotated[Output, tyro.conf.arg(name="")]


def _write(source: Source, output: Output) -> None:
    store = Store(output.out)
    there = store.exists(HEADER_FILE)
    options = WriteOptions(
        samples_per_shard=output.samples_per_shard,
        shard_bytes=output.shard_mib * MIB,
        drop_duplicates=output.drop_duplicates,
    )
    workers = output.workers
    if workers is None:
        workers = usable_cpus() if len(source.labels) > _SMALL_SET else 1
    index = write_shard_set(source, output.out, options=options, workers=workers, progress=True)
    counts = ", ".join(f"{count} {split}" for split, count in index.header.splits.items())
    what = "already there, unchanged" if there else "written"
    sys.stdout.write(
        f"{store}: {what}: {counts} samples in {len(index.shards)} shards, digest {index.digest}\n"
    )
    if store.exists(REPORT_FILE):
        report = json.loads(store.read(REPORT_FILE))
        sys.stdout.write(f"{store}/{REPORT_FILE}: {summary(report)}\n")


def _write_imagenet(
    source: str,
    output: _Flat,
    test_size: int = 224,
    long_side: int | None = None,
    jpeg_quality: int = 90,
) -> None:
    """Write ImageNet-1k from the official archives; the val images are the test split.

    Args:
        source: Folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
            ILSVRC2012_devkit_t12.tar.gz.
        output: Where and how.
        test_size: Test images are stored at this height and width, losslessly: short side to
            256/224 of it, then the centre.
        long_side: Reduce train images with a longer side to it; None = keep all bytes.
        jpeg_quality: Of reduced train images.
    """
    recipe = Recipe(channels=3, size=test_size, long_side=long_side, quality=jpeg_quality)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("reading the headers of the archives", total=None)
        found = imagenet(source, recipe, advance=lambda n: progress.update(task, advance=n))
        progress.update(task, total=1, completed=1)
    _write(found, output)


def _write_imagefolder(
    source: str,
    output: _Flat,
    test_size: int = 224,
    long_side: int | None = None,
    jpeg_quality: int = 90,
    channels: int = 3,
    uniform: bool = False,
    name: str | None = None,
) -> None:
    """Write a tree train/CLASS/*, val/CLASS/* (or test/CLASS/*) of JPEG, PNG and WebP files.

    Args:
        source: Root of the tree.
        output: Where and how.
        test_size: Test images are stored at this height and width, losslessly: short side to
            256/224 of it, then the centre.
        long_side: Reduce train images with a longer side to it; None = keep all bytes.
        jpeg_quality: Of reduced train images.
        channels: 3 = colour (grey images become RGB), 1 = grey.
        uniform: All images have height and width --test-size already; nothing is resized.
        name: Name of the set; None = that of the root.
    """
    recipe = Recipe(
        channels=channels,
        size=test_size,
        uniform=uniform,
        long_side=long_side,
        quality=jpeg_quality,
    )
    _write(imagefolder(source, recipe, name=name), output)


def _write_tiny_imagenet(source: str, output: _Flat) -> None:
    """Write Tiny-ImageNet, 3x64x64, 200 classes, from tiny-imagenet-200.zip.

    Args:
        source: The archive or its folder.
        output: Where and how.
    """
    _write(tiny_imagenet(source), output)


def _write_cifar10(source: str, output: _Flat) -> None:
    """Write CIFAR-10, 3x32x32, from cifar-10-binary.tar.gz.

    Args:
        source: The archive or its folder.
        output: Where and how.
    """
    _write(cifar10(source), output)


def _write_cifar100(source: str, output: _Flat) -> None:
    """Write CIFAR-100 with fine labels, 3x32x32, from cifar-100-binary.tar.gz.

    Args:
        source: The archive or its folder.
        output: Where and how.
    """
    _write(cifar100(source), output)


def _write_mnist(source: str, output: _Flat) -> None:
    """Write MNIST, 1x28x28, from the four idx files.

    Args:
        source: Folder of train-images-idx3-ubyte.gz and the three others.
        output: Where and how.
    """
    _write(mnist(source), output)


def _write_digits(output: _Flat) -> None:
    """Write the 1,797 handwritten digits of scikit-learn, 1x8x8, 10 classes.

    Args:
        output: Where and how.
    """
    _write(digits(), output)


def _write_synthetic(
    output: _Flat, classes: int = 10, size: int = 32, samples: int = 2000, seed: int = 0
) -> None:
    """Write procedural RGB images.

    Args:
        output: Where and how.
        classes: Number of classes.
        size: Height and width in pixels.
        samples: Number of images, train and test together.
        seed: Key of all images.
    """
    _write(synthetic(classes=classes, size=size, samples=samples, seed=seed), output)


def main(arguments: list[str] | None = None) -> None:
    """Run the entry; one line on standard error and exit status 1 on a refused request."""
    entries: dict[str, Callable[..., Any]] = {
        "imagenet": _write_imagenet,
        "imagefolder": _write_imagefolder,
        "tiny-imagenet": _write_tiny_imagenet,
        "cifar10": _write_cifar10,
        "cifar100": _write_cifar100,
        "mnist": _write_mnist,
        "digits": _write_digits,
        "synthetic": _write_synthetic,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(entries, args=arguments, prog="data_shards.write")
    except (ShardError, OSError) as error:  # OSError: a full disk, a store that is not there
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; finished shards are kept for the next run\n")
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
