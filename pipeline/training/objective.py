"""The module that DeepSpeed trains: network plus loss, from uint8 images to one scalar.

A statistic of training is added in STATISTICS; records show it under the name of its metric.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.networks.base import CertifiedNetwork
from pipeline.losses.base import Loss
from pipeline.training.metric_reducer import SAMPLES, Metric, Reduction
from pipeline.training.schedules import StepContext


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


class Objective(nn.Module):
    """Network and loss in one forward pass.

    The margin factors of the head exist only inside the forward pass under ZeRO-3, so the loss and
    the training statistics are computed here. The mean over the micro-batch is the loss.

    Attributes:
        statistics: what the second result of `forward` holds, in this order.
    """

    def __init__(self, network: CertifiedNetwork, loss: Loss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.statistics = STATISTICS

    def forward(self, images: Tensor, labels: Tensor, now: StepContext) -> tuple[Tensor, Tensor]:
        """Loss and statistics of one micro-batch.

        Args:
            images: uint8, shape (B, C, H, W).
            labels: int64, shape (B,).
            now: training radius and progress of the run.

        Returns:
            The mean loss (scalar) and the sums of `statistics` over the micro-batch, float32, shape
            (number of statistics,).
        """
        # Here and not in the stream: uint8 is a quarter of the bytes that travel to the device.
        pixels = images.to(torch.float32) / 255
        logits, rates = self.network.logits_and_rates(pixels, labels, now.eps)
        loss = self.loss.mean(logits, rates, labels, eps=now.eps, progress=now.progress)
        # Exactly 1 for a finite loss; else every gradient is NaN too, which the engine notices.
        loss = loss * (1 + 0 * loss.detach())
        with torch.no_grad():
            found = ForwardPass(
                # 16 bit could not hold the sum of a batch's losses to the digits that are shown.
                loss=loss.detach().float(),
                rates=rates,
                label_logit=logits.gather(1, labels[:, None]),
                rivals=logits.scatter(1, labels[:, None], -torch.inf),
                # Filled on the device: a value of the host would be copied, and waited for.
                samples=logits.new_full((), float(len(labels)), dtype=torch.float32),
                eps=self.loss.eps,
            )
            # One tensor, so that the sums of a record leave the device in one copy.
            sums = torch.stack([statistic.total(found) for statistic in self.statistics])
        return loss, sums
