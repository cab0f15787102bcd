"""LipConvnet: skew orthogonal convolutions (arXiv 2105.11417, 2108.04062, 2211.08453)."""

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.dot_products import convolve
from model.certification.matrix_bounds import Matrices, MatrixBound, matrix_bound
from model.certification.rounding import FLOAT64, SLACK, ErrorState, Program
from model.errors import ModelError
from model.networks.base import CertifiedNetwork, LipschitzBound
from model.networks.config import STRICT, NetworkConfig
from model.networks.head import Head
from model.networks.init import set_initial
from model.networks.soc.activations import ACTIVATIONS, POOLS
from model.networks.soc.mlp_head import MLPHead
from model.networks.soc.skew_conv import SkewConvolution, skew_kernel_bound
from optim.manifolds import ORTHOGONAL, declare


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SocConfig(NetworkConfig):
    """LipConvnet (arXiv 2211.08453): 1-Lipschitz in l2, orthogonal convolutions.

    A first convolution, then stages that halve the image and double the channels. Stages have
    depth / stages layers each. All layers have 3 x 3 filters, those of the last stage 1 x 1.
    """

    kind: Literal["soc"] = "soc"
    depth: int
    """Layers after the first, N of LipConvnet-N; a multiple of `stages`."""
    stages: int = 5
    """Times that the image is halved; five bring 32 x 32 to one position."""
    width: int = 32
    """Channels of the first convolution, even."""
    activation: Literal["maxmin", "householder"] = "maxmin"
    """`householder`: a learned reflection of each pair of channels; (min, max) at first."""
    pointwise: Literal["series", "manifold"] = "series"
    """1 x 1 filters of the last stage: as all others, or orthogonal matrices on the manifold."""
    pooling: Literal["max", "projection"] = "max"
    """What halves the channels at the end of a stage; `projection`: distance to a learned cone."""
    train_terms: int = 6
    """Terms of the exponential series in training."""
    terms: int = 15
    """Terms in evaluation; what the rest can add is part of the certificate."""
    head: Literal["unit", "mlp"] = "unit"
    """`unit`: normalised rows; `mlp`: one hidden layer, certified by its curvature."""
    hidden: int = 4096
    """Hidden units of the `mlp` head."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        super().__post_init__()
        channels, height, width = self.input_shape
        for name in ("depth", "stages", "hidden"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} must be at least 1")
        if self.depth % self.stages:
            raise ModelError(f"depth={self.depth} is no multiple of stages={self.stages}")
        if height % 2**self.stages or width % 2**self.stages:
            raise ModelError(f"an image of {height}x{width} cannot be halved {self.stages} times")
        if self.width % 2 or self.width < channels:
            raise ModelError(
                f"width={self.width} must be even and at least the {channels} channels of an image"
            )
        for name in ("train_terms", "terms"):
            if not 2 <= getattr(self, name) <= 40:
                raise ModelError(f"{name}={getattr(self, name)} must be in 2..40")


class Rotation(nn.Module):
    """R x + b at every position, R on the manifold of orthogonal matrices.

    Args:
        channels: of the output.
        stride: 2: pixels go to channels first, see SkewConvolution.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels
        self.weight = nn.Parameter(torch.empty(channels, channels))
        declare(self.weight, ORTHOGONAL)
        set_initial(self.weight, "haar")
        self.bias = set_initial(nn.Parameter(torch.empty(channels)), "uniform")

    def forward(self, x: Tensor) -> Tensor:
        """See SkewConvolution."""
        x = F.pixel_unshuffle(x.to(self.weight.dtype), self.stride)
        convolution = F.conv2d if self.training else convolve
        return convolution(x, self.weight[:, :, None, None]) + self.bias[:, None, None]

    @property
    def operations(self) -> int:
        """Floating-point operations per position, at most."""
        return self.channels * (2 * self.channels + 2)

    def norm(self, bound: MatrixBound) -> float:
        """Bound of the norm of R."""
        return bound.upper

    def growth(self, bound: MatrixBound) -> float:
        """Bound of what an error inside of this layer is multiplied by."""
        return max(1.0, bound.upper)

    def carry(self, state: ErrorState, bound: MatrixBound, pixels: int) -> None:
        """Carry bounds of the input through this layer."""
        state.multiply(self.channels, upper=bound.upper, absolute=bound.absolute)
        state.translate(math.sqrt(pixels) * float(self.bias.detach().double().norm()) * SLACK)


class SkewBlock(nn.Module):
    """A convolution and what follows it: an activation or a pooling of channel pairs."""

    def __init__(self, convolution: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to what the convolution and the pooling make of it."""
        return self.after(self.convolution(x))


class LipConvnet(CertifiedNetwork):
    """First convolution, stages, flattened features, head."""

    norm = "l2"

    def __init__(self, config: SocConfig) -> None:
        super().__init__(config)
        layers = list(_layers(config))
        self.blocks = nn.ModuleList(_block(layer, config) for layer in layers)
        height, width = (side >> config.stages for side in config.input_shape[1:])
        features = layers[-1].channels * height * width
        self.head: Head | MLPHead
        if config.head == "mlp":
            self.head = MLPHead(features, config.hidden, config.num_classes)
        else:
            self.head = Head(features, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """See CertifiedNetwork."""
        self.check_images(images)
        weight = self._convolution(0).weight
        # 0.5 is subtracted in the wider type.
        x = images.to(torch.promote_types(images.dtype, weight.dtype)) - 0.5
        for block in self.blocks:
            x = self.run_block(block, x)
        return x.flatten(1)

    def logits_and_rates(self, images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork; the features are taken as 1-Lipschitz."""
        if isinstance(self.head, MLPHead):
            return self.head(self.features(images), labels, eps)
        return super().logits_and_rates(images, labels, eps)

    def logits_and_slopes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork."""
        if isinstance(self.head, MLPHead):
            return self.head.slopes(self.features(images))
        return super().logits_and_slopes(images)

    def initialise(self, seed: int) -> None:
        """See CertifiedNetwork; the scales follow from the weights."""
        super().initialise(seed)
        self.calibrate(())

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Store the scale of every filter, as training takes it from the weights; no image is read.

        Args:
            batches: not used.
        """
        for i in range(len(self.blocks)):
            layer = self._convolution(i)
            if isinstance(layer, SkewConvolution):
                layer.store_scale()

    @property
    def bounded_matrices(self) -> tuple[str, ...]:
        """See CertifiedNetwork."""
        head = ("head.inner",) if isinstance(self.head, MLPHead) else ()
        return (*(f"blocks.{i}.convolution.weight" for i in range(len(self.blocks))), *head)

    def bound_matrix(self, name: str, stored: Tensor) -> MatrixBound:
        """See CertifiedNetwork; of a filter W the bounds of the map of (W - W^T) / 2."""
        return skew_kernel_bound(stored, name) if stored.ndim == 4 else matrix_bound(stored, name)

    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        """Product of 1 + ||J||^terms / terms! over all convolutions, ||J|| proved.

        Activations and poolings are 1-Lipschitz exactly.
        """
        known = self.matrix_bounds() if matrices is None else matrices
        parts = {f"blocks.{i}": self._part(i, known) for i in range(len(self.blocks))}
        return LipschitzBound.product(parts)

    def _convolution(self, i: int) -> SkewConvolution | Rotation:
        return cast(SkewConvolution | Rotation, cast(SkewBlock, self.blocks[i]).convolution)

    def _part(self, i: int, known: Matrices) -> float:
        return self._convolution(i).norm(known[f"blocks.{i}.convolution.weight"])

    def slope_bounds(self, slopes: Tensor, norms: Tensor, *, matrices: Matrices) -> Tensor:
        """See CertifiedNetwork."""
        if not isinstance(self.head, MLPHead):
            return super().slope_bounds(slopes, norms, matrices=matrices)
        state = self._carried(norms, FLOAT64, matrices)
        return self.head.slope_bounds(slopes, state, matrices["head.inner"])

    def curvature_bounds(self) -> Tensor:
        """See CertifiedNetwork."""
        if isinstance(self.head, MLPHead):
            return self.head.curvature_bounds()
        return super().curvature_bounds()

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/explanation/families.md."""
        state = self._carried(norms, program, matrices)
        if isinstance(self.head, MLPHead):
            error = self.head.margin_error(state, matrices["head.inner"])
        else:
            error = self.head.margin_error(state, largest_factor)
        underflow = self._underflow(state, matrices) * max(1.0, largest_factor)
        return state.finish(error, underflow)

    def _carried(self, norms: Tensor, program: Program, matrices: Matrices) -> ErrorState:
        """Bounds of the features."""
        state = ErrorState.images(norms, math.prod(self.input_shape), program)
        for i, (block, pixels) in enumerate(zip(self.blocks, self._pixels(), strict=True)):
            bound = matrices[f"blocks.{i}.convolution.weight"]
            self._convolution(i).carry(state, bound, pixels)
            cast(SkewBlock, block).after.carry(state)  # type: ignore[operator]
        return state

    def _pixels(self) -> Iterator[int]:
        """Positions of every block's output."""
        _, height, width = self.input_shape
        for i in range(len(self.blocks)):
            stride = self._convolution(i).stride
            height, width = height // stride, width // stride
            yield height * width

    def _underflow(self, state: ErrorState, matrices: Matrices) -> Tensor:
        """What numbers below the smallest normal one can cost, before the head's factor."""
        operations = 4 * sum(p.numel() for p in self.head.parameters())
        growth, inside = 1.0, 1.0
        for i, pixels in enumerate(self._pixels()):
            layer, bound = self._convolution(i), matrices[f"blocks.{i}.convolution.weight"]
            operations += pixels * layer.operations
            growth *= max(1.0, layer.norm(bound))
            inside = max(inside, layer.growth(bound))
        # The rows of the head are divided by norms of at least 1e-6.
        size = 2.0**21 * state.peak.clamp(min=1)
        return operations * state.program.tiny * growth * inside * size


class _Layer(NamedTuple):
    """One convolution: channels in, of the convolution, and after it; its filter; what follows."""

    inputs: int
    outputs: int
    channels: int
    side: int
    stride: int


def _layers(config: SocConfig) -> Iterator[_Layer]:
    """All convolutions. The last stage halves the image first and works on one position then."""
    inputs = config.width
    yield _Layer(config.input_shape[0], inputs, inputs, 3, 1)
    per_stage = config.depth // config.stages
    for stage in range(config.stages):
        last = stage == config.stages - 1
        for i in range(per_stage):
            stride = 2 if i == (0 if last else per_stage - 1) else 1
            outputs = inputs * stride**2
            pooled = i == per_stage - 1 and not (last and config.head == "mlp")
            channels = outputs // 2 if pooled else outputs
            yield _Layer(inputs, outputs, channels, 1 if last else 3, stride)
            inputs = channels


def _block(layer: _Layer, config: SocConfig) -> SkewBlock:
    convolution: nn.Module
    if layer.side == 1 and config.pointwise == "manifold":
        convolution = Rotation(layer.outputs, layer.stride)
    else:
        convolution = SkewConvolution(
            layer.inputs,
            layer.outputs,
            layer.side,
            stride=layer.stride,
            train_terms=config.train_terms,
            terms=config.terms,
        )
    pooled = layer.channels < layer.outputs
    after = POOLS[config.pooling] if pooled else ACTIVATIONS[config.activation]
    return SkewBlock(convolution, after(layer.outputs))
