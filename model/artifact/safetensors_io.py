"""Streaming safetensors files: written one tensor at a time, read by byte range.

The format: header length (unsigned 64 bit), JSON header padded with spaces to a multiple of 8, then
the tensors' little-endian bytes without gaps. The stock library writes whole dictionaries only.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import torch
from torch import Tensor

from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.limits import UntrustedError, require, require_name
from model.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What the header says of a tensor before its values exist."""

    name: str
    """Name in the file."""
    shape: tuple[int, ...]
    """Shape."""
    dtype: torch.dtype = torch.float32
    """Type of the stored values."""


@dataclasses.dataclass(frozen=True)
class TensorRange:
    """Where a tensor's row-major bytes lie."""

    shape: tuple[int, ...]
    """Shape."""
    dtype: torch.dtype
    """Type of the stored values."""
    start: int
    """First byte, counted from the beginning of the file."""
    stop: int
    """Byte after the last one."""


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """What identifies a written file."""

    sha256: str
    """Hexadecimal digest of all bytes."""
    size: int
    """Bytes."""


def write_safetensors(
    stream: IO[bytes],
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> FileDigest:
    """Write a safetensors file while its tensors arrive; only one is held at a time.

    Args:
        stream: binary, write only; it is not closed.
        specs: names, shapes and types of all tensors in file order.
        tensors: the tensors in the same order, on any device.
        metadata: free text in the header.

    Raises:
        ModelError: a tensor that differs from its spec, is missing or is one too many. The file is
            then incomplete and must not be kept.
    """
    if sys.byteorder != "little":
        raise ModelError("safetensors files are little-endian; this machine is not")
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as hashing:  # beside the writing of the same bytes
        for data in _pieces(specs, tensors, metadata):
            hashed = hashing.submit(digest.update, data)
            stream.write(data)
            hashed.result()
            size += len(data)
    return FileDigest(digest.hexdigest(), size)


def _pieces(
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None,
) -> Iterator[bytes | memoryview]:
    """The bytes of a file: its header, then one tensor after another."""
    yield _header(specs, metadata)
    arriving = iter(tensors)
    for spec in specs:
        name, tensor = next(arriving, (None, None))
        if name is None or tensor is None:
            raise ModelError(f"tensor {spec.name} is missing")
        if (name, tuple(tensor.shape), tensor.dtype) != (spec.name, spec.shape, spec.dtype):
            raise ModelError(
                f"tensor {name} {tuple(tensor.shape)} {tensor.dtype} came where "
                f"{spec.name} {spec.shape} {spec.dtype} is due"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
    surplus = next(arriving, None)
    if surplus is not None:
        raise ModelError(f"tensor {surplus[0]} came after the last one")


def read_header(stream: IO[bytes]) -> tuple[dict[str, TensorRange], dict[str, str]]:
    """Read the header of a safetensors file; the stream then stands at the first tensor byte.

    Returns:
        Byte range of every tensor by name, in file order, and the metadata.

    Raises:
        ModelError: not a safetensors file, or ranges that leave gaps or do not fit the shapes.
    """
    length = int.from_bytes(_exactly(stream, 8), "little")
    try:
        require(length, "json_bytes", "the safetensors header has")
        header = parse_object(_exactly(stream, length), "the safetensors header")
        metadata = header.pop("__metadata__", {})
        ranges = {name: _range(name, entry, 8 + length) for name, entry in header.items()}
    except UntrustedError as error:
        raise ModelError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the safetensors header is damaged: {error!r}") from error
    ranges = dict(sorted(ranges.items(), key=lambda item: (item[1].start, item[1].stop)))
    due = 8 + length
    for name, r in ranges.items():
        if r.start != due or r.stop - r.start != math.prod(r.shape) * r.dtype.itemsize:
            raise ModelError(
                f"tensor {name} {r.shape} {r.dtype} at bytes {r.start}..{r.stop}, due at {due}: "
                "the safetensors header is damaged"
            )
        due = r.stop
    return ranges, metadata


def _range(name: str, entry: Any, start: int) -> TensorRange:
    require_name(name, "the safetensors header")
    numbers = [*entry["shape"], *entry["data_offsets"]]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError(f"{name}: shape and data_offsets have to be whole numbers")
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    return TensorRange(shape, _DTYPES[entry["dtype"]], start + first, start + last)


def tensor_of(data: bytes | bytearray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Tensor (CPU, own memory) of row-major little-endian bytes.

    Raises:
        ModelError: the number of bytes does not fit.
    """
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ModelError(f"{len(data)} bytes for a tensor {tuple(shape)} of {dtype}")
    if not data:
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(tuple(shape))


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.dtype not in _CODES:
            raise ModelError(f"tensor {spec.name}: safetensors files here do not hold {spec.dtype}")
        if spec.name in header:
            raise ModelError(f"two tensors are named {spec.name}")
        stop = offset + math.prod(spec.shape) * spec.dtype.itemsize
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ModelError(f"the safetensors file ends after {len(data)} of {count} bytes")
    return data


def difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """How many tensors differ, and how the first one does; empty where none does."""
    names = sorted(n for n in {*stored, *expected} if stored.get(n) != expected.get(n))
    if not names:
        return ""
    first = names[0]
    return (
        f"{len(names)} tensors differ, first {first}: "
        f"stored {stored.get(first)}, expected {expected.get(first)}"
    )
