"""Files of the verifier, read as if an adversary had written them.

Nothing is written and nothing is extracted. Every size is checked before it is used, and whatever a
parser objects to becomes one line that names the file.
"""

import hashlib
import io
import json
import math
import re
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Value = TypeVar("Value")
Body = dict[str, Any]
Table = dict[str, npt.NDArray[Any]]

PIXEL_UNIT = "[0, 1], 0.5 subtracted inside"
SAME_BOUND = 1e-9  # relative

_PIECE = 1 << 24
LARGEST_JSON = 1 << 26
LARGEST_TABLE = 1 << 32
LARGEST_SHARD = 1 << 36
LARGEST_HEADER = 100_000_000  # of a safetensors file: the limit of the stock reader
_ARROW = {
    "string": pa.types.is_string,
    "integer": pa.types.is_signed_integer,
    "number": pa.types.is_float64,
    "bool": pa.types.is_boolean,
}
CONFIGURATION = {
    *("kind", "input_shape", "num_classes", "patch", "width", "depth", "alpha", "beta", "head"),
    *("position", "pool_tau", "initial", "fold"),
}
CHOICES = {
    "kind": ("lipnext",),
    "head": ("unit", "linear"),
    "initial": ("haar", "identity_m"),  # this and the next do not change the function
    "fold": ("auto", "always", "never"),
}
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}


class RefusalError(Exception):
    """The verifier stops; the message is for the person who called it."""

    status = 2


class UnusableError(RefusalError):
    """An input that cannot be read as what it should be."""


class DisagreementError(RefusalError):
    """Something that can be read, and differs from what is derived."""

    status = 1


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def differ(place: str, stored: object, derived: object) -> NoReturn:
    """Stop at a disagreement."""
    raise DisagreementError(f"{place} is {shown(stored)}, derived {shown(derived)}")


class Near(NamedTuple):
    """A derived number and the relative difference that is allowed; null stands for infinity."""

    value: float
    tolerance: float = SAME_BOUND


def agree(stored: object, derived: object, place: str) -> None:
    """Compare a part of the certificate with what was derived, down to its leaves.

    Raises:
        DisagreementError: at the first difference, a missing or an unknown field among them.
    """
    if isinstance(derived, dict):
        if not isinstance(stored, dict) or stored.keys() != derived.keys():
            differ(f"{place} (fields)", _names(stored), sorted(derived))
        for name in derived:
            agree(stored[name], derived[name], f"{place}.{name}")
    elif isinstance(derived, list):
        if not isinstance(stored, list) or len(stored) != len(derived):
            differ(place, stored, derived)
        for i, item in enumerate(derived):
            agree(stored[i], item, f"{place}[{i}]")
    elif isinstance(derived, Near):
        number: Any = math.inf if stored is None else stored
        if type(number) not in (int, float) or not _near(number, derived):
            differ(place, stored, derived.value)
    elif isinstance(stored, bool) != isinstance(derived, bool) or stored != derived:
        differ(place, stored, derived)


def _names(stored: object) -> object:
    return sorted(stored) if isinstance(stored, dict) else stored


def _near(number: float, derived: Near) -> bool:
    if abs(number) > sys.float_info.max or math.isinf(derived.value):
        return number == derived.value
    allowed = derived.tolerance * max(abs(number), abs(derived.value))
    return abs(number - derived.value) <= allowed


def attempt(place: str, action: Callable[[], Value]) -> Value:
    """Run a parser over hostile input; whatever it raises becomes one line."""
    try:
        return action()
    except RefusalError:
        raise
    except Exception as error:
        raise UnusableError(f"{place}: {type(error).__name__}: {shown(str(error))}") from error


def beside(folder: str, name: str) -> str:
    """URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def read_bytes(url: str, limit: int) -> bytes:
    """All bytes of a file that has no more than `limit`."""

    def read() -> bytes:
        data = bytearray()  # in pieces: a stream may reserve as much memory as it is asked for
        with fsspec.open(url, "rb") as stream:
            while piece := stream.read(min(_PIECE, limit + 1 - len(data))):
                data += piece
        return bytes(data)

    data = attempt(url, read)
    if len(data) > limit:
        raise UnusableError(f"{url} has more than {limit} bytes")
    return data


def sha256(data: bytes | memoryview) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def digest_of(body: Body, place: str) -> str:
    """sha256 of the canonical JSON text of all fields but `digest`."""
    content = {name: body[name] for name in body if name != "digest"}
    text = attempt(place, lambda: json.dumps(content, sort_keys=True, separators=(",", ":")))
    return sha256(text.encode())


def parse_object(data: bytes, place: str) -> dict[str, Any]:
    """A JSON object; doubled keys, NaN and infinities are refused: their meaning is not fixed."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        body = dict(items)
        if len(body) != len(items):
            raise ValueError("a key occurs twice")
        return body

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(text)

    body = attempt(
        place,
        lambda: json.loads(
            data, object_pairs_hook=pairs, parse_constant=constant, parse_float=number
        ),
    )
    if not isinstance(body, dict):
        raise UnusableError(f"{place} is not a JSON object")
    return body


def take(body: object, name: str, kind: type, place: str) -> Any:
    """A field of a JSON object, of one type; true and false are not numbers here."""
    if not isinstance(body, dict) or name not in body:
        raise UnusableError(f"{place} has no field {name}")
    value = body[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UnusableError(f"{place}.{name} is {shown(value)}, not of type {kind.__name__}")
    return value


def read_table(data: bytes, kinds: dict[str, str], place: str) -> dict[str, npt.NDArray[Any]]:
    """The named columns of a Parquet file, without empty cells.

    Args:
        data: the file.
        kinds: name to `string`, `integer` (signed), `number` (64 bit) or `bool`.
        place: for messages.
    """
    # From a buffer and in one thread: Arrow's background clean-up can abort the interpreter's exit.
    file = attempt(place, lambda: pq.ParquetFile(pa.BufferReader(data), pre_buffer=False))
    groups = attempt(
        place, lambda: [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    )
    size = sum(group.total_byte_size for group in groups)
    if size > LARGEST_TABLE:
        raise UnusableError(f"{place} declares {size} bytes, more than {LARGEST_TABLE}")
    schema = attempt(place, lambda: file.schema_arrow)
    for name, kind in kinds.items():
        if schema.names.count(name) != 1:
            raise UnusableError(f"{place} has {schema.names.count(name)} columns {name}, not one")
        found = schema.field(name).type
        if not _ARROW[kind](found):
            raise UnusableError(f"{place}: column {name} is of type {found}, not {kind}")
    table = attempt(place, lambda: file.read(columns=list(kinds), use_threads=False))
    for name in kinds:
        if empty := table.column(name).null_count:
            raise UnusableError(f"{place}: column {name} has {empty} empty cells")
    return {name: attempt(place, table.column(name).to_numpy) for name in kinds}


def read_tensors(
    url: str, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, npt.NDArray[np.float32]], str]:
    """All tensors of a safetensors file, which must be those named, and the sha256 of the file."""

    def read() -> tuple[dict[str, npt.NDArray[np.float32]], str]:
        with fsspec.open(url, "rb") as stream:
            return _tensors(stream, shapes, url)

    return attempt(url, read)


def _tensors(
    stream: IO[bytes], shapes: dict[str, tuple[int, ...]], url: str
) -> tuple[dict[str, npt.NDArray[np.float32]], str]:
    digest = hashlib.sha256()

    def exactly(count: int) -> bytes:
        data = stream.read(count)
        digest.update(data)
        if len(data) != count:
            raise UnusableError(f"{url} ends after {len(data)} of {count} bytes")
        return data

    length = int.from_bytes(exactly(8), "little")
    if length > LARGEST_HEADER:
        raise UnusableError(f"{url} declares a header of {length} bytes")
    header = parse_object(exactly(length), f"the header of {url}")
    header.pop("__metadata__", None)
    if header.keys() != shapes.keys():
        wrong = sorted(header.keys() ^ shapes.keys())
        raise DisagreementError(f"{url} and its network differ in the tensor {shown(wrong[0])}")
    spans = {name: take(header[name], "data_offsets", list, f"{url}: {name}") for name in header}
    tensors = {}
    start = 0
    for name in sorted(header, key=lambda name: spans[name]):
        stop = start + 4 * math.prod(shapes[name])
        stored = (header[name].get("dtype"), header[name].get("shape"), spans[name])
        due = ("F32", list(shapes[name]), [start, stop])
        if stored != due:
            differ(f"{url}: tensor {name} (type, shape, place)", stored, due)
        tensors[name] = np.frombuffer(exactly(stop - start), dtype="<f4").reshape(shapes[name])
        if not np.isfinite(tensors[name]).all():
            raise DisagreementError(f"{url}: tensor {name} holds values that are not finite")
        start = stop
    if stream.read(1):
        raise DisagreementError(f"{url} goes on after its last tensor")
    return tensors, digest.hexdigest()


# Section 8.2: the artefact


def read_artifact(folder: str, body: Body) -> tuple[Body, dict[str, npt.NDArray[np.float32]]]:
    """Configuration and tensors of the artefact, after comparing all digests of both files."""
    place = beside(folder, "artifact.json")
    info = parse_object(read_bytes(place, LARGEST_JSON), place)
    config = take(info, "network", dict, place)
    agree(info.get("schema_version"), 1, f"{place}: schema_version")
    for name in ("native_input_shape", "network_input_shape"):
        agree(info.get(name), body["native_shape"], f"{place}: {name}")
    agree(info.get("norm"), "l2", f"{place}: norm")
    agree(info.get("pixel_unit"), PIXEL_UNIT, f"{place}: pixel_unit")
    config = checked_config(config, f"{place}: network")
    agree(config["input_shape"], body["native_shape"], f"{place}: network.input_shape")
    tensors, digest = read_tensors(beside(folder, "weights.safetensors"), parameter_shapes(config))
    agree(info.get("weights_sha256"), digest, f"{place}: weights_sha256")
    identity = {"network": info["network"], "weights_sha256": digest}
    derived = {**identity, "digest": digest_of(identity, place), "weight_dtype": "float32"}
    agree(info.get("digest"), derived["digest"], f"{place}: digest")
    agree(body["model"], derived, "model")
    return config, tensors


def checked_config(stored: Body, place: str) -> Body:
    """Configuration of a LipNeXt with a linear head; every other network is refused by name."""
    config = {"head": "unit", **stored}
    for name, choices in CHOICES.items():
        if take(config, name, str, place) not in choices:
            raise UnusableError(f"{place}.{name} {shown(config[name])} is not verified here")
    if unknown := sorted(stored.keys() - CONFIGURATION):
        raise UnusableError(f"{place}: the field {shown(unknown[0])} is not known here")
    limits = {"num_classes": (2, 1 << 16), "patch": (1, 1 << 12), "width": (1, 1 << 16)}
    for name, (least, most) in {**limits, "depth": (1, 10_000)}.items():
        if not least <= take(config, name, int, place) <= most:
            raise UnusableError(f"{place}.{name} is {shown(config[name])}, not {least} to {most}")
    for name, lowest in (("alpha", 0.0), ("beta", 0.0), ("pool_tau", 1e-18)):
        if not lowest <= take(config, name, float, place) <= 1:
            raise UnusableError(f"{place}.{name} is {config[name]}, not {lowest} to 1")
    take(config, "position", bool, place)
    shape = take(config, "input_shape", list, place)
    if len(shape) != 3 or not all(type(side) is int and 0 < side < 1 << 16 for side in shape):
        raise UnusableError(f"{place}.input_shape is {shown(shape)}")
    patch, width = config["patch"], config["width"]
    shifted = round(config["alpha"] * width)
    if shape[1] % patch or shape[2] % patch or shape[0] * patch**2 > width or 4 * shifted > width:
        raise UnusableError(f"{place}: patch, width, alpha and input_shape do not fit")
    return config


def parameter_shapes(config: Body) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    C, classes, patch = config["width"], config["num_classes"], config["patch"]
    grid = (config["input_shape"][1] // patch, config["input_shape"][2] // patch, 1)
    shapes: dict[str, tuple[int, ...]] = {"stem.weight": (C, C)}
    for i in range(config["depth"]):
        shapes |= {f"blocks.{i}.R": (C, C), f"blocks.{i}.M": (C, C), f"blocks.{i}.b": (C,)}
        if config["position"]:
            shapes[f"blocks.{i}.p"] = grid
    return {**shapes, "head.weight": (classes, C), "head.bias": (classes,)}


# Section 8.4: the shard set.


def rows_of_split(data: bytes, split: str, place: str) -> Table:
    """The rows of index.parquet that belong to a split; fit and validation partition train."""
    kinds = {"split": "string", "validation": "bool", "shard": "integer"}
    rows = read_table(
        data, {**kinds, "key": "string", "extension": "string", "label": "integer"}, place
    )
    if split not in ("train", "test", "fit", "validation"):
        raise UnusableError(f"shards.split {shown(split)} is not a split")
    chosen = rows["split"] == ("test" if split == "test" else "train")
    if split in ("fit", "validation"):
        chosen &= rows["validation"] == (split == "validation")
    rows = {name: column[chosen] for name, column in rows.items()}
    if len(set(rows["key"])) != len(rows["key"]):
        raise DisagreementError(f"{place}: a key occurs twice in the split {split}")
    if not len(rows["key"]):
        raise DisagreementError(f"{place}: the split {split} is empty")
    return rows


def compare_rows(shards: list[Body], rows: Table, samples: Table, place: str) -> None:
    """samples.parquet has the keys and labels of the split, in order."""
    if len(samples["key"]) != len(rows["key"]):
        differ("the number of rows of samples.parquet", len(samples["key"]), len(rows["key"]))
    if rows["shard"].min() < 0 or rows["shard"].max() >= len(shards):
        raise UnusableError(f"{place}: index.parquet names a shard that is not listed")
    files = np.array([shard["file"] for shard in shards], dtype=object)[rows["shard"]]
    for name, due in (("shard", files), ("key", rows["key"]), ("label", rows["label"])):
        if (wrong := np.flatnonzero(samples[name] != due)).size:
            i = int(wrong[0])
            differ(f"samples.parquet row {i} {name}", samples[name][i], due[i])


class Shard:
    """A tar file in memory; members are found by name, and nothing is extracted."""

    def __init__(self, data: bytes, place: str) -> None:
        self._data = memoryview(data)
        self._place = place
        self._members: dict[str, tuple[int, int]] = {}
        for member in attempt(place, lambda: list(_members(data))):
            if member.name in self._members:
                raise DisagreementError(f"{place} has two members {shown(member.name)}")
            self._members[member.name] = (member.offset_data, member.size)

    def body(self, name: str) -> bytes:
        """Bytes of a member."""
        if name not in self._members:
            raise DisagreementError(f"{self._place} has no member {shown(name)}")
        offset, size = self._members[name]
        if not 0 <= size <= len(self._data) - offset:
            raise UnusableError(f"{self._place}: member {shown(name)} reaches past the end")
        return bytes(self._data[offset : offset + size])

    def label(self, key: str) -> int:
        """The class that the member KEY.cls states."""
        text = self.body(f"{key}.cls").strip()
        if not re.fullmatch(rb"[0-9]{1,9}", text):
            raise UnusableError(f"{self._place}: {shown(key)}.cls holds {shown(text)}, no class")
        return int(text)

    def pixels(
        self, key: str, extension: str, shape: tuple[int, int, int]
    ) -> npt.NDArray[np.uint8]:
        """Decoded image, shape (channels, height, width)."""
        place = f"{self._place}: {shown(key)}.{extension}"
        data = self.body(f"{key}.{extension}")
        return attempt(place, lambda: _decode(data, extension, shape, place))


def _members(data: bytes) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            if not member.isreg() or member.issparse():
                raise UnusableError(f"member {shown(member.name)} is not a regular file")
            yield member


def _decode(
    data: bytes, extension: str, shape: tuple[int, int, int], place: str
) -> npt.NDArray[np.uint8]:
    if extension not in FORMATS:
        raise UnusableError(f"{place} is not one of {', '.join(FORMATS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=[FORMATS[extension]]) as image:
            # Size and mode are known before a pixel is decoded.
            found = (len(image.getbands()), image.height, image.width)
            if image.mode not in ("L", "RGB") or found != shape:
                differ(f"{place} (mode, channels, height, width)", (image.mode, *found), shape)
            pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1))
