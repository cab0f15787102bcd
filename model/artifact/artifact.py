"""Model artifact: fp32 weights and a JSON description; where training and evaluation meet.

weights.safetensors   every parameter and stored statistic, float32
artifact.json         ArtifactInfo; written last, so an artifact without it is incomplete
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from data_shards.untrusted.json_input import canonical_json, read_object
from data_shards.untrusted.limits import UntrustedError, require_name
from model.artifact.safetensors_io import (
    TensorRange,
    TensorSpec,
    difference,
    read_header,
    tensor_of,
    write_safetensors,
)
from model.errors import ModelError
from model.networks.base import CertifiedNetwork
from model.networks.config import NetworkConfig
from model.networks.parameter_limit import parameter_limit
from model.networks.registry import AnyNetwork, build_network, on_meta_device
from optim.manifolds import manifold_of

SCHEMA_VERSION = 2
WEIGHTS = "weights.safetensors"
DESCRIPTION = "artifact.json"
PIXEL_UNIT = "[0, 1], 0.5 subtracted inside"

OpenBinary = Callable[[str, str], AbstractContextManager[IO[bytes]]]
"""open_binary(name, mode): a file of the artifact's folder, mode `rb` or `wb`."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ArtifactInfo:
    """The content of artifact.json."""

    schema_version: int
    """Version of this layout."""
    network: AnyNetwork
    """Configuration from which the network is built."""
    norm: Literal["l2", "linf"]
    """Norm in which the network is Lipschitz."""
    pixel_unit: str
    """Unit of the certified radius."""
    native_input_shape: tuple[int, int, int]
    """(C, H, W) of the images as the source has them; the certificate speaks of these."""
    network_input_shape: tuple[int, int, int]
    """(C, H, W) that the network sees; equal, because nothing is resized or replicated."""
    orthogonality_residuals: dict[str, float]
    """||X^T X - I||_F in float64 of every constrained matrix as stored."""
    largest_residual: float
    """Largest of the orthogonality residuals."""
    weights_sha256: str
    """Digest of weights.safetensors."""
    weights_bytes: int
    """Size of weights.safetensors."""
    digest: str
    """sha256 over the network configuration and weights_sha256: identifies the function."""
    context: dict[str, Any]
    """Where it comes from: run, step, code version."""
    class_names: tuple[str, ...] = ()
    """Name of every class in the order of the logits; empty: they have none."""

    def class_name(self, label: int) -> str:
        """See the function of this name."""
        return class_name(self.class_names, label)


def class_name(names: Sequence[str], label: int) -> str:
    """Name of a class; its number where the classes have no names."""
    return names[label] if names else str(label)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A network read back, with its description."""

    network: CertifiedNetwork
    info: ArtifactInfo


def parameter_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters."""
    return {name: tuple(p.shape) for name, p in on_meta_device(config).named_parameters()}


def head_rule(config: NetworkConfig) -> str:
    """How margins become radii in this network, see CertifiedNetwork.head_rule."""
    return on_meta_device(config).head_rule


def _stored_tensors(network: CertifiedNetwork) -> dict[str, Tensor]:
    """Parameters and statistics, in the order in which an artifact stores them by default."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def write_artifact(
    open_binary: OpenBinary,
    *,
    network_config: NetworkConfig,
    tensors: Iterable[tuple[str, Tensor]],
    context: Mapping[str, Any],
    class_names: Sequence[str] = (),
    order: Sequence[str] | None = None,
) -> ArtifactInfo:
    """Write an artifact while its tensors arrive; only one is held at a time.

    Args:
        open_binary: opens a file of the artifact's folder.
        network_config: the network.
        tensors: all parameters and buffers, any floating type and device; stored in float32.
        context: JSON values that say where the weights come from.
        class_names: one per class, or none.
        order: names in the order in which the tensors arrive; default: parameters, then buffers.

    Raises:
        ModelError: a tensor is missing, surplus, out of order, of a wrong shape or not finite, or
            there are more or fewer names than classes.
    """
    _check_names(class_names, network_config)
    network = on_meta_device(network_config)
    parameters = _stored_tensors(network)
    residuals: dict[str, float] = {}

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            value = tensor.detach().to(torch.float32)
            if not bool(value.isfinite().all()):
                raise ModelError(f"tensor {name} holds values that are not finite")
            manifold = manifold_of(parameters[name]) if name in parameters else None
            if manifold is not None:
                residuals[name] = manifold.residual(value)
            yield name, value

    names = list(parameters if order is None else order)
    if sorted(names) != sorted(parameters):
        raise ModelError(f"order names {sorted(names)}, the network has {sorted(parameters)}")
    specs = [TensorSpec(name, tuple(parameters[name].shape)) for name in names]
    with open_binary(WEIGHTS, "wb") as stream:
        weights = write_safetensors(stream, specs, stored())
    info = ArtifactInfo(
        schema_version=SCHEMA_VERSION,
        network=network_config,
        norm=network.norm,
        pixel_unit=PIXEL_UNIT,
        native_input_shape=network.input_shape,
        network_input_shape=network.input_shape,
        orthogonality_residuals=residuals,
        largest_residual=max(residuals.values(), default=0.0),
        weights_sha256=weights.sha256,
        weights_bytes=weights.size,
        digest=_model_digest(network_config, weights.sha256),
        context=dict(context),
        class_names=tuple(class_names),
    )
    text = json.dumps(_as_json(info), indent=1, sort_keys=True, allow_nan=False)
    with open_binary(DESCRIPTION, "wb") as stream:
        stream.write(text.encode())
    return info


def read_info(open_binary: OpenBinary) -> ArtifactInfo:
    """Read and check artifact.json alone.

    Raises:
        ModelError: another schema version, a field that does not validate, a digest that does not
            fit, or units in which a radius would not be a distance between stored images.
    """
    try:
        with open_binary(DESCRIPTION, "rb") as stream:
            body = read_object(stream, DESCRIPTION)
        version = body.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ModelError(
                f"{DESCRIPTION} has schema_version={version}; this code reads {SCHEMA_VERSION}"
            )
        info = TypeAdapter(ArtifactInfo).validate_python(body)
        _check_names(info.class_names, info.network)
    except ValidationError as error:
        raise ModelError(f"{DESCRIPTION} is damaged: {error}") from error
    except UntrustedError as error:
        raise ModelError(str(error)) from error
    digest = _model_digest(info.network, info.weights_sha256)
    if digest != info.digest:
        raise ModelError(
            f"{DESCRIPTION} states digest {info.digest}, but its network and weights have {digest}"
        )
    _check_size(open_binary, info)
    _check_units(info)
    return info


def _check_names(names: Sequence[str], network: NetworkConfig) -> None:
    for name in names:
        require_name(name, f"a class of {DESCRIPTION}")
    if names and len(names) != network.num_classes:
        raise ModelError(
            f"{len(names)} class names for {network.num_classes} classes: one for each, or none"
        )


_SMALL = 1 << 16
"""A number of a configuration that costs nothing, whatever it counts."""


def _check_size(open_binary: OpenBinary, info: ArtifactInfo) -> None:
    """Build nothing that the weights cannot fill: a configuration of few bytes may ask for all."""
    with open_binary(WEIGHTS, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
    if size != info.weights_bytes:
        raise ModelError(f"{WEIGHTS} has {size} bytes, {DESCRIPTION} says {info.weights_bytes}")
    values = size // torch.float32.itemsize
    for field in dataclasses.fields(info.network):
        count = getattr(info.network, field.name)
        # Some lists are as long as a network is deep; a field may have no effect in a small one.
        if isinstance(count, int) and count > max(values, _SMALL):
            raise ModelError(
                f"{DESCRIPTION} has {field.name}={count}, more than the {values} values of its "
                "weights"
            )
    try:
        with parameter_limit(values):
            on_meta_device(info.network)
    except RuntimeError as error:  # sizes that no tensor can have
        raise ModelError(f"{DESCRIPTION}: no network can be built: {error}") from error


def _check_units(info: ArtifactInfo) -> None:
    """A radius is a distance between stored images only if the network sees them as they are."""
    network = on_meta_device(info.network)
    shape = tuple(network.input_shape)
    stated = {
        "norm": (info.norm, network.norm),
        "pixel_unit": (info.pixel_unit, PIXEL_UNIT),
        "native_input_shape": (tuple(info.native_input_shape), shape),
        "network_input_shape": (tuple(info.network_input_shape), shape),
    }
    for name, (found, expected) in stated.items():
        if found != expected:
            raise ModelError(
                f"{DESCRIPTION} has {name}={found}, its network has {expected}: pixels that are "
                "rescaled, resized or replicated before the network change what a radius means"
            )


def read_tensors(open_binary: OpenBinary, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Read some parameters by byte range; their digests are for the caller to compare.

    Raises:
        ModelError: a name that the file does not hold, or a damaged file.
    """
    with open_binary(WEIGHTS, "rb") as stream:
        ranges, _ = read_header(stream)
        for name in names:
            if name not in ranges:
                raise ModelError(f"{WEIGHTS} holds no tensor {name}")
            r = ranges[name]
            stream.seek(r.start)
            yield name, _stored_value(name, stream.read(r.stop - r.start), r)


def read_without_parameters(open_binary: OpenBinary, info: ArtifactInfo) -> CertifiedNetwork:
    """The network on the meta device, with its stored statistics: enough to compose bounds.

    Raises:
        ModelError: see read_tensors.
    """
    network = on_meta_device(info.network)
    names = [name for name, _ in network.named_buffers()]
    if names:
        statistics = dict(read_tensors(open_binary, names))
        network.load_state_dict(statistics, strict=False, assign=True)
    return network


@torch.no_grad()
def read_artifact(open_binary: OpenBinary, *, device: torch.device | str | None = None) -> Artifact:
    """Read an artifact and check every digest, name and shape.

    Args:
        open_binary: opens a file of the artifact's folder.
        device: where the network goes; the CPU by default.

    Returns:
        The network in float32 and evaluation mode, and its description.

    Raises:
        ModelError: whatever differs from what was written.
    """
    info = read_info(open_binary)
    with torch.device(device or "cpu"):
        network = build_network(info.network).float().eval()
    with open_binary(WEIGHTS, "rb") as stream:
        digest = _load(network, stream)
    if digest != info.weights_sha256:
        raise ModelError(f"{WEIGHTS} has sha256 {digest}, {DESCRIPTION} says {info.weights_sha256}")
    return Artifact(network, info)


def _load(network: CertifiedNetwork, stream: IO[bytes]) -> str:
    """Fill the network from the file; returns the sha256 of all its bytes."""
    hashing = _HashingReader(stream)
    ranges, _ = read_header(hashing)  # type: ignore[arg-type]
    parameters = _stored_tensors(network)
    stored = {name: (r.shape, r.dtype) for name, r in ranges.items()}
    expected = {name: (tuple(p.shape), torch.float32) for name, p in parameters.items()}
    if wrong := difference(stored, expected):
        raise ModelError(f"{WEIGHTS} does not fit the network: {wrong}")
    for name, r in ranges.items():
        parameters[name].copy_(_stored_value(name, hashing.read(r.stop - r.start), r))
    if hashing.read(1):
        raise ModelError(f"{WEIGHTS} goes on after its last tensor")
    return hashing.digest.hexdigest()


def _stored_value(name: str, data: bytes, place: TensorRange) -> Tensor:
    """One tensor as it is stored; what `write_artifact` never writes is refused here, too."""
    value = tensor_of(data, place.dtype, place.shape)
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise ModelError(f"{WEIGHTS}: tensor {name} holds values that are not finite")
    return value


class _HashingReader:
    """Reads a stream and hashes what was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self.digest.update(data)
        return data


def _as_json(value: object) -> Any:
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def _model_digest(config: NetworkConfig, weights_sha256: str) -> str:
    body = {"network": _as_json(config), "weights_sha256": weights_sha256}
    return hashlib.sha256(canonical_json(body)).hexdigest()
