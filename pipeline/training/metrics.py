"""What training measures of its forward passes: the metrics of `STATISTICS`.

A metric is added there; records show it under its name. `metric_reducer.py` adds them up over the
ranks. A hook has metrics of its own (`metrics` in `hooks.py`).
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from pipeline.training.metric_reducer import SAMPLES, Metric, Reduction


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """What statistics of a micro-batch are computed from; nothing is differentiated."""

    loss: Tensor
    """Mean loss, float32 scalar."""
    rates: Tensor
    """How fast the margin of the label over each class can fall, shape (B, K), 0 for the label."""
    label_logit: Tensor
    """Shape (B, 1)."""
    rivals: Tensor
    """The logits, -inf at the label, shape (B, K)."""
    samples: Tensor
    """B, float32 scalar."""
    eps: float
    """Reference radius, in the network's norm and pixels of [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A metric that the forward pass knows, and its sum over the samples of a micro-batch."""

    metric: Metric
    total: Callable[[ForwardPass], Tensor]
    """Float32 scalar, on the device of the pass."""


def _loss(found: ForwardPass) -> Tensor:
    return found.loss * found.samples


def _clean(found: ForwardPass) -> Tensor:
    """Samples whose label has the largest logit; a tie counts as wrong."""
    return (found.label_logit > found.rivals.amax(1, keepdim=True)).sum().float()


def _certified(found: ForwardPass) -> Tensor:
    """Samples whose margins exceed their rates times the reference radius."""
    raised = found.rivals + found.eps * found.rates
    return (found.label_logit > raised.amax(1, keepdim=True)).sum().float()


STATISTICS = (
    Statistic(Metric("train/loss", Reduction.MEAN), _loss),
    Statistic(Metric("train/clean", Reduction.MEAN), _clean),
    Statistic(Metric("train/certified", Reduction.MEAN), _certified),
    Statistic(Metric(SAMPLES, Reduction.SUM, recorded=False), lambda found: found.samples),
)
