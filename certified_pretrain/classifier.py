"""A network with what is proved of it: classes, certified radii, attacks."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_shards.storage.store import Store
from jobs.prediction.predictor import SoundNetwork, artifact_url
from model.artifact.artifact import DESCRIPTION, read_artifact, write_artifact
from model.attacks import apgd
from model.certification.eps import eps_value
from model.errors import ModelError
from model.networks.base import CertifiedNetwork
from model.networks.registry import build_network

Norm = Literal["l2", "linf"]
Images = Tensor | npt.NDArray[np.uint8]
"""uint8 (B, C, H, W), exactly as the network's source has them."""

_ROUNDED_DOWN = 1 - 2.0**-50
"""A radius that is converted to another norm loses more than the rounding of that."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What is proved of some images; tensors of shape (B,)."""

    prediction: Tensor
    """Classes, int64."""
    radius: Tensor
    """No perturbation smaller than this changes the class; float64, in `norm`, pixels in [0, 1]."""
    certified: Tensor
    """Whether the radius exceeds eps, bool."""
    norm: str
    """Norm of the radius."""
    eps: float
    """Radius of the verdict, pixels in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Attacked:
    """What an attack found."""

    images: Tensor
    """Points of the balls around the images, float64 (B, C, H, W), pixels in [0, 1]."""
    prediction: Tensor
    """Their classes, int64 (B,)."""
    changed: Tensor
    """Whether that is another class than that of the image, bool (B,)."""


class CertifiedClassifier:
    """A trained network, its proved bounds and the names of its classes; see `load`, `certified`.

    Args:
        network: with its final weights, which are copied.
        class_names: one per class, or none.

    Attributes:
        network: the copy, in float32 and evaluation mode.
        class_names: one per class; empty: they have none.

    Raises:
        ModelError: nothing can be proved of these weights.
    """

    def __init__(self, network: CertifiedNetwork, class_names: Sequence[str] = ()) -> None:
        if class_names and len(class_names) != network.num_classes:
            raise ModelError(f"{len(class_names)} class names for {network.num_classes} classes")
        self.network = _copy(network)
        self.class_names = tuple(class_names)
        self._sound = SoundNetwork(_copy(self.network))

    def __repr__(self) -> str:
        network, shape = self.network, "x".join(map(str, self.input_shape))
        facts = f"images {shape}, {network.num_classes} classes, {self.norm}"
        return f"<{type(self).__name__}: {network.configuration.kind}, {facts}>"

    @property
    def norm(self) -> Norm:
        """Norm in which the network is Lipschitz."""
        return self.network.norm

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.network.input_shape

    def predict(self, images: Images) -> Tensor:
        """Classes of images, int64 (B,).

        Args:
            images: uint8 (B, C, H, W).

        Raises:
            ModelError: another shape or type.
        """
        return self._sound.predict(_tensor(images)).prediction

    def certify(
        self, images: Images, norm: Norm | None = None, eps: str | float = "36/255"
    ) -> Predictions:
        """Classes, certified radii, and whether each radius exceeds eps.

        A network of the other norm answers, too, with the largest ball of the norm that its own
        certified ball contains: in n values of an image an l-infinity ball of radius r / sqrt(n)
        lies in the l2 ball of radius r, and an l2 ball of radius r in the l-infinity ball of r.

        Args:
            images: uint8 (B, C, H, W).
            norm: of radius and eps; default: the network's own.
            eps: radius of the verdict, pixels in [0, 1]: a number, or a ratio such as `36/255`.

        Raises:
            ModelError: images of another shape or type, or an unknown norm.
            ValueError: eps is neither.
        """
        limit = eps_value(eps) if isinstance(eps, str) else float(eps)
        if not (math.isfinite(limit) and limit >= 0):
            raise ValueError(f"eps={eps} is not a radius: finite, at least 0, pixels in [0, 1]")
        norm = norm or self.norm
        if norm not in ("l2", "linf"):
            raise ModelError(f"norm {norm!r} is neither l2 nor linf")
        found = self._sound.predict(_tensor(images))
        radius = found.radius
        if norm != self.norm:
            ratio = 1.0 if norm == "l2" else 1 / math.sqrt(math.prod(self.input_shape))
            radius = radius * (ratio * _ROUNDED_DOWN)
        return Predictions(found.prediction, radius, radius > limit, norm, limit)

    def attack(
        self, images: Images, eps: float | Tensor, *, steps: int = 50, seed: int = 0
    ) -> Attacked:
        """Look for other classes within a distance of the images, by Auto-PGD (arXiv 2003.01690).

        Below the certified radius there are none. That none is found above it proves nothing.

        Args:
            images: uint8 (B, C, H, W).
            eps: distance in the network's norm, pixels in [0, 1]; one for all, or (B,).
            steps: gradient steps.
            seed: of the random starts.

        Raises:
            ModelError: images of another shape or type, or distances that are none.
        """
        pixels = _tensor(images)
        classes = self.predict(pixels)
        points = apgd(
            self._sound.network,
            pixels.double() / 255,
            classes,
            torch.as_tensor(eps, dtype=torch.float64).expand(len(pixels)).clone(),
            norm=self.norm,
            steps=steps,
            clip=True,
            generator=torch.Generator().manual_seed(seed),
        )
        with torch.no_grad():
            prediction = self._sound.network(points).argmax(1)
        return Attacked(points, prediction, prediction != classes)

    def save(self, folder: str | Path, **context: Any) -> None:
        """Write the model artifact, which `load`, `jobs.predict` and `jobs.evaluate_cra` read.

        Args:
            folder: its folder, a path or any fsspec URL.
            context: JSON values that say where the weights come from.

        Raises:
            ModelError: a weight is not finite.
        """
        named = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        write_artifact(
            Store(str(folder)).open,
            network_config=self.network.configuration,
            tensors=named.items(),
            context=context,
            class_names=self.class_names,
        )


def load(artifact: str | Path) -> CertifiedClassifier:
    """The certified classifier of a model artifact, after checking all of its digests.

    Args:
        artifact: its folder (`runs/NAME/artifacts/step-...`), or that of a run (`runs/NAME`): the
            artifact that was evaluated on its test split, else its newest; a path or any fsspec
            URL.

    Raises:
        ModelError: the artifact is damaged, or nothing can be proved of it.
        FileNotFoundError: there is none.
    """
    place = Store(artifact_url(str(artifact)))
    if not place.exists(DESCRIPTION):
        raise FileNotFoundError(f"{place} is neither a model artifact nor a run that has one")
    read = read_artifact(place.open)
    return CertifiedClassifier(read.network, read.info.class_names)


def certified(network: CertifiedNetwork, class_names: Sequence[str] = ()) -> CertifiedClassifier:
    """The certified classifier of a network that was trained in this process.

    Networks with stored means (`liresnet`, `bronet`) need `network.calibrate(batches)` before.

    Args:
        network: with its final weights, which are copied and rounded to float32.
        class_names: one per class, or none.

    Raises:
        ModelError: nothing can be proved of these weights, or another number of names.
    """
    return CertifiedClassifier(network, class_names)


def _copy(network: CertifiedNetwork) -> CertifiedNetwork:
    """In float32 and evaluation mode, where its weights are; no gradient of them is needed."""
    with torch.device(next(network.parameters()).device):
        copied = build_network(network.configuration).float().eval()
    copied.load_state_dict(network.state_dict())
    return copied.requires_grad_(False)


def _tensor(images: Images) -> Tensor:
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise ModelError(
            f"images are a {type(images).__name__}; needed: a tensor or array (B, C, H, W) of uint8"
        )
    return images
