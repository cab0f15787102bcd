"""What every certified network offers to training and to certification."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.certification.feature_radii import slope_radii
from model.certification.matrix_bounds import Matrices, MatrixBound, matrix_bound
from model.certification.rounding import Program
from model.errors import ModelError
from model.networks.centering import Centering
from model.networks.config import NetworkConfig
from model.networks.init import initial_kind, initial_value


@dataclasses.dataclass(frozen=True)
class LipschitzBound:
    """Proved Lipschitz constant of the features with respect to the pixels, head excluded."""

    value: float
    """Product of the parts, rounded up."""
    parts: Mapping[str, float]
    """Bound of each layer by name; layers that are 1-Lipschitz by construction are left out."""

    @classmethod
    def product(
        cls, parts: Mapping[str, float], factors: Iterable[float] | None = None
    ) -> "LipschitzBound":
        """The product of the parts, rounded up; infinite where it is not computed accurately.

        Args:
            parts: see the attribute.
            factors: what the parts are products of, if they are not single norms.
        """
        norms = list(parts.values() if factors is None else factors)
        largest = math.prod(max(1.0, norm) for norm in norms)
        smallest = math.prod(min(1.0, norm) for norm in norms)
        # A product that passes through subnormal numbers is not accurate.
        accurate = largest <= 2.0**500 and smallest >= 2.0**-500
        return cls(math.prod(parts.values()) * (1 + 2.0**-40) if accurate else math.inf, parts)


class CertifiedNetwork(nn.Module, ABC):
    """A classifier whose logit differences have known Lipschitz constants.

    The difference of logits i and j is Lipschitz with `lipschitz_upper_bound().value *
    factors[i, j]` on all of R^n, where `factors` comes from `logits_and_margin_factors`.
    Every parameter carries the kind of its initial value (model.networks.init) and, if constrained,
    its manifold. Most families have a `head`, of which the logits and their factors come.

    Attributes:
        configuration: what it was built from.
        norm: norm on images, `l2` or `linf`.
        input_shape: (C, H, W) of the images.
        num_classes: number K of logits.
        recomputed_blocks: so many of `blocks`, from the first on, are recomputed in the backward
            pass instead of stored. The first are best: what the last ones have stored is free
            again when the first are recomputed.
    """

    configuration: NetworkConfig
    norm: Literal["l2", "linf"]
    input_shape: tuple[int, int, int]
    num_classes: int
    recomputed_blocks: int = 0

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.configuration = config
        self.input_shape, self.num_classes = config.input_shape, config.num_classes

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """What the head sees, shape (B, F); Lipschitz in the pixels with the stated constant.

        Args:
            images: shape (B, *input_shape), floating point, pixels in [0, 1].

        Raises:
            ModelError: images of another shape or of an integer type.
        """

    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the nominal Lipschitz constants of their differences in the pixels.

        Nominal: as published code would state them, layers taken as what they are built to be and
        norms as estimated by power iteration. Training and the nominal column use them; what is
        proved comes from `lipschitz_upper_bound` and `margin_factor_bounds`.

        Args:
            images: see `features`.

        Returns:
            Logits (B, K) and factors (K, K), both float32 or wider and differentiable.

        Raises:
            ModelError: see `features`.
        """
        head: Any = self.get_submodule("head")
        return head(self.features(images))

    def logits_and_rates(self, images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Logits, and how fast the margins of the labels can fall: what training looks at.

        Within the radius `eps` the margin of label t over class j falls by at most `eps` times its
        rate, nominally. The margin factor for most networks; where the head is curved, the slope at
        the image and half of eps times the curvature.

        Args:
            images: see `features`.
            labels: int64 (B,).
            eps: training radius, in the network's norm and pixels of [0, 1].

        Returns:
            Logits and rates, both (B, K), float32 or wider and differentiable.
        """
        logits, factors = self.logits_and_margin_factors(images)
        return logits, factors[labels]

    def logits_and_slopes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and how fast their differences fall at the image: what certificates begin with.

        Args:
            images: see `features`.

        Returns:
            Logits (B, K); margin factors (K, K) or, for a curved head, slopes at each image
            (B, K, K), in the features; or what else `feature_radii` takes, with three axes.
        """
        return self.logits_and_margin_factors(images)

    @property
    @abstractmethod
    def bounded_matrices(self) -> tuple[str, ...]:
        """Names of the parameters whose norm enters the bound, in the order of the forward pass."""

    @abstractmethod
    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        """Proved bound for the real function of the stored weights, computed in float64.

        Args:
            matrices: bounds of all `bounded_matrices`, where they are known already; the layer
                bounds of a large network are computed in parallel tasks.

        Raises:
            ModelError: a weight is not finite.
        """

    @property
    def head_rule(self) -> str:
        """How margins become radii, by name; for linear heads their kind, `unit` or `linear`."""
        return str(self.get_submodule("head").kind)

    def margin_factor_bounds(self) -> Tensor:
        """Proved upper bounds of the exact margin factors, float64 (K, K), diagonal 0.

        Raises:
            ModelError: the head has a row that cannot be normalised.
        """
        head: Any = self.get_submodule("head")
        return head.factor_bounds()

    def slope_bounds(self, slopes: Tensor, norms: Tensor, *, matrices: Matrices) -> Tensor:
        """Proved upper bounds of the exact slopes in the features at some images.

        Args:
            slopes: of `logits_and_slopes` in float64.
            norms: bounds of the l2 norms of the images, float64 (B,).
            matrices: bounds of all `bounded_matrices`.

        Returns:
            float64, of the shape of `slopes`; the margin factors where they are no slopes.
        """
        return self.margin_factor_bounds()

    def feature_radii(
        self, margins: Tensor, slopes: Tensor, curvature: Tensor, prediction: Tensor
    ) -> Tensor:
        """How far the features can move before a margin is used up.

        Args:
            margins: of the prediction over every class, less what rounding may have done, (B, K).
            slopes: of `logits_and_slopes`, or of `slope_bounds`.
            curvature: of `curvature_bounds`.
            prediction: classes, int64 (B,).

        Returns:
            Distances (B, K) in the unit of the slopes, of which the smallest of a row counts.
        """
        return slope_radii(margins, slopes, curvature, prediction)

    def curvature_bounds(self) -> Tensor:
        """Proved bounds of how fast a slope can grow, per unit of distance in the features.

        Returns:
            float64 (K, K): c[i, j] such that the Hessian of y_i - y_j in the features is at least
            -c[i, j] everywhere; 0 for linear heads.
        """
        device = next(self.parameters()).device
        return torch.zeros(self.num_classes, self.num_classes, dtype=torch.float64, device=device)

    @abstractmethod
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """A-priori error of any logit difference that a program computes.

        It holds for every order of summation and for every image of the stated norm, so it is what
        separates the program from the real function of the stored weights.

        Args:
            norms: bounds of the l2 norms of the images, float64 (B,).
            program: arithmetic of the program.
            matrices: bounds of all `bounded_matrices`.
            largest_factor: largest of `margin_factor_bounds()`.

        Returns:
            Bounds, float64 (B,); infinite where nothing can be said.
        """

    def bound_matrix(self, name: str, stored: Tensor) -> MatrixBound:
        """Bounds of one of the `bounded_matrices`; also a network on the meta device can say.

        Args:
            name: name of the parameter.
            stored: its value.

        Raises:
            ModelError: an entry is not finite.
        """
        return matrix_bound(stored, name)

    @torch.no_grad()
    def matrix_bounds(self) -> dict[str, MatrixBound]:
        """Bounds of all `bounded_matrices`, one after another."""
        names = self.bounded_matrices
        return {name: self.bound_matrix(name, self.get_parameter(name)) for name in names}

    @property
    def block_count(self) -> int:
        """Blocks that can be recomputed in the backward pass: those of `blocks`."""
        return len(getattr(self, "blocks", ()))

    def recomputes(self, block: nn.Module) -> bool:
        """Whether a block is one of the `recomputed_blocks`."""
        return block in list(getattr(self, "blocks", ()))[: self.recomputed_blocks]

    def run_block(self, block: nn.Module, x: Tensor, *arguments: Any) -> Any:
        """Output of a block, which may be one that is recomputed in the backward pass."""
        if self.recomputes(block):
            return checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(x, *arguments)

    def begin_step(self, *, step: int, progress: float, seed: int) -> None:
        """Get ready for a training step; all ranks call it with the same values.

        What changes while training, or is random, is a function of these three alone, so that a
        resumed run continues exactly.

        Args:
            step: 0-based optimizer step.
            progress: share of the run that is done, in [0, 1).
            seed: seed of the run.
        """

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the stored means of all centred layers to averages of batch means.

        Args:
            batches: images, see `features`; every layer sees them centred by its batch means.

        Raises:
            ModelError: no batch.
        """
        layers = [module for module in self.modules() if isinstance(module, Centering)]
        for layer in layers:
            layer.begin()
        seen = 0
        try:
            for images in batches:
                self.features(images)
                seen += 1
        finally:
            for layer in layers:
                layer.end()
        if not seen:
            raise ModelError("no image to calibrate the centred layers with")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, *input_shape); see logits_and_margin_factors."""
        return self.logits_and_margin_factors(images)[0]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its initial value, made in float64 and then rounded."""
        for name, p in self.named_parameters():
            p.copy_(initial_value(initial_kind(p), p.shape, seed=seed, name=name))

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


class LipschitzByConstruction(CertifiedNetwork):
    """A network whose features are 1-Lipschitz for any finite weights: no norm enters the bound."""

    @property
    def bounded_matrices(self) -> tuple[str, ...]:
        """None."""
        return ()

    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        """Exactly 1, a theorem for all finite weights.

        Raises:
            ModelError: a stored value is not finite. On the meta device there are none.
        """
        for name, stored in self.state_dict().items():
            if not stored.is_meta and not bool(stored.isfinite().all()):
                raise ModelError(f"{name} holds values that are not finite")
        return LipschitzBound(1.0, {})
