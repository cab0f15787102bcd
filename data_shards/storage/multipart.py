"""Limits of uploads to S3 that go in parts, kept before the first byte is sent."""

from data_shards.config import MIB
from data_shards.errors import ShardError

MOST_PARTS = 10_000
SMALLEST_PART = 5 * MIB  # but for the last one
LARGEST_PART = 5 * 1024 * MIB


def part_bytes(size: int, least: int, where: str) -> int:
    """Return the bytes per part with which an object fits into 10,000 parts.

    A writer holds one part in memory.

    Args:
        size: About how many bytes the object will have; 0 where that is not known beforehand.
        least: Bytes per part of all objects for which that is enough.
        where: Name of the object, for messages.

    Raises:
        ShardError: S3 allows no such part: `least` is not in [5 MiB, 5 GiB], or the object needs
            more.
    """
    if not SMALLEST_PART <= least <= LARGEST_PART:
        raise ShardError(
            f"{where}: parts of {least} bytes (default_block_size of fsspec's settings for s3) are "
            f"not in [{SMALLEST_PART}, {LARGEST_PART}], the limits of S3"
        )
    aim = MOST_PARTS * 9 // 10  # the rest is for what `size` leaves out, such as a header
    if size > aim * LARGEST_PART:
        raise ShardError(
            f"{where} would have {size} bytes: S3 takes {MOST_PARTS} parts of {LARGEST_PART} bytes"
        )
    return max(least, -(-size // aim))
