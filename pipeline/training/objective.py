"""The module that DeepSpeed trains: network plus loss, from uint8 images to one scalar."""

import torch
from torch import Tensor, nn

from model.networks.base import CertifiedNetwork
from pipeline.losses.base import Loss
from pipeline.training.metrics import STATISTICS, ForwardPass
from pipeline.training.schedules import StepContext


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
