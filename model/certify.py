"""Certified radii (docs/explanation/certificate.md, sections 1 and 6)."""

import dataclasses
import functools
import math
from typing import Literal

import torch
from torch import Tensor

from model.certification.feature_radii import Radii, slope_radii
from model.certification.matrix_bounds import Matrices
from model.certification.rounding import FLOAT64, Program
from model.errors import ModelError
from model.networks.base import CertifiedNetwork

SLACK_OF_RADII = 2.0**-26
"""What a stated radius is below the proved one, so that another program can prove it, too."""


@dataclasses.dataclass(frozen=True)
class Certificates:
    """One row per sample, all of shape (B,)."""

    prediction: Tensor
    """Class of the largest logit, int64."""
    correct: Tensor
    """Whether that is the label, bool."""
    rival: Tensor
    """The class whose decision boundary limits the radius, int64."""
    margin: Tensor
    """Logit of the prediction minus logit of the rival."""
    radius: Tensor
    """The prediction is constant on the open ball of this radius, in pixels of [0, 1]."""
    error: Tensor
    """Error of a margin at the sample that was subtracted; 0 in the nominal column."""
    error_ball: Tensor
    """Largest error of a margin on the ball that was subtracted; 0 in the nominal column."""


def certify(
    logits: Tensor,
    slopes: Tensor,
    labels: Tensor,
    *,
    lipschitz: float,
    curvature: Tensor | None = None,
    radii: Radii = slope_radii,
) -> Certificates:
    """Nominal certificates: the smallest radius over all classes j != pred.

    Args:
        logits: shape (B, K).
        slopes: how fast differences of logits fall at the image, (B, K, K), or everywhere, (K, K).
        labels: true classes, shape (B,), integers.
        lipschitz: Lipschitz constant in the pixels of what the slopes are stated in; 1 for the
            nominal column.
        curvature: how fast slopes can grow, (K, K); None: not at all.
        radii: `feature_radii` of the network, which also says what its slopes are.

    Raises:
        ModelError: shapes that do not match, a value that is not finite, a label out of range.
    """
    if curvature is None:
        curvature = slopes.new_zeros(logits.shape[-1:] * 2)
    _check(logits, labels, lipschitz)
    prediction = logits.argmax(1)
    margins = logits.gather(1, prediction[:, None]) - logits
    geometry = _Geometry(prediction, slopes, curvature.to(slopes), lipschitz, radii)
    none = torch.zeros_like(margins[:, 0])
    return _certificates(logits, margins, prediction, labels, geometry(margins), (none, none))


@dataclasses.dataclass(frozen=True)
class ProvedCertifier:
    """Certificates that hold in floating point, for one network and one program.

    The radius holds for the real-valued function of the stored weights and for the program itself:
    the a-priori error of a margin is subtracted at the sample and once more for the whole ball.
    """

    network: CertifiedNetwork
    """The network with its stored weights, in float32 or float64."""
    program: Program
    """Arithmetic that computed the logits."""
    matrices: Matrices
    """Bounds of the network's matrices."""

    @functools.cached_property
    def lipschitz(self) -> float:
        """Proved Lipschitz constant of the features in the pixels."""
        return self.network.lipschitz_upper_bound(self.matrices).value

    @functools.cached_property
    def factors(self) -> Tensor:
        """Proved margin factors, float64 (K, K)."""
        return self.network.margin_factor_bounds()

    @functools.cached_property
    def curvature(self) -> Tensor:
        """Proved curvature of the margins, float64 (K, K)."""
        return self.network.curvature_bounds()

    def certify(
        self, logits: Tensor, norms: Tensor, labels: Tensor, slopes: Tensor | None = None
    ) -> Certificates:
        """Certificates of a batch.

        Args:
            logits: what the program returned, shape (B, K).
            norms: upper bounds of the norms of the images, shape (B,).
            labels: true classes, shape (B,), integers.
            slopes: of `logits_and_slopes` in float64; a network with a linear head needs none.

        Raises:
            ModelError: see `certify`; or the head is curved and there are no slopes.
        """
        logits, norms = logits.double(), norms.double()
        proved = self._slopes(slopes, norms)
        _check(logits, labels, self.lipschitz)
        prediction = logits.argmax(1)
        margins = logits.gather(1, prediction[:, None]) - logits
        geometry = _Geometry(
            prediction, proved, self.curvature, self.lipschitz, self.network.feature_radii
        )
        # No certificate can be larger than the one without error terms: that bounds the ball.
        outer = geometry(margins).amin(1)
        error = self._error(norms)
        error_ball = self._error((norms + outer) * (1 + 2.0**-50))
        # The verifier proves the radius with its own logits and bounds: section 6 of the document.
        sizes = margins + (error + error_ball)[:, None]
        counted = 3 if self.program is FLOAT64 else 1
        left = margins - (counted * error + error_ball)[:, None] - SLACK_OF_RADII * sizes
        found = geometry(left) * (1 - SLACK_OF_RADII)
        proof = _certificates(logits, margins, prediction, labels, found, (error, error_ball))
        # A radius that was searched for may be found a little better the second time.
        return dataclasses.replace(proof, radius=torch.minimum(proof.radius, outer.clamp(min=0)))

    def _slopes(self, slopes: Tensor | None, norms: Tensor) -> Tensor:
        if slopes is not None and slopes.ndim == 3:
            return self.network.slope_bounds(slopes.double(), norms, matrices=self.matrices)
        if bool(self.curvature.any()):
            raise ModelError("the head is curved: its certificate needs the slopes at the images")
        return self.factors

    def _error(self, norms: Tensor) -> Tensor:
        return self.network.margin_error(
            norms,
            self.program,
            matrices=self.matrices,
            largest_factor=float(self.factors.max()),
        )


def image_norms(pixels: Tensor, norm: Literal["l2", "linf"] = "l2") -> Tensor:
    """Upper bounds of the norms of 8-bit images, in pixels of [0, 1], float64 (B,).

    Args:
        pixels: uint8 (B, C, H, W).
        norm: norm of the network; that in l2 also bounds that in l-infinity.

    Raises:
        ModelError: another type.
    """
    if pixels.dtype != torch.uint8:
        raise ModelError(f"images of type {pixels.dtype}; the norm is exact for uint8 only")
    if norm == "linf":
        return pixels.flatten(1).amax(1).double() / 255 * (1 + 2.0**-50)
    squares = pixels.flatten(1).long().square().sum(1)
    return squares.double().sqrt() / 255 * (1 + 2.0**-50)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """What turns the margins of some predictions into radii."""

    prediction: Tensor
    slopes: Tensor
    curvature: Tensor
    lipschitz: float
    rule: Radii

    def __call__(self, margins: Tensor) -> Tensor:
        """Radii (B, K) of margins (B, K); infinite for the prediction itself."""
        found = self.rule(margins, self.slopes, self.curvature, self.prediction) / self.lipschitz
        return found.scatter(1, self.prediction[:, None], torch.inf)


def _certificates(
    logits: Tensor,
    margins: Tensor,
    prediction: Tensor,
    labels: Tensor,
    radii: Tensor,
    errors: tuple[Tensor, Tensor],
) -> Certificates:
    rival = radii.argmin(1)
    radius = radii.gather(1, rival[:, None]).squeeze(1).clamp(min=0)
    # If no rival limits the radius, name the runner-up, not whichever column comes first.
    runner_up = logits.scatter(1, prediction[:, None], -torch.inf).argmax(1)
    rival = torch.where(radius.isinf(), runner_up, rival)
    margin = margins.gather(1, rival[:, None]).squeeze(1)
    return Certificates(prediction, prediction == labels, rival, margin, radius, *errors)


def _check(logits: Tensor, labels: Tensor, lipschitz: float) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ModelError(f"logits of shape {tuple(logits.shape)}; expected (B, K) with K >= 2")
    if not 0 < lipschitz < math.inf:
        raise ModelError(f"lipschitz={lipschitz} must be finite and positive")
    if not bool(logits.isfinite().all()):
        raise ModelError("logits hold values that are not finite")
    if labels.shape != logits.shape[:1]:
        raise ModelError(f"labels of shape {tuple(labels.shape)} for {len(logits)} samples")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ModelError(f"a label lies outside of 0..{logits.shape[1] - 1}")
