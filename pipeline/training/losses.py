"""Training losses on margins. Tensors: y_BK logits, d_BK rates of the margins, t_B labels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import LossConfig
from pipeline.training.schedules import StepContext, exponential_decay

_SHIFT_FLOOR = 0.01  # share of the shift a rival keeps once it beats the label (arXiv 2310.02513)
_DIVISION_FLOOR = 1e-8


def emma_loss(y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: Tensor | float, scale: float) -> Tensor:
    """Mean EMMA loss (efficient margin maximisation, arXiv 2310.02513).

    With r_k = y_k - y_t and d_k the Lipschitz constant of r_k, every rival is raised by
    s_k * eps * d_k, s_k = clip(-r_k / (d_k eps), 0.01, 1), detached: the full worst case for a
    rival that is certified, a tie for one that is not, one per cent for one that already wins.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: how fast the margin of the label over each class can fall (CertifiedNetwork.
            logits_and_rates), shape (B, K), 0 for the label.
        t_B: labels, int64, shape (B,).
        eps: training radius, l2 in pixels of [0, 1], >= 0.
        scale: inverse temperature of the cross-entropy, > 0. The certificate never sees it.

    Returns:
        Scalar tensor.
    """
    # The label's own entry of the shifted logits stays 0: its rate is 0.
    return F.cross_entropy(scale * _shifted(y_BK, d_BK, t_B, eps), t_B)


def _shifted(y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: Tensor | float) -> Tensor:
    """Relative logits r_k + s_k eps d_k of emma_loss, shape (B, K)."""
    r_BK = y_BK - y_BK.gather(1, t_B[:, None])
    # The rates keep their gradient: a smaller Lipschitz constant lowers the loss.
    shift_BK = eps * d_BK
    with torch.no_grad():
        s_BK = (-r_BK / shift_BK.clamp_min(_DIVISION_FLOOR)).clamp(_SHIFT_FLOOR, 1.0)
    return r_BK + s_BK * shift_BK


def _emma(y_BK: Tensor, d_BK: Tensor, t_B: Tensor, now: StepContext, config: LossConfig) -> Tensor:
    return emma_loss(y_BK, d_BK, t_B, now.eps, config.scale)


def mixture_loss(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: float, scale: float, weight: float
) -> Tensor:
    """Mean clipped hinge of certified margins, plus a weighted cross-entropy (arXiv 2210.01787).

    mean_B max_k clip(1 + (y_k - y_t) / (eps d_k), 0, 1) counts, with a slope, the samples that are
    not certified at eps; the cross-entropy moves those that are far from it.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss; 2 for 1-Lipschitz logits in l-infinity.
        t_B: labels, int64, shape (B,).
        eps: training radius in the network's norm and pixels of [0, 1], > 0.
        scale: inverse temperature of the cross-entropy, > 0; the paper trains it.
        weight: weight of the cross-entropy, >= 0.

    Returns:
        Scalar tensor.
    """
    r_BK = y_BK - y_BK.gather(1, t_B[:, None])
    hinge_BK = 1 + r_BK / (eps * d_BK).clamp_min(_DIVISION_FLOOR)
    # The label's own entry is 1 + 0 / floor = 1: it would make every maximum 1.
    hinge_B = hinge_BK.scatter(1, t_B[:, None], 0.0).amax(1).clamp(0, 1)
    return hinge_B.mean() + weight * F.cross_entropy(scale * y_BK, t_B)


def _mixture(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, now: StepContext, config: LossConfig
) -> Tensor:
    return mixture_loss(y_BK, d_BK, t_B, now.eps, config.scale, _ce_weight(now, config))


def ce_hinge_loss(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, eps: float, scale: float, weight: float
) -> Tensor:
    """Mean hinge of certified margins of correct samples, plus a weighted cross-entropy.

    mean_B [prediction = t] max(0, 1 + max_{k != t} (y_k - y_t + eps d_k)): a sample whose margin is
    at least 1 all over the radius costs nothing, one that is wrong does not either; the
    cross-entropy moves those (SortNet + MLP, arXiv 2210.01787).

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss.
        t_B: labels, int64, shape (B,).
        eps: training radius in the network's norm and pixels of [0, 1], >= 0.
        scale: inverse temperature of the cross-entropy, > 0; the paper trains it.
        weight: weight of the cross-entropy, >= 0.

    Returns:
        Scalar tensor.
    """
    r_BK = y_BK - y_BK.gather(1, t_B[:, None])
    worst_B = (r_BK + eps * d_BK).scatter(1, t_B[:, None], -torch.inf).amax(1)
    hinge_B = (1 + worst_B).clamp(min=0)
    correct_B = y_BK.argmax(1) == t_B
    return (correct_B * hinge_B).mean() + weight * F.cross_entropy(scale * y_BK, t_B)


def _ce_weight(now: StepContext, config: LossConfig) -> float:
    return exponential_decay(
        now.progress,
        start=config.ce_start,
        end=config.ce_end,
        begin=config.ce_from,
        stop=config.ce_to,
    )


def _ce_hinge(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, now: StepContext, config: LossConfig
) -> Tensor:
    return ce_hinge_loss(y_BK, d_BK, t_B, now.eps, config.scale, _ce_weight(now, config))


def offset_loss(y_BK: Tensor, t_B: Tensor, offset: float, scale: float) -> Tensor:
    """Mean of CE(scale (y - offset onehot(t))) / scale: a margin of `offset` (arXiv 2208.03160).

    Args:
        y_BK: logits, shape (B, K).
        t_B: labels, int64, shape (B,).
        offset: what the logit of the label is lowered by, >= 0.
        scale: inverse temperature, > 0.

    Returns:
        Scalar tensor.
    """
    lowered_BK = y_BK.scatter_add(1, t_B[:, None], y_BK.new_full((len(t_B), 1), -offset))
    return F.cross_entropy(scale * lowered_BK, t_B) / scale


def logit_annealing_loss(
    y_BK: Tensor,
    d_BK: Tensor,
    t_B: Tensor,
    eps: Tensor | float,
    scale: float,
    *,
    offset: float,
    temperature: float,
    exponent: float,
) -> Tensor:
    """Logit annealing after the shift of emma_loss (arXiv 2505.15174).

    With z the shifted logits and l = CE((z - offset onehot(t)) / T, t), the mean of
    T (1 - e^-l)^exponent l: samples whose margin exceeds the offset by far no longer count, so that
    capacity goes where margins are small.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss.
        t_B: labels, int64, shape (B,).
        eps: see emma_loss.
        scale: what the shifted logits are multiplied by, > 0; 1 in the paper.
        offset: what the logit of the label is lowered by, >= 0.
        temperature: T > 0.
        exponent: >= 0.

    Returns:
        Scalar tensor.
    """
    z_BK = scale * _shifted(y_BK, d_BK, t_B, eps)
    lowered_BK = z_BK.scatter_add(1, t_B[:, None], z_BK.new_full((len(t_B), 1), -offset))
    # expm1 and not 1 - exp: a confident sample has l near 0, where the difference has no digits.
    l_B = F.cross_entropy(lowered_BK / temperature, t_B, reduction="none")
    return (temperature * (-torch.expm1(-l_B)).pow(exponent) * l_B).mean()


def _annealing(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, now: StepContext, config: LossConfig
) -> Tensor:
    return logit_annealing_loss(
        y_BK,
        d_BK,
        t_B,
        now.eps,
        config.scale,
        offset=config.offset,
        temperature=config.temperature,
        exponent=config.exponent,
    )


def _offset(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, now: StepContext, config: LossConfig
) -> Tensor:
    return offset_loss(y_BK, t_B, config.offset, config.scale)


def certificate_loss(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, scale: float, weight: float
) -> Tensor:
    """Mean cross-entropy less `weight` times the certified radius (CR, arXiv 2108.04062).

    The radius min_j (y_t - y_j) / d_j counts where it is positive, and is differentiated through
    the logits and the rates.

    Args:
        y_BK: logits, float32 or wider, shape (B, K).
        d_BK: see emma_loss.
        t_B: labels, int64, shape (B,).
        scale: inverse temperature of the cross-entropy, > 0.
        weight: what one unit of radius is worth, >= 0.

    Returns:
        Scalar tensor.
    """
    margin_BK = y_BK.gather(1, t_B[:, None]) - y_BK
    r_BK = margin_BK / d_BK.clamp_min(_DIVISION_FLOOR)
    r_B = r_BK.scatter(1, t_B[:, None], torch.inf).amin(1)
    return F.cross_entropy(scale * y_BK, t_B) - weight * r_B.relu().mean()


def _certificate(
    y_BK: Tensor, d_BK: Tensor, t_B: Tensor, now: StepContext, config: LossConfig
) -> Tensor:
    return certificate_loss(y_BK, d_BK, t_B, config.scale, config.certificate_weight)


Loss = Callable[[Tensor, Tensor, Tensor, StepContext, LossConfig], Tensor]
"""(logits, rates, labels, moment, settings) -> mean loss."""

LOSSES: dict[str, Loss] = {
    "emma": _emma,
    "logit_annealing": _annealing,
    "mixture": _mixture,
    "ce_hinge": _ce_hinge,
    "offset": _offset,
    "certificate": _certificate,
}
"""By `LossConfig.kind`."""
