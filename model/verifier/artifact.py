"""The artifact: its description and its weights (docs/explanation/certificate.md, 8.2)."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt

from model.verifier.errors import (
    DisagreementError,
    UnusableError,
    agree,
    attempt,
    differ,
    shown,
    take,
)
from model.verifier.families.base import Family
from model.verifier.families.registry import family_of
from model.verifier.files import (
    LARGEST_JSON,
    Body,
    beside,
    digest_of,
    parse_object,
    read_bytes,
    sha256,
)

PIXEL_UNIT = "[0, 1], 0.5 subtracted inside"
LARGEST_HEADER = 100_000_000  # of a safetensors file: the limit of the stock reader
KEPT = 1 << 30
"""Weights of at most so many bytes are kept in memory; others are read again when needed."""

Tensor = npt.NDArray[np.float32]


class _Entry(NamedTuple):
    start: int
    shape: tuple[int, ...]
    sha256: str


class Weights(Mapping[str, Tensor]):
    """The tensors of a safetensors file, one at a time; each is the one that was hashed."""

    def __init__(self, url: str, entries: dict[str, _Entry], kept: dict[str, Tensor]) -> None:
        self.url, self._entries, self._kept = url, entries, kept

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        entry = self._entries[name]

        def read() -> bytes:
            with fsspec.open(self.url, "rb") as stream:
                stream.seek(entry.start)
                data: bytes = stream.read(4 * math.prod(entry.shape))
                return data

        data = attempt(self.url, read)
        agree(sha256(data), entry.sha256, f"{self.url}: tensor {name} read again")
        return np.frombuffer(data, dtype="<f4").reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def alone(self, name: str) -> "Weights":
        """One tensor, for another process."""
        kept = {name: self._kept[name]} if name in self._kept else {}
        return Weights(self.url, {name: self._entries[name]}, kept)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def sha256(self, name: str) -> str:
        """Digest of the bytes of a tensor."""
        return self._entries[name].sha256


def read_artifact(folder: str, body: Body) -> tuple[type[Family], Body, Weights]:
    """Family, configuration and tensors, after comparing all digests of both files.

    Args:
        folder: URL of the artifact.
        body: the certificate.
    """
    place = beside(folder, "artifact.json")
    info = parse_object(read_bytes(place, LARGEST_JSON), place)
    agree(info.get("schema_version"), 2, f"{place}: schema_version")
    family, config = family_of(take(info, "network", dict, place), f"{place}: network")
    for name in ("native_input_shape", "network_input_shape"):
        agree(info.get(name), body["native_shape"], f"{place}: {name}")
    agree(info.get("norm"), family.norm, f"{place}: norm")
    agree(body["norm"], family.norm, "norm")
    agree(info.get("pixel_unit"), PIXEL_UNIT, f"{place}: pixel_unit")
    agree(config["input_shape"], body["native_shape"], f"{place}: network.input_shape")
    weights, digest = read_tensors(beside(folder, "weights.safetensors"), family.shapes(config))
    agree(info.get("weights_sha256"), digest, f"{place}: weights_sha256")
    identity = {"network": info["network"], "weights_sha256": digest}
    derived = {**identity, "digest": digest_of(identity, place), "weight_dtype": "float32"}
    agree(info.get("digest"), derived["digest"], f"{place}: digest")
    agree(body["model"], derived, "model")
    return family, config, weights


def read_tensors(url: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Weights, str]:
    """All tensors of a safetensors file, which must be those named, and the sha256 of the file."""

    def read() -> tuple[Weights, str]:
        with fsspec.open(url, "rb") as stream:
            return _tensors(stream, shapes, url)

    return attempt(url, read)


def _tensors(
    stream: IO[bytes], shapes: Mapping[str, tuple[int, ...]], url: str
) -> tuple[Weights, str]:
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
    entries: dict[str, _Entry] = {}
    kept: dict[str, Tensor] = {}
    keep = 4 * sum(math.prod(shape) for shape in shapes.values()) <= KEPT
    start = 0
    for name in sorted(header, key=lambda name: spans[name]):
        shape = shapes[name]
        stop = start + 4 * math.prod(shape)
        stored = (header[name].get("dtype"), header[name].get("shape"), spans[name])
        due = ("F32", list(shape), [start, stop])
        if stored != due:
            differ(f"{url}: tensor {name} (type, shape, place)", stored, due)
        data = exactly(stop - start)
        tensor = np.frombuffer(data, dtype="<f4").reshape(shape)
        if not np.isfinite(tensor).all():
            raise DisagreementError(f"{url}: tensor {name} holds values that are not finite")
        entries[name] = _Entry(8 + length + start, shape, sha256(data))
        if keep:
            kept[name] = tensor
        start = stop
    if stream.read(1):
        raise DisagreementError(f"{url} goes on after its last tensor")
    return Weights(url, entries, kept), digest.hexdigest()
