"""The work of one task: certify the samples of one shard, or audit the artefact's bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data_shards.index import Shard, ShardIndex
from data_shards.reader import read_shard
from data_shards.store import Store
from jobs.records import EvaluationError, ShardRecords
from model.artifact import Artifact, read_artifact
from model.certificates import Certificates, certify
from model.contract import CertifiedNetwork


@dataclass(frozen=True, kw_only=True)
class ArtifactTask:
    """Where a task finds the artefact and runs it."""

    url: str
    digest: str
    device: str


@dataclass(frozen=True, kw_only=True)
class BoundTask:
    """Compute the proved Lipschitz upper bound of the artefact's features in the pixels."""

    artifact: ArtifactTask

    def run(self) -> float:
        """Return the bound."""
        return load(self.artifact).network.lipschitz_upper_bound().value


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Certify the samples of one shard; `index` holds the rows of these samples only."""

    artifact: ArtifactTask
    index: ShardIndex
    shard: Shard
    batch_size: int

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, in stored order."""
        return [key.decode() for key in self.index.rows.key]

    def run(self) -> ShardRecords:
        """Return one record per sample, in stored order.

        Batches are cut inside the shard, so that they are the same for every number of tasks.

        Raises:
            ShardError: a sample's bytes differ from the index.
        """
        network = load(self.artifact).network
        certificates = [
            _certify(network, batch.images, batch.labels, self.artifact.device)
            for batch in read_shard(self.index, self.shard, self.batch_size)
        ]

        def column(name: str) -> np.ndarray:
            return torch.cat([getattr(batch, name) for batch in certificates]).cpu().numpy()

        return ShardRecords(
            shard=self.shard.file,
            key=tuple(self.keys),
            label=self.index.rows.label,
            prediction=column("prediction"),
            rival=column("rival"),
            margin=column("margin"),
            radius=column("radius"),
        )


def shard_tasks(
    artifact: ArtifactTask, index: ShardIndex, split: str, batch_size: int
) -> list[ShardTask]:
    """Return one task per shard that holds samples of the split, in index order.

    Raises:
        ShardError: unknown or empty split.
    """
    return [
        ShardTask(
            artifact=artifact, index=index.part(split, shard), shard=shard, batch_size=batch_size
        )
        for shard in index.shards_of(split)
    ]


def run_task(task: BoundTask | ShardTask) -> float | ShardRecords:
    """Run a task (Ray needs a plain function)."""
    with _float32_program(task.artifact.device):
        return task.run()


@lru_cache(maxsize=1)
def load(task: ArtifactTask) -> Artifact:
    """Read the artefact once per process.

    Raises:
        EvaluationError: it is not the one that the evaluation began with.
    """
    artifact = read_artifact(Store(task.url).open, device=task.device)
    if artifact.info.digest != task.digest:
        raise EvaluationError(
            f"artefact {task.url} has changed: digest {artifact.info.digest}, "
            f"the evaluation began with {task.digest}"
        )
    return artifact


@torch.no_grad()
def _certify(
    network: CertifiedNetwork, images: Tensor, labels: Tensor, device: str
) -> Certificates:
    """Nominal certificates of uint8 images (B, C, H, W): float32, layers exactly orthogonal."""
    with torch.autocast(device, enabled=False):
        pixels = images.to(device).to(torch.float32) / 255
        logits, factors = network.logits_and_margin_factors(pixels)
        return certify(logits, factors, labels.to(device), lipschitz=1.0)


@contextmanager
def _float32_program(device: str) -> Iterator[None]:
    """One CPU thread and no TF32 for the duration of a task.

    One thread makes the sums, and so the radii, the same wherever the task runs.
    """
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    if device == "cpu":
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
