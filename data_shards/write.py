"""Write a shard set: `python -m data_shards.write imagenet --source DIR --out URL`.

Every source is a local path or any fsspec URL. A run that was stopped goes on where it was when the
same command is given again.
"""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import tyro

from data_shards.command_line.parsing import parse_subcommand
from data_shards.config import MIB
from data_shards.errors import exit_on_error
from data_shards.format.shard_index import HEADER_FILE, ShardIndex, named_classes, split_counts
from data_shards.sources.base import Source, with_validation
from data_shards.sources.registry import SOURCES
from data_shards.storage.store import Store
from data_shards.untrusted.text import printable
from data_shards.writing.process_pool import usable_cpus
from data_shards.writing.shard_plan import WriteOptions
from data_shards.writing.write_report import REPORT_FILE, reported
from data_shards.writing.writer import write_shard_set

__all__ = ["main", "write_shard_set"]

_NAMED = 3
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
    validation_samples: int | None = None
    """Train images that "validation" holds and "fit" lacks; None = a fifth, at most 10,000."""
    drop_duplicates: bool = False
    """Leave out images whose bytes occurred before (reads the source twice)."""
    no_leaks: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse a source whose train and test images share bytes (reads it twice)."""
    workers: int | None = None
    """Processes that write; None = one per usable CPU, one for small sets."""


# Without a name its flags have no prefix.
_Flat = Annotated[Output, tyro.conf.arg(name="")]


def _write(source: Source, output: Output) -> None:
    if output.validation_samples is not None:
        source = with_validation(source, output.validation_samples)
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
    index = write_shard_set(
        source,
        output.out,
        options=options,
        no_leaks=output.no_leaks,
        workers=workers,
        progress=True,
    )
    what = "already there, unchanged" if there else "written"
    sys.stdout.write(
        f"{store}: {what}: {split_counts(index.header)} samples in {len(index.shards)} shards, "
        f"digest {index.digest}\n"
    )
    for line in _remarks(index):
        sys.stdout.write(f"{store}: {line}\n")
    if store.exists(REPORT_FILE):
        sys.stdout.write(reported(store))


def _remarks(index: ShardIndex) -> Iterator[str]:
    """The size of the stored test images, and classes of which a split has none."""
    if shape := index.stored_shape("test"):
        yield f"test images are stored as {'x'.join(map(str, shape))}"
    names = named_classes(index.header) or tuple(map(str, range(index.header.num_classes)))
    for split in ("train", "test"):
        counts = np.bincount(index.rows.label[index.select(split)], minlength=len(names))
        lacking = [printable(names[label]) for label in np.flatnonzero(counts == 0)]
        if lacking and counts.any():
            more = ", ..." * (len(lacking) > _NAMED)
            yield f"no {split} image in {len(lacking)} classes: {', '.join(lacking[:_NAMED])}{more}"


def _subcommand(make: Callable[..., Source]) -> Callable[..., None]:
    """A function that tyro turns into flags: those of a source, and where and how it is written."""

    def write(*arguments: Any, output: Output, **options: Any) -> None:
        _write(make(*arguments, **options), output)

    # tyro reads flags from the signature, the annotations and the docstring.
    own = inspect.signature(make)
    last = inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, annotation=_Flat)
    write.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*own.parameters.values(), last], return_annotation=None
    )
    hints = typing.get_type_hints(make, include_extras=True)
    write.__annotations__ = {**hints, "output": _Flat, "return": None}
    write.__doc__ = make.__doc__
    return write


def main(arguments: list[str] | None = None) -> None:
    """Run the entry; one line on standard error and exit status 1 on a refused request."""
    entries = {name: _subcommand(make) for name, make in SOURCES.items()}
    with exit_on_error("finished shards are kept for the next run"):
        parse_subcommand(entries, arguments, prog="python -m data_shards.write")


if __name__ == "__main__":
    main()
