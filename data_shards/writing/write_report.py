"""What a writer left out or found twice: `report.json`, beside the index."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_shards.sources.base import Source

REPORT_FILE = "report.json"
_LISTED = 1000


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

    Args:
        source: The images.
        stored: Number of stored images.
        left_out: (number, cause, message) of images that cannot be stored.
        duplicates: Numbers of duplicates and of the first image with the same bytes.
        dropped: The duplicates were left out.
    """
    pairs = zip(*(array[:_LISTED].tolist() for array in duplicates), strict=True)
    listed = sorted(left_out)[:_LISTED]
    return {
        "images": len(source.labels),
        "stored": stored,
        "undecodable": {
            "count": len(left_out),
            "causes": dict(sorted(Counter(cause for _, cause, _ in left_out).items())),
            "first": [
                {"key": f"{number:08d}", "name": source.describe(number), "cause": cause,
                 "message": text}
                for number, cause, text in listed
            ],
        },
        "duplicates": {
            "count": len(duplicates[0]),
            "dropped": dropped,
            "first": [
                {"key": f"{number:08d}", "name": source.describe(number),
                 "same_as": source.describe(original)}
                for number, original in pairs
            ],
        },
        "other_files": source.other_files,
    }  # fmt: skip


def report_to_json(content: dict[str, Any]) -> bytes:
    """Return the bytes of `report.json`."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def summary(content: dict[str, Any]) -> str:
    """Return one line that counts what was left out and found twice."""
    causes = content["undecodable"]["causes"]
    named = f" ({', '.join(f'{n} {cause}' for cause, n in causes.items())})" if causes else ""
    duplicates = content["duplicates"]
    fate = "left out" if duplicates["dropped"] else "kept"
    return (
        f"{content['undecodable']['count']} undecodable{named}, "
        f"{duplicates['count']} duplicates {fate}, {content['other_files']} other files"
    )
