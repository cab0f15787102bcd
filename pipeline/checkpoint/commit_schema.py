"""The content of `commit.json`: one schema for writer and reader, checked whole or not believed."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_shards.errors import ShardError
from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from data_shards.untrusted.json_input import canonical_json, parse_object
from data_shards.untrusted.limits import UntrustedError, require, require_name
from pipeline.errors import PipelineError
from pipeline.run.events import Metrics
from pipeline.run.layout import COMMIT, step_of

SCHEMA_VERSION = 2
_STRICT = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
_COUNTS = ("step", "reprojections")
"""Scalars that are whole numbers."""
_MOST = 1 << 63
"""Counts are below it: what adds two of them stays exact in 64 bits."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CommittedFile:
    """A file of a checkpoint."""

    file: str = Field(pattern=r"^rank-[0-9]{5,}-of-[0-9]{5,}\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0, lt=_MOST)
    """Bytes."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CommittedTensor:
    """Where the elements of a tensor lie."""

    shape: list[int] = Field(max_length=16)
    parts: list[tuple[str, int, int]]
    """File, first element of the row-major tensor and the one after the last, in order."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Commit:
    """What `commit.json` says, apart from its digest."""

    schema_version: Literal[2]
    step: int = Field(ge=0, lt=_MOST)
    world_size: int = Field(ge=1, lt=_MOST)
    cursor: dict[str, int]
    scalars: dict[str, float]
    records: list[Metrics]
    config: dict[str, Any]
    """The resolved configuration; for people, it is not read."""
    tensors: dict[str, CommittedTensor]
    files: list[CommittedFile]

    @property
    def next_sample(self) -> Cursor:
        """The cursor of the next sample."""
        return Cursor(**self.cursor)


_COMMIT = TypeAdapter(Commit)
_CURSOR = {field.name for field in dataclasses.fields(Cursor)}


def commit_bytes(body: Mapping[str, Any]) -> bytes:
    """The bytes of `commit.json`.

    Args:
        body: the fields of `Commit` as JSON values.

    Raises:
        UntrustedError: larger than a reader takes.
    """
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    data = canonical_json({**body, "digest": digest})
    require(len(data), "json_bytes", f"{COMMIT} would have")
    return data


def read_commit(folder: Store) -> Commit:
    """Read and check the commit of a checkpoint.

    Raises:
        PipelineError: it is damaged, or of another checkpoint; the message has file and value.
        OSError: it cannot be read.
    """
    place = f"checkpoint file {folder.url}/{COMMIT}"
    try:
        body = parse_object(folder.read(COMMIT, limit="json_bytes"), place)
        if body.get("schema_version") != SCHEMA_VERSION:
            raise PipelineError(
                f"{place} has schema_version={body.get('schema_version')}, not {SCHEMA_VERSION}"
            )
        stated, canonical = body.pop("digest", None), canonical_json(body)
        found = hashlib.sha256(canonical).hexdigest()
        if stated != found:
            raise PipelineError(f"{place} states digest {stated}, its content has {found}")
        commit = _COMMIT.validate_json(canonical)
        _check(commit, folder, place)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()[:3]
        )
        raise PipelineError(f"{place} is damaged: {problems}") from error
    except UntrustedError as error:
        raise PipelineError(str(error)) from error
    except PipelineError:
        raise
    except ShardError as error:
        raise PipelineError(f"{place}: {error}") from error
    except ValueError as error:  # a number that is none
        raise PipelineError(f"{place} is damaged: {error}") from error
    return commit


def _check(commit: Commit, folder: Store, place: str) -> None:
    """What the schema cannot say."""
    step = step_of(folder.url.rstrip("/").rpartition("/")[0])
    if step is not None and step != commit.step:
        raise PipelineError(f"{place} is of step {commit.step}, not of the folder's {step}")
    if set(commit.cursor) != _CURSOR:
        raise PipelineError(f"{place} has a cursor of {sorted(commit.cursor)}")
    _ = commit.next_sample  # raises what no cursor can be
    for name, value in commit.scalars.items():
        if not math.isfinite(value) or (name in _COUNTS and (value < 0 or value % 1)):
            raise PipelineError(f"{place} has scalar {name}={value}")
    _check_parts(commit, place)


def _check_parts(commit: Commit, place: str) -> None:
    """Every element of every tensor is in exactly one part, of a file with a digest."""
    files = {record.file for record in commit.files}
    for key, tensor in commit.tensors.items():
        require_name(key, place)
        count, end = math.prod(tensor.shape), 0
        if any(side < 0 for side in tensor.shape) or count >= _MOST:
            raise PipelineError(f"{place}: {key} has shape {tensor.shape}")
        for name, first, last in tensor.parts:
            if name not in files:
                raise PipelineError(f"{place}: {key} is in {name[:100]!r}, not its file")
            if first != min(end, count) or last < first:
                raise PipelineError(
                    f"{place}: {key} has elements up to {end}, then from {first} to {last}"
                )
            end = last
        if end != count:
            raise PipelineError(f"{place}: {key} has {end} elements of its shape")
