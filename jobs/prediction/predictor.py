"""Predictions with their sound radius, from a model artifact alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_shards.storage.store import Store
from jobs.evaluation.sample_records import EvaluationError
from model.artifact.artifact import ArtifactInfo, read_artifact
from model.certification.eps import eps_value
from model.certification.matrix_bounds import MatrixBound, tensor_digest
from model.certification.rounding import FLOAT64
from model.certify import Certificates, ProvedCertifier, image_norms

_BATCH = 256


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
        self._device = torch.device(device)
        artifact = read_artifact(Store(url).open, device=self._device)
        self.info: ArtifactInfo = artifact.info
        if digest is not None and digest != self.info.digest:
            raise EvaluationError(
                f"the artifact at {Store(url)} has digest {self.info.digest}, not {digest}"
            )
        self._network = artifact.network.double()  # exact: the stored weights are float32
        if matrices is None:
            bounds = self._network.matrix_bounds()
        else:
            bounds = {matrix.name: matrix for matrix in matrices}
            for name, bound in bounds.items():
                if tensor_digest(self._network.get_parameter(name)) != bound.sha256:
                    raise EvaluationError(f"{name} of {Store(url)} is not the matrix bounded")
        self._certifier = ProvedCertifier(self._network, FLOAT64, bounds)

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Certificates:
        """Certificates of the predicted classes (`correct` is true of every sample).

        Args:
            pixels: uint8 (B, C, H, W), exactly as the network's source has them.

        Raises:
            ModelError: other shapes or types.
        """
        norms = image_norms(pixels, self._network.norm)
        with torch.autocast(self._device.type, enabled=False):
            images = pixels.to(self._device, torch.float64) / 255
            logits, slopes = self._network.logits_and_slopes(images)
        norms = norms.to(self._device)
        return self._certifier.certify(logits, norms, logits.argmax(1), slopes)


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
            `label` (int64), `radius` (float64, in the network's norm, pixels in [0, 1]), `eps` and
            `certified`: the radius exceeds eps, so nothing within eps changes the label.

        Raises:
            ModelError: other shapes or types.
            ValueError: eps is no ratio.
        """
        eps = eps or self._eps
        limit = eps_value(eps)
        batches = np.split(images, range(_BATCH, len(images), _BATCH))
        found = [self._predictor.predict(torch.from_numpy(batch.copy())) for batch in batches]
        radius = np.concatenate([f.radius.cpu().numpy() for f in found])
        return {
            "label": np.concatenate([f.prediction.cpu().numpy() for f in found]),
            "radius": radius,
            "eps": [eps] * len(radius),
            "certified": radius > limit,
        }
