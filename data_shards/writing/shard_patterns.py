"""Which shards a pattern such as `train-{0000..1023}.tar` or `train/*.tar` means."""

import dataclasses
import fnmatch
import re
from collections.abc import Sequence
from itertools import islice

import braceexpand

from data_shards.errors import ShardError
from data_shards.storage.store import Store
from data_shards.writing.shard_plan import StoredSplit

_PACKED = re.compile(r".*\.(tar\.(gz|zst|bz2|xz|lz4)|tgz|tzst|tbz2?|txz)")
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"),
          (b"\xfd7zXZ", "xz"))  # fmt: skip
_MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class ExternalShard:
    """A shard of another program."""

    split: StoredSplit
    name: str
    """Relative to the root."""
    size: int


def find_shards(root: Store, splits: Sequence[str]) -> list[ExternalShard]:
    """Return the shards that patterns mean, train first, each split in the order of its patterns.

    Args:
        root: Where they lie.
        splits: Texts "train=PATTERN" or "test=PATTERN"; braces are expanded, `*` and `?` match
            names inside one folder.

    Raises:
        ShardError: a pattern of another form or without shards, one that is absent, compressed or
            of both splits.
    """
    found: dict[str, ExternalShard] = {}
    patterns = [_parse(text) for text in splits]
    if not any(split == "train" for split, _ in patterns):
        raise ShardError("no train shards: give --split train=PATTERN")
    for split, pattern in sorted(patterns, key=lambda p: p[0] != "train"):
        absent = []
        expanded = _expand(pattern)
        plain = root.sizes_of([name for name in expanded if not _is_glob(name)])
        for name in expanded:
            sizes = _matches(root, name) if _is_glob(name) else plain
            names = sorted(sizes) if _is_glob(name) else [name] if name in plain else []
            if not names:
                absent.append(name)
            for shard in names:
                if found.get(shard, ExternalShard(split, shard, 0)).split != split:
                    raise ShardError(f"{root}/{shard} is of train and of test")
                found[shard] = ExternalShard(split, shard, sizes[shard])
        if absent:
            raise ShardError(
                f"{root}: {len(absent)} shards of {split}={pattern} are absent: "
                f"{', '.join(absent[:_LISTED])}"
            )
    _refuse_packed(root, list(found))
    return list(found.values())


def _parse(text: str) -> tuple[StoredSplit, str]:
    split, equals, pattern = text.partition("=")
    if split not in ("train", "test") or not equals or not pattern:
        raise ShardError(f"split {text!r} is not train=PATTERN or test=PATTERN")
    return "train" if split == "train" else "test", pattern.removeprefix("./")


def _is_glob(name: str) -> bool:
    return any(sign in name.rpartition("/")[2] for sign in "*?[")


def _matches(root: Store, pattern: str) -> dict[str, int]:
    listed = root.sizes(pattern.rpartition("/")[0]).items()
    kept = {name: size for name, size in listed if fnmatch.fnmatchcase(name, pattern)}
    return {n: size for n, size in kept.items() if n.endswith(".tar") or _PACKED.fullmatch(n)}


def _expand(pattern: str) -> list[str]:
    counts = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern)]
    too_many = f"pattern {pattern!r} means more than {_MAX_SHARDS} shards"
    if max(counts, default=1) > _MAX_SHARDS:  # each range is written out first
        raise ShardError(too_many)
    try:
        found = list(islice(braceexpand.braceexpand(pattern), _MAX_SHARDS + 1))
    except ValueError as error:
        raise ShardError(f"pattern {pattern!r}: {error}") from error
    if len(found) > _MAX_SHARDS:
        raise ShardError(too_many)
    return found


def _refuse_packed(root: Store, names: Sequence[str]) -> None:
    """A packed tar has no offsets to read samples from."""
    packed = [name for name in names if _PACKED.fullmatch(name)]
    kind = "compressed"
    if not packed:
        head = root.read_range(names[0], 0, 8)
        kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")
        packed = [names[0]] if kind else []
    if packed:
        raise ShardError(
            f"{root}/{packed[0]} is {kind} ({len(packed)} of {len(names)} shards by name): samples "
            "are read by their place in the tar, which a compressed one does not have. Unpack to "
            "plain .tar first (gunzip, unzstd); images are compressed already"
        )
    other = [name for name in names if not name.endswith(".tar")]
    if other:
        raise ShardError(f"{root}/{other[0]} is not named .tar")
