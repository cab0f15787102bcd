"""What every certified network offers to training and to certification."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from model.errors import ModelError
from model.initial import initial_value


@dataclasses.dataclass(frozen=True)
class LipschitzBound:
    """Proved Lipschitz constant of the features with respect to the pixels, head excluded."""

    value: float
    """Product of the parts, rounded up."""
    parts: dict[str, float]
    """Bound of each layer by name; layers that are 1-Lipschitz by construction are left out."""


class CertifiedNetwork(nn.Module, ABC):
    """A classifier whose logit differences have known Lipschitz constants.

    The difference of logits i and j is Lipschitz with `lipschitz_upper_bound().value *
    factors[i, j]` on all of R^n, where `factors` comes from `logits_and_margin_factors`.
    Every parameter carries `initial` (see model.initial) and, if constrained, its manifold.

    Attributes:
        norm: norm on images, `l2` or `linf`.
        input_shape: (C, H, W) of the images.
        num_classes: number K of logits.
        checkpoint_blocks: recompute each block in the backward pass instead of storing it.
    """

    norm: Literal["l2", "linf"]
    input_shape: tuple[int, int, int]
    num_classes: int
    checkpoint_blocks: bool = False

    @abstractmethod
    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the Lipschitz constants of their differences in the features.

        Args:
            images: shape (B, *input_shape), floating point, pixels in [0, 1].

        Returns:
            Logits (B, K) and factors (K, K), both float32 or wider and differentiable.

        Raises:
            ModelError: images of another shape or of an integer type.
        """

    @abstractmethod
    def lipschitz_upper_bound(self) -> LipschitzBound:
        """Proved bound for the real function of the stored weights, computed in float64.

        Raises:
            ModelError: a weight is not finite.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, *input_shape); see logits_and_margin_factors."""
        return self.logits_and_margin_factors(images)[0]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its initial value, made in float64 and then rounded."""
        for name, p in self.named_parameters():
            p.copy_(initial_value(p.initial, p.shape, seed=seed, name=name))  # type: ignore[attr-defined]

    def check_images(self, images: Tensor) -> None:
        """Refuse images of a wrong shape or type.

        Raises:
            ModelError: naming what came and what is expected.
        """
        if tuple(images.shape[1:]) != self.input_shape:
            raise ModelError(
                f"images of shape {tuple(images.shape)}; the network takes (B, C, H, W) = "
                f"(B, {', '.join(map(str, self.input_shape))})"
            )
        if not images.is_floating_point():
            raise ModelError(
                f"images of type {images.dtype}; the network takes floating point pixels in "
                "[0, 1]: divide 8-bit values by 255 first"
            )
