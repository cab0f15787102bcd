"""Predictions with their sound radius, from a model artifact alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_shards.storage.store import Store
from jobs.errors import EvaluationError
from model.artifact.artifact import DESCRIPTION, ArtifactInfo, read_artifact
from model.certification.eps import eps_value
from model.certification.matrix_bounds import Matrices, MatrixBound, tensor_digest
from model.certification.rounding import FLOAT64
from model.certify import Certificates, ProvedCertifier, image_norms
from model.networks.base import CertifiedNetwork
from pipeline.run import layout

_BATCH = 256


def artifact_url(url: str) -> str:
    """The artifact at a URL; of a run's folder the one that was evaluated on test, else the newest.

    Args:
        url: of an artifact, or of the folder of a run.
    """
    run = Store(url)
    if run.exists(DESCRIPTION):  # no server need list anything for it
        return url
    found = map(layout.step_of, run.ls(layout.ARTIFACTS))
    steps = sorted((step for step in found if step is not None), reverse=True)
    result = layout.evaluation("test") + f"/{layout.SUMMARY}"
    for step in steps:
        if run.exists(f"{layout.artifact(step)}/{result}"):
            return run.child(layout.artifact(step)).url
    return run.child(layout.artifact(steps[0])).url if steps else url


class SoundNetwork:
    """The float64 program of a network, and the radii that are proved of it.

    Args:
        network: in float32 or float64 and evaluation mode; it becomes a float64 network.
        matrices: proved bounds of its matrices; default: they are computed.

    Raises:
        ModelError: nothing can be proved of it.
    """

    def __init__(self, network: CertifiedNetwork, matrices: Matrices | None = None) -> None:
        self.network = network.double()  # exact: stored weights are float32
        bounds = self.network.matrix_bounds() if matrices is None else matrices
        self._certifier = ProvedCertifier(self.network, FLOAT64, bounds)

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Certificates:
        """Certificates of the predicted classes (`correct` is true of every sample).

        Args:
            pixels: uint8 (B, C, H, W), exactly as the network's source has them.

        Raises:
            ModelError: other shapes or types.
        """
        device = next(self.network.parameters()).device
        norms = image_norms(pixels, self.network.norm).to(device)
        with torch.autocast(device.type, enabled=False):
            images = pixels.to(device, torch.float64) / 255
            logits, slopes = self.network.logits_and_slopes(images)
        return self._certifier.certify(logits, norms, logits.argmax(1), slopes)


class SoundPredictor:
    """The float64 program of an artifact, and the radii that are proved of it.

    Nothing that was stored about the weights is believed: the bounds of all matrices are computed
    from the weights, or belong to them by digest.

    Args:
        url: the model artifact.
        digest: digest that the artifact must have; None accepts any.
        device: `cpu`, `cuda`, or `auto`: cuda where there is one.
        matrices: bounds of the matrices, where the caller has computed them.

    Raises:
        EvaluationError: another digest, or bounds of other weights.
        ModelError: the artifact is damaged, or nothing can be proved of it.
        FileNotFoundError: there is no artifact.
    """

    def __init__(
        self,
        url: str,
        *,
        digest: str | None = None,
        device: str = "auto",
        matrices: Iterable[MatrixBound] | None = None,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        artifact = read_artifact(Store(url).open, device=torch.device(device))
        self.info: ArtifactInfo = artifact.info
        if digest is not None and digest != self.info.digest:
            raise EvaluationError(
                f"the artifact at {Store(url)} has digest {self.info.digest}, not {digest}"
            )
        bounds = None
        if matrices is not None:
            bounds = {matrix.name: matrix for matrix in matrices}
            for name, bound in bounds.items():
                if tensor_digest(artifact.network.get_parameter(name)) != bound.sha256:
                    raise EvaluationError(f"{name} of {Store(url)} is not the matrix bounded")
        self._sound = SoundNetwork(artifact.network, bounds)

    def predict(self, pixels: Tensor) -> Certificates:
        """See `SoundNetwork.predict`."""
        return self._sound.predict(pixels)


class CertifiedModel:
    """A registered model as ``mlflow.pyfunc`` loads it (see served_model.py).

    Args:
        artifact_url: the model artifact.
        artifact_digest: the digest that the gate registered.
        eps: radius of the verdict, a ratio such as ``36/255``.
        device: see SoundPredictor.
    """

    def __init__(
        self, *, artifact_url: str, artifact_digest: str, eps: str, device: str = "auto"
    ) -> None:
        self._predictor = SoundPredictor(artifact_url, digest=artifact_digest, device=device)
        self._eps = eps

    def predict(self, images: npt.NDArray[np.uint8], eps: str | None = None) -> Mapping[str, Any]:
        """Class, certified radius and verdict of every image.

        Args:
            images: uint8 (B, C, H, W), exactly as the network's source has them.
            eps: radius of the verdict; default: that of the registered model.

        Returns:
            `label` (int64) and `class`, its name, `radius` (float64, in the network's norm, pixels
            in [0, 1]), `eps` and `certified`: the radius exceeds eps, so nothing within eps changes
            the label.

        Raises:
            ModelError: other shapes or types.
            ValueError: eps is no ratio.
        """
        eps = eps or self._eps
        limit = eps_value(eps)
        batches = np.split(images, range(_BATCH, len(images), _BATCH))
        found = [self._predictor.predict(torch.from_numpy(batch.copy())) for batch in batches]
        radius = np.concatenate([f.radius.cpu().numpy() for f in found])
        labels = np.concatenate([f.prediction.cpu().numpy() for f in found])
        return {
            "label": labels,
            "class": [self._predictor.info.class_name(label) for label in labels.tolist()],
            "radius": radius,
            "eps": [eps] * len(radius),
            "certified": radius > limit,
        }
