"""Read one shard from front to end: its digest, its samples, and whatever does not belong there.

Used where the index is not trusted. A shard is a tar of pairs KEY.png (or jpg, jpeg,
webp), KEY.cls. Any other member is named, not read; nothing is extracted and nothing is unpickled.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator

from data_shards.errors import ShardError
from data_shards.format.image_pixels import EXTENSIONS
from data_shards.format.tar import Member, walk
from data_shards.storage.store import Store
from data_shards.untrusted.limits import limits

_BLOCK = 8 << 20
_MAX_LABEL = 16
_NAME = re.compile(rf"([A-Za-z0-9_-]+)\.({'|'.join(EXTENSIONS)}|cls)")
_LABEL = re.compile(rb"[0-9]{1,9}")


@dataclasses.dataclass(frozen=True)
class StoredSample:
    """One pair of members."""

    key: str
    extension: str
    offset: int
    data: bytes
    label: int


class HashedFile:
    """A file of a store that is read once, forwards, in blocks, every byte of it hashed.

    Args:
        store: The store.
        name: The file.
        size: Its size in bytes.
    """

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size
        self._digest = hashlib.sha256()
        self._buffer = b""
        self._start = 0  # of the buffer, in the file
        self._at = 0

    def seek(self, offset: int, /) -> int:
        """Go to a place; not to before the last one read from.

        Raises:
            ShardError: the place is gone.
        """
        if offset < self._start:
            raise ShardError(f"{self._store}/{self._name}: offset {offset} has passed")
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, fewer at the end of the file only.

        Raises:
            ShardError: the file cannot be read, or ends before its stated size.
        """
        stop = min(self._at + size, self._size)
        while self._start + len(self._buffer) < stop:
            self._next_block()
        data = self._buffer[self._at - self._start : max(self._at, stop) - self._start]
        self._at += len(data)
        return data

    def hexdigest(self) -> str:
        """Read what is left and return the sha256 of the whole file."""
        while self._start + len(self._buffer) < self._size:
            self._at = self._start + len(self._buffer)
            self._next_block()
        return self._digest.hexdigest()

    def _next_block(self) -> None:
        start = self._start + len(self._buffer)
        try:
            block = self._store.read_range(self._name, start, min(start + _BLOCK, self._size))
        except OSError as error:
            raise ShardError(f"cannot read {self._store}/{self._name}: {error}") from error
        if not block:
            raise ShardError(f"{self._store}/{self._name} ends at {start} of {self._size} bytes")
        self._digest.update(block)
        kept = min(self._at, start)
        self._buffer = self._buffer[kept - self._start :] + block
        self._start = kept


def read_shard_file(file: HashedFile, size: int, where: str) -> Iterator[StoredSample | str]:
    """Yield the samples of a shard in stored order, and one line per thing that is wrong.

    Args:
        file: The shard.
        size: Its size in bytes.
        where: Name of the shard, for messages.

    Raises:
        ShardError: what follows cannot be read as a tar.
    """
    seen: set[str] = set()
    image: tuple[str, str, Member, bytes] | None = None
    for member in walk(file, 0, size, where):
        problem = _problem(member)
        match = _NAME.fullmatch(member.name)
        if problem or not match:
            yield problem or f"member {member.name!r} is not of a shard"
            continue
        key, extension = match.groups()
        file.seek(member.offset)
        body = file.read(member.size)
        if extension != "cls":
            if image is not None:
                yield f"key {image[0]!r}: no label behind the image; members are out of order"
            if key in seen:
                yield f"key {key!r} occurs more than once"
            seen.add(key)
            image = (key, extension, member, body)
            continue
        if image is None or image[0] != key:
            yield f"key {key!r}: a label that is not behind its image; members are out of order"
        elif not _LABEL.fullmatch(body):
            yield f"key {key!r}: label {body!r} is not a number"
        else:
            yield StoredSample(key, image[1], image[2].offset, image[3], int(body))
        image = None
    if image is not None:
        yield f"key {image[0]!r}: no label behind the image"


def _problem(member: Member) -> str | None:
    """Return what is wrong with a member by its header alone."""
    name = f"member {member.name!r}"
    if member.kind is not None:
        return f"{name} is {member.kind}, not a file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"{name} would leave the folder"
    match = _NAME.fullmatch(member.name)
    if match is None:
        return f"{name} is not KEY.cls or KEY with one of {', '.join(EXTENSIONS)}; it was not read"
    limit = _MAX_LABEL if match[2] == "cls" else limits().image_bytes
    if member.size > limit:
        return f"{name} has {member.size} bytes, more than {limit}; it was not read"
    return None
