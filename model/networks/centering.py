"""Centering of activations: a translation, so it changes no Lipschitz constant."""

import torch
from torch import Tensor, nn


class Centering(nn.Module):
    """x - mean, with one mean per feature, over the batch and all positions.

    In training the mean is that of the batch, and gradients flow through it. In evaluation it is
    the stored one. The stored means are no training state: whoever exports a network calibrates
    it once (`CertifiedNetwork.calibrate`), in place of a running average.

    Args:
        features: number of features.
        axis: axis of the features.
    """

    mean: Tensor

    def __init__(self, features: int, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("mean", torch.zeros(features))
        self._batches: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Centre x; its axis `axis` has the features."""
        mean = self.mean
        if self.training or self._batches is not None:
            mean = self.batch_mean(x)
        if self._batches is not None:
            self._batches += 1
            self.mean += (mean - self.mean) / self._batches
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x - mean.to(x.dtype).view(shape)

    def batch_mean(self, x: Tensor) -> Tensor:
        """Mean of every feature, in float32 or wider."""
        others = [i for i in range(x.ndim) if i != self.axis % x.ndim]
        return x.mean(others, dtype=torch.promote_types(x.dtype, torch.float32))

    def begin(self) -> None:
        """From here on: use batch means and average them into the stored mean."""
        self.mean.zero_()
        self._batches = 0

    def end(self) -> None:
        """Back to the stored mean."""
        self._batches = None
