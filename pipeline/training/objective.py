"""The module that DeepSpeed trains: network plus loss, from uint8 images to one scalar."""

import torch
from torch import Tensor, nn

from model.networks.base import CertifiedNetwork
from pipeline.losses.base import Loss
from pipeline.training.schedules import StepContext

STATISTICS = ("loss", "clean", "certified", "samples")
"""Order of the sums that Objective returns."""


class Objective(nn.Module):
    """Network and loss in one forward pass.

    The margin factors of the head exist only inside the forward pass under ZeRO-3, so the loss and
    the training statistics are computed here. The mean over the micro-batch is the loss.
    """

    def __init__(self, network: CertifiedNetwork, loss: Loss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, images: Tensor, labels: Tensor, now: StepContext) -> tuple[Tensor, Tensor]:
        """Loss and statistics of one micro-batch.

        Args:
            images: uint8, shape (B, C, H, W).
            labels: int64, shape (B,).
            now: training radius and progress of the run.

        Returns:
            The mean loss (scalar) and float32 sums over the micro-batch in the order STATISTICS;
            `certified` counts samples whose margins exceed their rates times the reference radius.
        """
        pixels = images.to(torch.float32) / 255
        logits, rates = self.network.logits_and_rates(pixels, labels, now.eps)
        loss = self.loss.mean(logits, rates, labels, eps=now.eps, progress=now.progress)
        # Exactly 1 for a finite loss; else every gradient is NaN too, which the engine notices.
        loss = loss * (1 + 0 * loss.detach())
        with torch.no_grad():
            label_logit = logits.gather(1, labels[:, None])
            rivals = logits.scatter(1, labels[:, None], -torch.inf)
            raised = rivals + self.loss.eps * rates
            clean = label_logit > rivals.amax(1, keepdim=True)
            certified = label_logit > raised.amax(1, keepdim=True)
            count = torch.tensor(float(len(labels)), device=loss.device)
            sums = torch.stack(
                [loss.detach().float() * count, clean.sum().float(), certified.sum().float(), count]
            )
        return loss, sums
