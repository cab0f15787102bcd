"""Read a shard that another program wrote: WebDataset's layout, whatever the order of its members.

Members that follow each other and share a key are one sample; the key ends at the first dot behind
the last folder, as WebDataset has it. One member is the image, and the label comes from a `.cls`, a
field of a `.json` or the folder. What cannot be used is named with its cause; nothing is extracted
and nothing is unpickled.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_shards.errors import ShardError
from data_shards.format.image_pixels import EXTENSIONS
from data_shards.format.shard_index import Shard, ShardIndex
from data_shards.format.shard_scan import HashedFile, StoredSample
from data_shards.format.tar import Member, walk
from data_shards.untrusted.json_input import parse_json
from data_shards.untrusted.limits import limits

_MAX_LABEL = 1 << 20  # bytes of a member with a label
_LISTED = 5  # kinds of members in a message
_LONGEST_FILE = "train-00000000.tar"
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,9}")
_NEGATIVE = re.compile(r"-[0-9]+")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a sample has its image and its label.

    Args:
        label: "cls" (a member with a number or a name), "json:FIELD" (a field of the `.json`, with
            dots for fields inside fields) or "folder" (the last folder of the key).
        image: Extension of the image, as `rgb.png`; "" = the only one of the sample.

    Raises:
        ShardError: another label.
    """

    label: str
    image: str = ""

    def __post_init__(self) -> None:
        kind, _, field = self.label.partition(":")
        if self.label not in ("cls", "folder") and (kind != "json" or not field):
            raise ShardError(f"label {self.label!r} is not cls, json:FIELD or folder")

    @property
    def label_member(self) -> str:
        """Extension of the member with the label, "" for none."""
        return "" if self.label == "folder" else self.label.partition(":")[0]


@dataclasses.dataclass(frozen=True)
class ExternalSample:
    """One sample that can be used."""

    key: str
    member: str
    """Name of the image's member; bytes that are not UTF-8 as surrogates."""
    extension: str
    offset: int
    data: bytes
    label: str


@dataclasses.dataclass(frozen=True)
class Unusable:
    """One sample or member that cannot be used."""

    name: str
    cause: str


class _UnusableError(ShardError):
    """The message is the cause."""


def read_external(
    file: HashedFile, size: int, where: str, layout: Layout
) -> Iterator[ExternalSample | Unusable]:
    """Yield what a shard holds, in stored order.

    Args:
        file: The shard.
        size: Its size in bytes.
        where: Name of the shard, for messages.
        layout: Where image and label are.

    Raises:
        ShardError: the shard cannot be read as a tar.
    """
    seen: set[str] = set()
    key, parts = "", dict[str, tuple[Member, bytes]]()
    for member in walk(file, 0, size, where):
        if member.kind == "a directory":
            continue
        match = _NAME.fullmatch(member.name.removeprefix("./"))
        if member.kind is not None or match is None:
            yield Unusable(member.name, member.kind or "a name without key and extension")
            continue
        if match[1] != key:
            yield from _finished(key, parts, layout, seen)
            key, parts = match[1], {}
        extension = match[2].lower()
        if extension in parts:
            yield Unusable(member.name, "a member twice in one sample")
        elif extension == layout.label_member or _is_image(extension):
            limit = limits().image_bytes if _is_image(extension) else _MAX_LABEL
            file.seek(member.offset)
            body = file.read(member.size) if member.size <= limit else b""
            parts[extension] = member, body
        else:
            parts[extension] = member, b""
    yield from _finished(key, parts, layout, seen)


def read_indexed(
    index: ShardIndex, shard: Shard, file: HashedFile, size: int
) -> Iterator[StoredSample | str]:
    """Yield the samples of a shard of another program that a set's index lists.

    Raises:
        ShardError: it cannot be read as a tar, or the set does not say where labels are.
    """
    stated = index.header.generator
    try:
        layout = Layout(stated["label"], stated["image"])
        names = index.header.class_names if stated["labels_are"] == "names" else None
    except KeyError as error:
        raise ShardError(f"{index.store}: the header does not state {error}") from error
    numbers = {name: number for number, name in enumerate(names or ())}
    listed = {key.decode() for key in index.rows.key}
    for found in read_external(file, size, shard.file, layout):
        if isinstance(found, Unusable):
            continue
        key = row_key(shard.file, found.key)
        if key not in listed:
            continue  # left out when the index was made: no image, held out, or a duplicate
        label = int(found.label) if names is None else numbers.get(found.label, -1)
        yield StoredSample(key, found.extension, found.offset, found.data, label)


def row_key(file: str, key: str) -> str:
    """Return the key of a sample in the index: keys of other programs are unique per shard only."""
    return f"{file.removesuffix('.tar')}/{os.fsencode(key).decode('utf-8', 'backslashreplace')}"


def is_number(label: str) -> bool:
    """Tell whether a label is the number of a class."""
    return _NUMBER.fullmatch(label) is not None


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in EXTENSIONS


def _finished(
    key: str, parts: dict[str, tuple[Member, bytes]], layout: Layout, seen: set[str]
) -> Iterator[ExternalSample | Unusable]:
    if not parts:
        return
    try:
        if key in seen:
            raise _UnusableError(
                "a key that came before: members of a sample must follow each other "
                "(tar --sort=name)"
            )
        seen.add(key)
        if len(row_key(_LONGEST_FILE, key).encode()) > limits().name_bytes:  # no reader takes it
            raise _UnusableError(f"a key of about {limits().name_bytes} bytes or more")
        extension = _image(parts, layout)
        member, data = parts[extension]
        if len(data) < member.size:
            raise _UnusableError(f"an image of more than {limits().image_bytes} bytes")
        label = _label(key, parts, layout)
        kind = extension.rpartition(".")[2]
        yield ExternalSample(key, member.name, kind, member.offset, data, label)
    except _UnusableError as error:
        yield Unusable(next(iter(parts.values()))[0].name, str(error))


def _image(parts: dict[str, Any], layout: Layout) -> str:
    images = [extension for extension in parts if _is_image(extension)]
    if layout.image:
        images = [extension for extension in images if extension == layout.image.lower()]
    elif len(images) > 1:  # a plain image before a named one as `depth.png`
        images = [extension for extension in images if extension in EXTENSIONS] or images
    if len(images) > 1:
        raise _UnusableError("more than one image; --image says which")
    if not images:
        kinds = Counter(extension.rpartition(".")[2] for extension in parts)
        raise _UnusableError(f"no image among .{', .'.join(sorted(kinds)[:_LISTED])}")
    return images[0]


def _label(key: str, parts: dict[str, tuple[Member, bytes]], layout: Layout) -> str:
    if layout.label == "folder":
        label = key.rpartition("/")[0].rpartition("/")[2]
        return _checked(os.fsencode(label).decode("utf-8", "backslashreplace"), "a folder")
    if layout.label_member not in parts:
        raise _UnusableError(f"no .{layout.label_member}")
    member, body = parts[layout.label_member]
    if len(body) < member.size:
        raise _UnusableError(f".{layout.label_member} of more than {_MAX_LABEL} bytes")
    if layout.label == "cls":
        try:
            return _checked(body.decode(), ".cls")
        except UnicodeDecodeError:
            raise _UnusableError(".cls is not UTF-8") from None
    return _field(body, layout.label.partition(":")[2])


def _field(body: bytes, field: str) -> str:
    try:
        value = parse_json(body, ".json")
        for name in field.split("."):
            value = value[name]
    except ValueError:
        raise _UnusableError(".json cannot be read") from None
    except (KeyError, TypeError, IndexError):
        raise _UnusableError(f"no field {field} in .json") from None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _UnusableError(f"field {field} is neither a number nor a text")
    return _checked(str(value), f"field {field}")


def _checked(label: str, what: str) -> str:
    label = label.strip()
    if not label or not label.isprintable():
        raise _UnusableError(f"{what} holds no label")
    if len(label.encode()) > limits().name_bytes:
        raise _UnusableError(f"{what} holds a label of more than {limits().name_bytes} bytes")
    if _NEGATIVE.fullmatch(label):
        raise _UnusableError(f"{what} holds a negative number")
    return label
