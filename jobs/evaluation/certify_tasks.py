"""The work of one task: bound some matrices, or certify the samples of one shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_shards.format.shard_index import Shard, ShardIndex
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from jobs.errors import EvaluationError
from jobs.evaluation.sample_records import (
    COLUMNS,
    ColumnRecords,
    ShardRecords,
)
from model.artifact.artifact import (
    Artifact,
    ArtifactInfo,
    parameter_shapes,
    read_artifact,
    read_tensors,
)
from model.certification.matrix_bounds import MatrixBound, tensor_digest
from model.certification.nvidia_overrides import library_overrides
from model.certification.rounding import FLOAT32, FLOAT64, PROGRAMS
from model.certify import Certificates, ProvedCertifier, certify, image_norms
from model.empirical_lipschitz import observed_lipschitz
from model.networks.base import CertifiedNetwork
from model.networks.config import NetworkConfig
from model.networks.registry import build_network

_TASK_ELEMENTS = 1 << 24
_CERTIFIED_ELEMENTS = 1 << 20
"""Logits or slopes from which on a shard's batches are certified, together: 8 MiB in float64."""
_OBSERVED_EVERY = 4096
"""Samples of a split for each one whose derivative is observed: it costs some 60 times as much."""


@dataclass(frozen=True, kw_only=True)
class ArtifactTask:
    """Where a task finds the artifact and runs it."""

    url: str
    digest: str
    device: str


@dataclass(frozen=True, kw_only=True)
class MatrixTask:
    """Bound the norms of some matrices of the artifact; reads nothing else."""

    artifact: ArtifactTask
    network: NetworkConfig
    names: tuple[str, ...]

    def run(self) -> list[MatrixBound]:
        """Return the bounds in the order of the names."""
        tensors = read_tensors(Store(self.artifact.url).open, self.names)
        with torch.device("meta"):
            network = build_network(self.network)
        return [
            network.bound_matrix(name, tensor.to(self.artifact.device)) for name, tensor in tensors
        ]


class _Passes(NamedTuple):
    """What is certified of some samples: (B,), logits (B, K), slopes of these or of all samples."""

    classes: Tensor
    norms: Tensor
    single: Tensor
    double: Tensor
    serving: Tensor
    factors: Tensor
    slopes: Tensor


def _size(batches: Sequence[_Passes]) -> int:
    """Elements of the tables that have a row for each sample."""
    slopes = [t for batch in batches for t in (batch.factors, batch.slopes) if t.ndim == 3]
    return sum(batch.single.numel() for batch in batches) + sum(t.numel() for t in slopes)


def _joined(batches: Sequence[_Passes]) -> _Passes:
    """The samples of some batches; slopes that hold everywhere are those of any batch."""
    *rows, factors, slopes = zip(*batches, strict=True)
    everywhere = (t[0] if t[0].ndim == 2 else torch.cat(t) for t in (factors, slopes))
    return _Passes(*map(torch.cat, rows), *everywhere)


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Certify the samples of one shard; `index` holds these samples and this shard only."""

    artifact: ArtifactTask
    index: ShardIndex
    batch_size: int
    matrices: tuple[MatrixBound, ...]
    deployed: str
    observed: int
    """Samples whose derivative is observed, of the first batch."""

    @property
    def shard(self) -> Shard:
        """The shard."""
        return self.index.shards[0]

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, in stored order."""
        return [key.decode() for key in self.index.rows.key]

    def run(self) -> ShardRecords:
        """Return one record per sample, in stored order.

        Batches are cut inside the shard, so that they are the same for every number of tasks.

        Raises:
            ShardError: a sample's bytes differ from the index.
            EvaluationError: the weights are not those whose bounds were computed.
        """
        digests: list[str] = []
        found: dict[str, list[Certificates]] = {name: [] for name in COLUMNS}
        waiting: list[_Passes] = []
        observed = 0.0
        for number, batch in enumerate(read_shard(self.index, self.shard, self.batch_size)):
            digests += [
                hashlib.sha256(image.tobytes()).hexdigest() for image in batch.images.numpy()
            ]
            if self.observed and number == 0:
                observed = self._observed(batch.images[: self.observed])
            waiting.append(self._passes(batch.images, batch.labels))
            if len(digests) == len(self.index.rows) or _size(waiting) >= _CERTIFIED_ELEMENTS:
                for name, certificates in self._certify(waiting).items():
                    found[name].append(certificates)
                waiting.clear()
        return ShardRecords(
            shard=self.shard.file,
            key=tuple(self.keys),
            pixels_sha256=tuple(digests),
            label=self.index.rows.label,
            columns={name: _records(certificates) for name, certificates in found.items()},
            observed_lipschitz=observed,
            largest_factor=float(self._certifier(FLOAT64.name).factors.max()),
        )

    def _certifier(self, program: str) -> ProvedCertifier:
        return certifier(self.artifact, self.matrices, program)

    def _passes(self, pixels: Tensor, labels: Tensor) -> _Passes:
        """What the network says of a batch, in all programs."""
        device = self.artifact.device
        single, factors = _evaluate(self.artifact, pixels, FLOAT32.name)
        double, slopes = _evaluate(self.artifact, pixels, FLOAT64.name)
        serving = single
        if self.deployed != FLOAT32.name:
            serving, _ = _evaluate(self.artifact, pixels, self.deployed)
        norms = self._norms(pixels).to(device)
        return _Passes(labels.to(device), norms, single, double, serving, factors, slopes)

    def _certify(self, batches: Sequence[_Passes]) -> dict[str, Certificates]:
        """Certificates of some batches by column: row by row, so for many at once as for one."""
        classes, norms, single, double, serving, factors, slopes = _joined(batches)

        def proved(program: str, logits: Tensor) -> Certificates:
            return self._certifier(program).certify(logits, norms, classes, slopes)

        plain = self._certifier(FLOAT64.name)
        return {
            "nominal": certify(
                single,
                factors,
                classes,
                lipschitz=1.0,
                curvature=plain.curvature,
                radii=plain.network.feature_radii,
            ),
            "sound": proved(FLOAT64.name, double),
            "deployed": proved(self.deployed, serving),
        }

    def _norms(self, pixels: Tensor) -> Tensor:
        return image_norms(pixels, load(self.artifact).network.norm)

    def _observed(self, pixels: Tensor) -> float:
        network = in_program(self.artifact, FLOAT64.name)
        images = pixels.to(self.artifact.device, torch.float64) / 255
        return observed_lipschitz(network, images)


def matrix_tasks(artifact: ArtifactTask, info: ArtifactInfo) -> list[MatrixTask]:
    """Return tasks of at most 2^24 elements, or one matrix, each."""
    shapes = parameter_shapes(info.network)
    with torch.device("meta"):
        names = build_network(info.network).bounded_matrices
    groups: list[list[str]] = [[]]
    elements = 0
    for name in names:
        size = int(np.prod(shapes[name]))
        if groups[-1] and elements + size > _TASK_ELEMENTS:
            groups.append([])
            elements = 0
        groups[-1].append(name)
        elements += size
    return [
        MatrixTask(artifact=artifact, network=info.network, names=tuple(group))
        for group in groups
        if group
    ]


def shard_tasks(
    artifact: ArtifactTask,
    index: ShardIndex,
    split: str,
    batch_size: int,
    *,
    matrices: Sequence[MatrixBound],
    deployed: str,
) -> list[ShardTask]:
    """Return one task per shard that holds samples of the split, in index order.

    Raises:
        ShardError: unknown or empty split.
    """
    parts = [index.part(split, shard) for shard in index.shards_of(split)]
    ends = np.cumsum([0, *(len(part.rows) for part in parts)])
    # How many of the split's samples number 0, 4096, ... are in each: one at least in all.
    observed = np.diff(-(-ends // _OBSERVED_EVERY)).tolist()
    return [
        ShardTask(
            artifact=artifact,
            index=part,
            batch_size=batch_size,
            matrices=tuple(matrices),
            deployed=deployed,
            observed=count,
        )
        for part, count in zip(parts, observed, strict=True)
    ]


@dataclass
class _Loaded:
    """What this process holds of the one artifact that its tasks are about."""

    task: ArtifactTask | None = None
    artifact: Artifact | None = None
    networks: dict[str, CertifiedNetwork] = field(default_factory=dict)
    """By program."""
    certifiers: dict[tuple[str, tuple[MatrixBound, ...]], ProvedCertifier] = field(
        default_factory=dict
    )


_loaded = _Loaded()


def load(task: ArtifactTask) -> Artifact:
    """Read the artifact once per process; that of other tasks is dropped before.

    Raises:
        EvaluationError: it is not the one that the evaluation began with.
    """
    if _loaded.task == task and _loaded.artifact is not None:
        return _loaded.artifact
    forget()  # two networks of a billion parameters do not fit beside each other
    artifact = read_artifact(Store(task.url).open, device=task.device)
    if artifact.info.digest != task.digest:
        raise EvaluationError(
            f"artifact {task.url} has changed: digest {artifact.info.digest}, "
            f"the evaluation began with {task.digest}"
        )
    artifact.network.requires_grad_(False)  # derivatives by the image alone are asked for
    _loaded.task, _loaded.artifact = task, artifact
    return artifact


def in_program(task: ArtifactTask, program: str) -> CertifiedNetwork:
    """The network with its weights in the type of a program; float32 is the artifact itself."""
    artifact = load(task)
    if program == FLOAT32.name:
        return artifact.network
    if program in _loaded.networks:
        return _loaded.networks[program]
    with torch.device(task.device):
        network = build_network(artifact.info.network).to(PROGRAMS[program].dtype).eval()
    network.requires_grad_(False)
    network.load_state_dict(artifact.network.state_dict())
    _loaded.networks[program] = network
    return network


def certifier(
    task: ArtifactTask, matrices: tuple[MatrixBound, ...], program: str
) -> ProvedCertifier:
    """Certifier of the stored weights, after checking that the bounds are theirs."""
    network = load(task).network
    key = program, matrices
    if key in _loaded.certifiers:
        return _loaded.certifiers[key]
    for matrix in matrices:
        if tensor_digest(network.get_parameter(matrix.name)) != matrix.sha256:
            raise EvaluationError(
                f"{matrix.name} of {task.url} differs from the matrix that was bounded"
            )
    known = {matrix.name: matrix for matrix in matrices}
    made = ProvedCertifier(network, PROGRAMS[program], known)
    _loaded.certifiers[key] = made
    return made


def forget() -> None:
    """Drop the networks that this process has loaded."""
    _loaded.task = _loaded.artifact = None
    _loaded.networks.clear()
    _loaded.certifiers.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@torch.no_grad()
def _evaluate(task: ArtifactTask, pixels: Tensor, program: str) -> tuple[Tensor, Tensor]:
    """Logits and slopes of uint8 images (B, C, H, W) in one program."""
    wide = torch.promote_types(PROGRAMS[program].dtype, torch.float32)
    with torch.autocast(torch.device(task.device).type, enabled=False):
        images = pixels.to(task.device).to(wide) / 255
        return in_program(task, program).logits_and_slopes(images)


def _records(batches: Sequence[Certificates]) -> ColumnRecords:
    columns = {}
    for column in fields(ColumnRecords):
        values = torch.cat([getattr(batch, column.name) for batch in batches]).cpu()
        columns[column.name] = (values.double() if values.is_floating_point() else values).numpy()
    return ColumnRecords(**columns)


@contextmanager
def exact_program(device: str) -> Iterator[None]:
    """One CPU thread, no TF32, no cuDNN and no short sums of bf16 for the duration of a task.

    One thread makes the sums, and so the radii, the same wherever the task runs.

    Raises:
        EvaluationError: the environment lets NVIDIA's libraries change products below torch.
    """
    overrides = library_overrides() if device != "cpu" else []
    if overrides:
        raise EvaluationError(
            f"{', '.join(overrides)} lets NVIDIA's libraries compute products otherwise than torch "
            "asks for, and the rounding errors of a certificate are proved for that: unset it"
        )
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    # cuDNN may convolve by Winograd or Fourier transforms, whose errors no dot product has.
    convolutions = torch.backends.cudnn.enabled
    products = torch.backends.cuda.matmul
    reduced = products.allow_bf16_reduced_precision_reduction
    if device == "cpu":
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.enabled = False
    products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.enabled = convolutions
        products.allow_bf16_reduced_precision_reduction = reduced
