"""The work of one task: certify the samples of one shard, or audit the artefact's bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_shards.decode import decode_image
from data_shards.errors import ShardError
from data_shards.index import ShardIndex
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
    """Certify the samples of one shard; the columns are the index rows of its samples."""

    artifact: ArtifactTask
    shards_url: str
    file: str
    batch_size: int
    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extension: np.ndarray
    xxh3_64: np.ndarray
    label: np.ndarray

    def run(self) -> ShardRecords:
        """Return one record per row, in order.

        Batches are cut inside the shard, so that they are the same for every number of tasks.

        Raises:
            ShardError: a sample's bytes differ from the index.
        """
        network = load(self.artifact).network
        batches = []
        for start in range(0, len(self.key), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.key)))
            labels = torch.from_numpy(self.label[rows.start : rows.stop].astype(np.int64))
            batches.append(_certify(network, self._images(rows), labels, self.artifact.device))

        def column(name: str) -> np.ndarray:
            return torch.cat([getattr(batch, name) for batch in batches]).cpu().numpy()

        return ShardRecords(
            shard=self.file,
            key=tuple(key.decode() for key in self.key),
            label=self.label,
            prediction=column("prediction"),
            rival=column("rival"),
            margin=column("margin"),
            radius=column("radius"),
        )

    def _images(self, rows: range) -> Tensor:
        """Read neighbouring rows in one request; returns uint8 (B, C, H, W)."""
        first = int(self.offset[rows[0]])
        last = int(self.offset[rows[-1]] + self.size[rows[-1]])
        data = Store(self.shards_url).read_range(self.file, first, last)
        return torch.stack([self._image(row, data, first) for row in rows])

    def _image(self, row: int, data: bytes, first: int) -> Tensor:
        start = int(self.offset[row]) - first
        body = data[start : start + int(self.size[row])]
        found = xxhash.xxh3_64_intdigest(body)
        if found != int(self.xxh3_64[row]):
            raise ShardError(
                f"sample {self.key[row].decode()!r} of shard {Store(self.shards_url)}/{self.file} "
                f"is damaged: xxh3_64 {found:016x}, the index states {int(self.xxh3_64[row]):016x}"
            )
        return decode_image(body, self.extension[row].decode())


def shard_tasks(
    artifact: ArtifactTask, index: ShardIndex, split: str, batch_size: int
) -> list[ShardTask]:
    """Return one task per shard that holds samples of the split, in index order.

    Raises:
        ShardError: unknown or empty split.
    """
    chosen = index.select(split)
    columns = ("key", "offset", "size", "extension", "xxh3_64", "label")
    tasks = []
    for shard in index.shards_of(split):
        rows = chosen[index.rows.shard[chosen] == shard.number]
        values = {name: getattr(index.rows, name)[rows] for name in columns}
        tasks.append(
            ShardTask(
                artifact=artifact,
                shards_url=index.store.url,
                file=shard.file,
                batch_size=batch_size,
                **values,
            )
        )
    return tasks


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
