"""Certified robust accuracy of a classifier on a data set, in this process."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from certified_pretrain.classifier import CertifiedClassifier, Images
from data_shards.format.shard_index import load_index
from data_shards.streaming.sample_reader import read_shard
from jobs.evaluation.config import USUAL_EPS
from model.certification.eps import check_table, eps_value
from model.errors import ModelError

Dataset = str | Path | tuple[Images, Sequence[int] | Tensor] | Iterable[tuple[Any, int]]
"""URL of a shard set; or images uint8 (N, C, H, W) and labels (N,); or pairs of an image uint8
(C, H, W) and its label, such as a torch Dataset has."""
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is proved of the samples of a data set; tensors of shape (N,)."""

    norm: str
    """Norm of the radii."""
    label: Tensor = dataclasses.field(repr=False)
    """True classes, int64."""
    prediction: Tensor = dataclasses.field(repr=False)
    """Classes, int64."""
    radius: Tensor = dataclasses.field(repr=False)
    """Certified radius of the prediction, right or wrong; float64, pixels in [0, 1]."""
    cra: dict[str, float]
    """Certified robust accuracy by eps: share of the samples whose prediction is right and whose
    radius exceeds eps."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.label)

    @property
    def clean(self) -> float:
        """Accuracy."""
        return float((self.prediction == self.label).double().mean())

    @property
    def mean_radius(self) -> float:
        """Average certified radius; a wrong prediction counts as 0."""
        return float(self.certified_radius.mean())

    @property
    def certified_radius(self) -> Tensor:
        """Radius of the samples that are classified rightly; 0 of the others."""
        return torch.where(self.prediction == self.label, self.radius, 0.0)

    def curve(self, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """Radii (points,), from 0 to the largest certified one, and the accuracy proved at each."""
        radii = np.sort(self.certified_radius.numpy())
        finite = radii[np.isfinite(radii)]
        eps = np.linspace(0, float(finite.max(initial=0.0)) or 1.0, points)
        return eps, 1 - np.searchsorted(radii, eps, side="right") / len(radii)

    def plot(self, axes: Axes) -> Axes:
        """Draw certified robust accuracy over eps; returns the axes."""
        eps, share = self.curve()
        axes.plot(eps, 100 * share)
        for ratio, value in self.cra.items():
            if eps_value(ratio) <= eps[-1]:
                axes.plot(eps_value(ratio), 100 * value, "o", label=f"{ratio}: {value:.1%}")
        axes.set_xlabel(f"eps ({self.norm}, pixels in [0, 1])")
        axes.set_ylabel("certified robust accuracy (%)")
        axes.set_ylim(0, 105)
        axes.legend()
        return axes


def evaluate(
    net: CertifiedClassifier, dataset: Dataset, eps: Sequence[str] = (), *, split: str = "test"
) -> Evaluation:
    """Certify every sample of a data set.

    The numbers are those of the column `sound` of `jobs.evaluate_cra`, which also writes a
    certificate that others can check, and works in parallel.

    Args:
        net: the classifier.
        dataset: see `Dataset`.
        eps: ratios such as `36/255`; default: the usual ones of the network's norm.
        split: of a shard set.

    Raises:
        ModelError: images of another shape or type, labels that are none, or no sample.
        ShardError: the shard set is damaged or does not fit the network.
        ValueError: an eps that is no ratio, or named twice.
    """
    ratios = tuple(eps) or USUAL_EPS[net.norm]
    check_table(ratios)
    labels, predictions, radii = [], [], []
    for images, batch_labels in _batches(net, dataset, split):
        found = net.certify(images)
        labels.append(batch_labels)
        predictions.append(found.prediction)
        radii.append(found.radius)
    if not labels:
        raise ModelError("the data set has no sample")
    label, prediction, radius = map(torch.cat, (labels, predictions, radii))
    classes = net.network.num_classes
    if bool(((label < 0) | (label >= classes)).any()):
        raise ModelError(f"a label lies outside of 0..{classes - 1}")
    bare = Evaluation(net.norm, label, prediction, radius, {})
    certified = bare.certified_radius
    cra = {ratio: float((certified > eps_value(ratio)).double().mean()) for ratio in ratios}
    return dataclasses.replace(bare, cra=cra)


def _batches(
    net: CertifiedClassifier, dataset: Dataset, split: str
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(dataset, str | Path):
        index = load_index(str(dataset))
        index.require(net.input_shape, net.network.num_classes)
        for shard in index.shards_of(split):
            for batch in read_shard(index, shard, _BATCH, split=split):
                yield batch.images, batch.labels
    elif isinstance(dataset, tuple):
        images, labels = (torch.as_tensor(part) for part in dataset)
        if len(images) != len(labels):
            raise ModelError(f"{len(images)} images and {len(labels)} labels")
        for begin in range(0, len(images), _BATCH):
            yield images[begin : begin + _BATCH], labels[begin : begin + _BATCH].long()
    else:
        yield from _paired(dataset)


def _paired(dataset: Iterable[tuple[Any, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    images: list[Tensor] = []
    labels: list[int] = []
    for image, label in dataset:
        images.append(torch.as_tensor(image))
        labels.append(int(label))
        if len(images) == _BATCH:
            yield torch.stack(images), torch.tensor(labels)
            images, labels = [], []
    if images:
        yield torch.stack(images), torch.tensor(labels)
