"""Index shards that another program wrote: `python -m data_shards.index URL --split train=PATTERN`.

The shards stay as they are and where they are. A run that was stopped goes on where it was when the
same command is given again.
"""

import sys
from typing import Annotated

import tyro

from data_shards.command_line.parsing import parse_words
from data_shards.errors import ShardError, exit_on_error
from data_shards.format.external_scan import Layout
from data_shards.format.shard_index import split_counts
from data_shards.storage.store import Store
from data_shards.writing.external_set import IndexOptions, index_external_set
from data_shards.writing.process_pool import usable_cpus
from data_shards.writing.shard_patterns import find_shards
from data_shards.writing.write_report import reported

_SMALL_SET = 256 << 20  # bytes; one process is done before others have started


def _run(
    url: Annotated[str, tyro.conf.Positional],
    split: tyro.conf.UseAppendAction[tuple[str, ...]],
    label: str = "cls",
    image: str = "",
    out: str | None = None,
    test_size: int | None = None,
    hold_out: float | None = None,
    decode: bool = False,
    drop_duplicates: bool = False,
    no_leaks: tyro.conf.FlagCreatePairsOff[bool] = False,
    name: str | None = None,
    workers: int | None = None,
) -> None:
    """Index shards that another program wrote; they are read and never changed.

    Args:
        url: Where the shards lie, any fsspec URL.
        split: train=PATTERN or test=PATTERN, once or more; as train='set-train-{0000..1023}.tar' or
            test='val/*.tar'.
        label: cls (a member with a number or a name), json:FIELD or folder (of the key).
        image: Extension of the image where samples have several, as rgb.png.
        out: Where index and test shards are written; None = beside the shards.
        test_size: Height and width of the network's images. Test images of other sizes are brought
            to it: short side to 256/224 of it, then the centre.
        hold_out: Without test shards: the part of the images, in (0, 1), that becomes the test
            split.
        decode: Decode every image, not its header alone.
        drop_duplicates: Leave out images whose bytes occurred before, of train before test.
        no_leaks: Refuse a set whose train and test images share bytes.
        name: Name of the set; None = that of the folder of the index.
        workers: Processes; None = one per usable CPU, one for small sets.
    """
    options = IndexOptions(
        layout=Layout(label, image),
        test_size=test_size,
        hold_out=hold_out,
        decode=decode,
        drop_duplicates=drop_duplicates,
        no_leaks=no_leaks,
        name=name,
    )
    root = Store(url)
    shards = find_shards(root, split)
    if hold_out is not None and any(shard.split == "test" for shard in shards):
        raise ShardError("--hold-out is for sets without test shards")
    if workers is None:
        size = sum(shard.size for shard in shards)
        workers = usable_cpus() if size > _SMALL_SET else 1
    store = Store(out or url)
    found = index_external_set(root, shards, store, options, workers=workers, progress=True)
    for line in found.notes:
        sys.stdout.write(line + "\n")
    what = "index written" if found.written else "already there, unchanged"
    sys.stdout.write(
        f"{store}: {what}: {split_counts(found.index.header)} samples in "
        f"{len(found.index.shards)} shards, digest {found.index.digest}\n{reported(store)}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the entry; one line on standard error and exit status 1 on a refused request."""
    with exit_on_error("what was read is kept for the next run"):
        parse_words(_run, arguments, prog="python -m data_shards.index")


if __name__ == "__main__":
    main()
