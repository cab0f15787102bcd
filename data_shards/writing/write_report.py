"""What a writer left out or found twice: `report.json`, beside the index."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.sources.base import Source, printable
from data_shards.sources.folder_tree import HIDDEN
from data_shards.storage.store import Store
from data_shards.untrusted import text

REPORT_FILE = "report.json"
_LISTED = 1000
_NAMED = 3  # of them in the summary
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
_LISTED_IN_ALL = 10_000
_SAID = 10  # of them in one line
_CAUSES = 100  # that are counted apart: names of members may stand in them


def duplicates_of(
    hashes: npt.NDArray[np.uint64], numbers: npt.NDArray[np.int64], test: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find images whose bytes occurred before, test images first, then by number.

    Args:
        hashes: xxh3_64 of each image's bytes in the archive.
        numbers: Number of each image.
        test: Whether each is of the test split.

    Returns:
        Numbers of the duplicates, ascending, and of the first image with the same bytes.
    """
    order = np.lexsort((numbers, ~test, hashes))
    first = np.ones(len(order), dtype=bool)
    first[1:] = hashes[order][1:] != hashes[order][:-1]
    originals = numbers[order][np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    found, originals = numbers[order][~first], originals[~first]
    by_number = np.argsort(found)
    return found[by_number], originals[by_number]


def report(
    source: Source,
    stored: int,
    left_out: Sequence[tuple[int, str, str]],
    duplicates: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    dropped: bool,
) -> dict[str, Any]:
    """Return the content of `report.json`: counts, and the first 1000 of each kind by name.

    Of the entries of a source that were not taken, those are the first 1000 of each cause, 10,000
    in all. Bytes of a name that are not UTF-8 stand as lone surrogates, as `os.fsdecode` has them.

    Args:
        source: The images.
        stored: Number of stored images.
        left_out: (number, cause, message) of images that cannot be stored.
        duplicates: Numbers of duplicates and of the first image with the same bytes.
        dropped: The duplicates were left out.
    """
    found, originals = duplicates
    pairs = zip(*(array[:_LISTED].tolist() for array in duplicates), strict=True)
    listed = sorted(left_out)[:_LISTED]
    return {
        "images": len(source.labels),
        "stored": stored,
        "undecodable": {
            "count": len(left_out),
            "causes": causes_of(cause for _, cause, _ in left_out),
            "first": [
                {"key": f"{number:08d}", "name": source.name_of(number), "cause": cause,
                 "message": text}
                for number, cause, text in listed
            ],
        },
        "duplicates": {
            "count": len(duplicates[0]),
            "between_splits": int((source.test[originals] & ~source.test[found]).sum()),
            "between_classes": int((source.labels[originals] != source.labels[found]).sum()),
            "dropped": dropped,
            "first": [
                {"key": f"{number:08d}", "name": source.name_of(number),
                 "same_as": source.name_of(original)}
                for number, original in pairs
            ],
        },
        "other_files": source.other_files,
        "not_taken": {
            "causes": causes_of(cause for _, cause in source.not_taken),
            "first": [{"name": name, "cause": cause} for name, cause in _some(source.not_taken)],
        },
    }  # fmt: skip


def causes_of(causes: Iterable[str]) -> dict[str, int]:
    """Return how often each cause occurs, by name; of very many the rare ones together."""
    counts = Counter(causes)
    found = dict(counts.most_common(_CAUSES))
    if rest := counts.total() - sum(found.values()):
        found["other causes"] = rest
    return dict(sorted(found.items()))


def _some(not_taken: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    seen: Counter[str] = Counter()
    listed: list[tuple[str, str]] = []
    for name, cause in not_taken:
        seen[cause] += 1
        if seen[cause] <= _LISTED and len(listed) < _LISTED_IN_ALL:
            listed.append((name, cause))
    return listed


def refuse_leaks(
    source: Source, duplicates: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
) -> None:
    """Check that train and test images share no bytes.

    Args:
        source: The images.
        duplicates: Numbers of duplicates and of the first image with the same bytes.

    Raises:
        ShardError: they do; the message names the first two.
    """
    found, originals = duplicates
    between = np.flatnonzero(source.test[originals] & ~source.test[found])
    if len(between):
        train, test = (source.describe(int(numbers[between[0]])) for numbers in duplicates)
        raise ShardError(
            f"{len(between)} train images have the bytes of test images, the first is {train} "
            f"with those of {test}: --drop-duplicates leaves them out of train"
        )


def refuse_reported_leaks(store: Store) -> None:
    """Check that the report of a set that is there counts no such images.

    Raises:
        ShardError: it does, or it does not say.
    """
    unsaid = f"{store}/{REPORT_FILE} does not say that train and test images share no bytes"
    try:
        duplicates = store.read_object(REPORT_FILE)["duplicates"]
        if duplicates["dropped"] or not duplicates.get("between_splits", 1):
            return
    except _UNREADABLE as error:
        raise ShardError(f"{unsaid} ({type(error).__name__}: {error})") from error
    raise ShardError(unsaid)


def report_to_json(content: dict[str, Any]) -> bytes:
    """Return the bytes of `report.json`."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def reported(store: Store) -> str:
    """Return one line about the report of a set, which is none the worse without it."""
    try:
        said = _summary(store.read_object(REPORT_FILE))
    except _UNREADABLE as error:
        said = f"cannot be used: {type(error).__name__}: {error}"
    return f"{store}/{REPORT_FILE}: {said}\n"


def _summary(content: dict[str, Any]) -> str:
    """Count in one line what was left out and found twice, and name the first ones."""
    undecodable, duplicates = content["undecodable"], content["duplicates"]
    fate = "left out" if duplicates["dropped"] else "kept"
    pairs = {"train and test": "between_splits", "classes": "between_classes"}
    counts = {what: duplicates.get(key, 0) for what, key in pairs.items()}
    shared = "".join(f", of which {n} between {what}" for what, n in counts.items() if n)
    not_taken = content.get("not_taken", {})  # sets written before have none
    return (
        f"{undecodable['count']} undecodable{_in_brackets(undecodable['causes'])}"
        f"{_named(undecodable['first'])}, "
        f"{duplicates['count']} duplicates {fate}{shared}, "
        f"{content['other_files']} other files{_in_brackets(not_taken.get('causes', {}))}"
        f"{_named(not_taken.get('first', []))}"
    )


def _named(listed: Sequence[dict[str, str]]) -> str:
    shown = [entry["name"] for entry in listed if entry.get("cause") != HIDDEN]
    names = [text.printable(printable(name)) for name in shown]
    return f": {', '.join(names[:_NAMED])}{', ...' * (len(names) > _NAMED)}" if names else ""


def _in_brackets(causes: dict[str, int]) -> str:
    first = sorted(causes.items(), key=lambda item: -item[1])[:_SAID]
    named = [f"{count} {cause}" for cause, count in first]
    if len(causes) > _SAID:
        named.append(f"{len(causes) - _SAID} further causes")
    return f" ({', '.join(named)})" if named else ""
