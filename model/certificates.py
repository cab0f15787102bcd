"""Certified radii and certified robust accuracy (docs/certificate.md, sections 1 and 6)."""

import dataclasses
import functools
import math
from typing import Protocol

import torch
from torch import Tensor

from model.contract import CertifiedNetwork
from model.errors import ModelError
from model.lipschitz import Matrices
from model.rounding import PROGRAMS, Program

STANDARD_EPS = {"36_255": 36 / 255, "72_255": 72 / 255, "108_255": 108 / 255, "255_255": 1.0}
"""Radii that are reported, in pixels of [0, 1], by their name in metrics."""

_DOWN = 1 - 2.0**-50
"""Factor below 1 that outweighs eight roundings of float64."""


class MarginGeometry(Protocol):
    """How far the features must move until a margin is used up."""

    def feature_radius(self, margins: Tensor, prediction: Tensor) -> Tensor:
        """Distances in feature space, non-decreasing in the margins.

        Args:
            margins: logit of the prediction minus each logit, less what rounding may have done,
                shape (B, K). Where it is not positive the result must not be positive.
            prediction: class of each sample, shape (B,).

        Returns:
            shape (B, K); the entry of the prediction itself is infinite.
        """


@dataclasses.dataclass(frozen=True)
class LinearMargins:
    """Each difference of logits is Lipschitz in the features with a constant of its own.

    Linear heads in l2 (factor ||v_i - v_j||), and networks whose logits are each 1-Lipschitz in
    l-infinity (factor 2).
    """

    factors: Tensor
    """Lipschitz constants of the differences, shape (K, K)."""

    def feature_radius(self, margins: Tensor, prediction: Tensor) -> Tensor:
        """Margin / factor; a factor of 0 does not limit a positive margin, a tie has radius 0."""
        rates = self.factors[prediction]
        free = torch.where(margins > 0, torch.inf, 0.0)
        radii = torch.where(rates > 0, margins / rates, free)
        return radii.scatter(1, prediction[:, None], torch.inf)


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


def certify(logits: Tensor, factors: Tensor, labels: Tensor, *, lipschitz: float) -> Certificates:
    """Nominal certificates: r = min over j != pred of (y_pred - y_j) / (lipschitz * factor).

    Args:
        logits: shape (B, K).
        factors: Lipschitz constants of logit differences in the features, shape (K, K).
        labels: true classes, shape (B,), integers.
        lipschitz: Lipschitz constant of the features in the pixels; 1 for the nominal column.

    Raises:
        ModelError: shapes that do not match, a value that is not finite, a label out of range.
    """
    _check(logits, factors, labels, lipschitz)
    prediction = logits.argmax(1)
    margins = logits.gather(1, prediction[:, None]) - logits
    radii = LinearMargins(factors).feature_radius(margins, prediction) / lipschitz
    none = torch.zeros_like(margins[:, 0])
    return _certificates(logits, margins, prediction, labels, radii, (none, none))


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

    def certify(self, logits: Tensor, norms: Tensor, labels: Tensor) -> Certificates:
        """Certificates of a batch.

        Args:
            logits: what the program returned, shape (B, K).
            norms: upper bounds of the l2 norms of the images, shape (B,).
            labels: true classes, shape (B,), integers.

        Raises:
            ModelError: see `certify`.
        """
        logits, norms = logits.double(), norms.double()
        _check(logits, self.factors, labels, self.lipschitz)
        prediction = logits.argmax(1)
        margins = logits.gather(1, prediction[:, None]) - logits
        geometry = LinearMargins(self.factors)

        def radii(left: Tensor) -> Tensor:
            return geometry.feature_radius(left, prediction) / self.lipschitz

        # No certificate can be larger than the one without error terms: that bounds the ball.
        outer = radii(margins).amin(1)
        error = self._error(norms)
        error_ball = self._error((norms + outer) * (1 + 2.0**-50))
        left = margins * _DOWN - error[:, None] - error_ball[:, None]
        proved = radii(left) * _DOWN
        return _certificates(logits, margins, prediction, labels, proved, (error, error_ball))

    def _error(self, norms: Tensor) -> Tensor:
        return self.network.margin_error(
            norms,
            self.program,
            matrices=self.matrices,
            largest_factor=float(self.factors.max()),
        )


def image_norms(pixels: Tensor) -> Tensor:
    """Upper bounds of the l2 norms of 8-bit images, in pixels of [0, 1], float64 (B,).

    Args:
        pixels: uint8 (B, C, H, W).

    Raises:
        ModelError: another type.
    """
    if pixels.dtype != torch.uint8:
        raise ModelError(f"images of type {pixels.dtype}; the norm is exact for uint8 only")
    squares = pixels.flatten(1).long().square().sum(1)
    return squares.double().sqrt() / 255 * (1 + 2.0**-50)


def program_of(name: str) -> Program:
    """Arithmetic by its torch type.

    Raises:
        ModelError: unknown name.
    """
    if name not in PROGRAMS:
        raise ModelError(f"unknown program {name!r}; known: {', '.join(PROGRAMS)}")
    return PROGRAMS[name]


def cra(radius: Tensor, correct: Tensor, eps: float) -> float:
    """Certified robust accuracy: share of samples that are correct with radius > eps (strict).

    Args:
        radius: shape (N,).
        correct: bool, shape (N,).
        eps: l2 radius in pixels of [0, 1].

    Raises:
        ModelError: no samples, shapes that differ, or an eps that is not a radius.
    """
    if radius.shape != correct.shape or radius.numel() == 0:
        raise ModelError(
            f"radius has shape {tuple(radius.shape)} and correct {tuple(correct.shape)}; "
            "both must have the same positive number of samples"
        )
    if not 0 <= eps < math.inf:
        raise ModelError(f"eps={eps} must be finite and not negative")
    return float((correct & (radius > eps)).double().mean())


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


def _check(logits: Tensor, factors: Tensor, labels: Tensor, lipschitz: float) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or factors.shape != (logits.shape[1],) * 2:
        raise ModelError(
            f"logits of shape {tuple(logits.shape)} and factors of shape {tuple(factors.shape)}; "
            "expected (B, K) and (K, K) with K >= 2"
        )
    if not 0 < lipschitz < math.inf:
        raise ModelError(f"lipschitz={lipschitz} must be finite and positive")
    if not bool(logits.isfinite().all()):
        raise ModelError("logits hold values that are not finite")
    if not bool((factors.isfinite() & (factors >= 0)).all()):
        raise ModelError("margin factors must be finite and not negative")
    if labels.shape != logits.shape[:1]:
        raise ModelError(f"labels of shape {tuple(labels.shape)} for {len(logits)} samples")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ModelError(f"a label lies outside of 0..{logits.shape[1] - 1}")
