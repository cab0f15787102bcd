"""What a plain PyTorch training loop needs beside a network: the optimizer and the loss."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from model.networks.base import CertifiedNetwork
from optim.config import OptimConfig
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from pipeline.losses.emma import emma_loss as mean_emma_loss

_NOT_STORED = ("names", "manifold")
"""Facts of a group that are no settings: a state that is saved holds plain values alone."""


class ManifoldAdam(ReferenceManifoldAdam):
    """Manifold Adam for orthogonal matrices, NAdam for all other parameters, in one process.

    The definition (`optim.reference_adam`) that the sharded optimizer of the pipeline equals.
    Learning-rate schedulers, `state_dict` and `torch.save` work as with any torch optimizer.

    Args:
        parameters: `network.parameters()` of a network of this project, float32 or float64.
        lr: learning rate.
        settings: further fields of `optim.config.OptimConfig`, such as `betas`.

    Raises:
        OptimizerError: a parameter of another type.
        pydantic.ValidationError: a setting that there is not, or out of its range.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3, **settings: Any) -> None:
        config = OptimConfig(lr=lr, **settings)
        named = ((str(place), parameter) for place, parameter in enumerate(parameters))
        super().__init__(parameter_groups(named, config), config)
        for group in self.param_groups:
            for fact in _NOT_STORED:
                group.pop(fact)


def emma_loss(
    network: CertifiedNetwork,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 36 / 255,
    scale: float = 10.0,
) -> Tensor:
    """EMMA (arXiv 2310.02513): cross-entropy of the margins less what a radius can cost.

    Args:
        network: the network, in training mode.
        images: floating point (B, C, H, W), pixels in [0, 1].
        labels: int64 (B,).
        eps: training radius, in the network's norm and pixels of [0, 1].
        scale: inverse temperature of the cross-entropy; the certificate never sees it.

    Returns:
        Scalar tensor, differentiable.

    Raises:
        ModelError: images of another shape or of an integer type.
    """
    logits, rates = network.logits_and_rates(images, labels, eps)
    return mean_emma_loss(logits, rates, labels, eps, scale)
