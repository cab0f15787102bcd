"""Tar archives: a strict walk over the members, and members of fixed bytes.

`tarfile` takes a damaged header behind the first member for the end of the archive, and so do the
readers built on it. Here whatever is not a member, an end marker or its padding is an error.
Nothing is extracted: a member is a name, a place and a size.
"""

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from typing import Protocol

from data_shards.errors import ShardError
from data_shards.untrusted.limits import UntrustedError, require_name

BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENDED = 1 << 20  # bytes of an extended header
_ZEROS_AT_ONCE = 1 << 16
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX, _PAX_GLOBAL = tarfile.XHDTYPE, tarfile.XGLTYPE
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_SPARSE = "GNU.sparse"
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a directory",
    tarfile.FIFOTYPE: "a pipe",
}


class Seekable(Protocol):
    """What a walk needs of a file; it never seeks to before the last header."""

    def seek(self, offset: int, /) -> int:
        """Go to a place."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, fewer at the end only."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One member: its name, and where its body lies in the file that was walked."""

    name: str
    offset: int
    size: int
    kind: str | None
    """None for a regular file, else what it is."""


def walk(file: Seekable, start: int, stop: int, where: str) -> Iterator[Member]:
    """Yield the members of a tar that lies in bytes [start, stop) of a file, in stored order.

    The bodies are not read; the caller may seek and read forwards between two members.

    Args:
        file: The file.
        start: First byte of the archive.
        stop: One past its last byte.
        where: Name of the archive, for messages.

    Raises:
        ShardError: a damaged header, a member that reaches past the end, no end marker, or data
            behind it.
    """
    offset = start
    extended: dict[str, str] = {}
    while True:
        header = _header(file, offset, stop, where)
        if header is None:
            break
        body = offset + BLOCK
        is_extension = header.type in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK)
        size = header.size if is_extension else int(extended.get("size", header.size))
        name = extended.get("path", header.name)
        try:
            require_name(name, f"{where}: member at offset {offset}")
        except UntrustedError as error:
            raise ShardError(str(error)) from error
        if size < 0 or body + size > stop:
            raise ShardError(
                f"{where}: member {name!r} at offset {offset} declares {size} bytes, "
                f"{stop - body} are left"
            )
        if header.type == tarfile.GNUTYPE_SPARSE or _SPARSE in extended:
            raise ShardError(
                f"{where}: member {name!r} at offset {offset} is a sparse file, stored without its "
                "holes: write the archive without tar --sparse"
            )
        if is_extension:
            extended |= _extension(file, header, body, where)
        else:
            kind = None if header.type in _REGULAR else _KINDS.get(header.type, "of unknown type")
            yield Member(name, body, size, kind)
            extended = {}
        offset = body + -(-size // BLOCK) * BLOCK
    _check_end(file, offset, stop, where)


def add_member(tar: io.BytesIO, name: str, body: bytes) -> int:
    """Append one member with fixed owner, mode and time; return the offset of its body."""
    info = tarfile.TarInfo(name)
    info.size = len(body)
    info.mode = 0o444
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(body)
    tar.write(bytes(-len(body) % BLOCK))
    return offset


def add_end(tar: io.BytesIO) -> None:
    """Append the end marker and the padding to a whole record."""
    tar.write(bytes(2 * BLOCK))
    tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))


def _header(file: Seekable, offset: int, stop: int, where: str) -> tarfile.TarInfo | None:
    file.seek(offset)
    block = file.read(min(BLOCK, max(0, stop - offset)))
    if len(block) < BLOCK:
        raise ShardError(f"{where}: the archive is cut at offset {offset}: there is no end marker")
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"{where}: damaged header at offset {offset}: {error}") from error


def _extension(file: Seekable, header: tarfile.TarInfo, body: int, where: str) -> dict[str, str]:
    """Return what an extended header says of the next member: "path", "size", if it is sparse."""
    if header.size > _MAX_EXTENDED:
        raise ShardError(
            f"{where}: extended header of {header.size} bytes at offset {body}, more than "
            f"{_MAX_EXTENDED}"
        )
    file.seek(body)
    data = file.read(header.size)
    if header.type == _LONG_NAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if header.type != _PAX:
        return {}
    found = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = data[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        number = key != b"size" or value.strip().isdigit()
        if not (equals and record.endswith(b"\n") and number and length <= len(data)):
            raise ShardError(f"{where}: damaged extended header at offset {body}")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    if any(key.startswith(_SPARSE) for key in found):
        found[_SPARSE] = "yes"
    return {key: found[key] for key in ("path", "size", _SPARSE) if key in found}


def _check_end(file: Seekable, offset: int, stop: int, where: str) -> None:
    file.seek(offset)
    while offset < stop:
        block = file.read(min(_ZEROS_AT_ONCE, stop - offset))
        if not block:
            raise ShardError(f"{where}: the archive is cut at offset {offset}")
        if any(block):
            raise ShardError(f"{where}: data behind the end marker, from offset {offset} on")
        offset += len(block)
