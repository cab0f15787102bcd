"""Certified radii and certified robust accuracy: pure functions of logits and margin factors."""

import dataclasses
import math

import torch
from torch import Tensor

from model.errors import ModelError

STANDARD_EPS = {"36_255": 36 / 255, "72_255": 72 / 255, "108_255": 108 / 255, "255_255": 1.0}
"""Radii that are reported, in pixels of [0, 1], by their name in metrics."""


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


def certified_radius(
    logits: Tensor, factors: Tensor, *, lipschitz: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Certified radius of the predicted class.

    r = min over j != pred of (y_pred - y_j) / (lipschitz * factors[pred, j]). A factor of 0 does
    not limit a positive margin; a tie has radius 0.

    Args:
        logits: shape (B, K).
        factors: Lipschitz constants of logit differences in the features, shape (K, K).
        lipschitz: Lipschitz constant of the features in the pixels; 1 for the nominal column.

    Returns:
        radius, prediction, rival, margin, each of shape (B,).

    Raises:
        ModelError: shapes that do not match, or a value that is not finite.
    """
    _check(logits, factors, lipschitz)
    prediction = logits.argmax(1)
    own = prediction[:, None]
    margins = logits.gather(1, own) - logits
    rates = lipschitz * factors[prediction]
    free = torch.where(margins > 0, torch.inf, 0.0)
    radii = torch.where(rates > 0, margins / rates, free).scatter(1, own, torch.inf)
    radius, rival = radii.min(1)
    # If no rival limits the radius, name the runner-up, not whichever column comes first.
    runner_up = logits.scatter(1, own, -torch.inf).argmax(1)
    rival = torch.where(radius.isinf(), runner_up, rival)
    return radius, prediction, rival, margins.gather(1, rival[:, None]).squeeze(1)


def certify(logits: Tensor, factors: Tensor, labels: Tensor, *, lipschitz: float) -> Certificates:
    """Certificates of a batch.

    Args:
        logits: shape (B, K).
        factors: shape (K, K).
        labels: true classes, shape (B,), integers.
        lipschitz: Lipschitz constant of the features in the pixels.

    Raises:
        ModelError: see certified_radius; labels of another shape or range.
    """
    radius, prediction, rival, margin = certified_radius(logits, factors, lipschitz=lipschitz)
    if labels.shape != prediction.shape:
        raise ModelError(f"labels of shape {tuple(labels.shape)} for {len(logits)} samples")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ModelError(f"a label lies outside of 0..{logits.shape[1] - 1}")
    return Certificates(prediction, prediction == labels, rival, margin, radius)


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


def _check(logits: Tensor, factors: Tensor, lipschitz: float) -> None:
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
