"""SortNet (arXiv 2210.01787), with the l-infinity-distance net (arXiv 2102.05363) as keep = 1.

Every neuron is 1-Lipschitz in l-infinity for any weights: sorting and |.| are, and the
coefficients of the sorted distances are not negative and sum to at most 1. A head with a tanh layer
makes it SortNet + MLP.
"""

import hashlib
import itertools
import math
from fractions import Fraction
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.matrix_bounds import Matrices
from model.certification.rounding import FLOAT64, ErrorState, Program
from model.device_copy import to_device
from model.errors import ModelError
from model.networks.base import LipschitzBound, LipschitzByConstruction
from model.networks.centering import Centering
from model.networks.config import STRICT, NetworkConfig
from model.networks.init import set_initial
from model.networks.linf.common import centred_pixels, equal_factors, largest_entry, proved_error
from model.networks.linf.distance import (
    TRAINED_OPERATIONS,
    PowerMean,
    RankedSum,
    Reduction,
    Subsets,
    distance,
)
from model.networks.linf.tanh_head import TanhHead
from model.networks.tensor_ops import at_least_float32


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SortNetConfig(NetworkConfig):
    """SortNet: layers of sorted l-infinity distances to weight vectors, centred in between."""

    has_products: ClassVar[bool] = False
    kind: Literal["sortnet"] = "sortnet"
    width: int
    """Neurons of every layer of distances; without a tanh layer the last has one per class."""
    depth: int
    """Layers of distances, the last one counted."""
    hidden: int = 0
    """Units of a tanh layer between the distances and the logits (SortNet + MLP); 0: none."""
    window: int = 0
    """Side of the squares of pixels that the first layer sees, each on its own; 0: whole images."""
    window_stride: int = 1
    """Pixels between two squares."""
    keep: float = 1.0
    """q: coefficient i of the sorted distances is q (1 - q)^(i - 1); in training, the share of its
    inputs that a layer sees at a step. 1 is the l-infinity-distance net."""
    top: int = 10
    """Sorted distances that count; their coefficients are scaled to the sum 1."""
    group: int = 32
    """Samples that share the inputs they see."""
    input_scale: float = 1.0
    """What pixels less 1/2 are multiplied by; also the Lipschitz constant of the network."""
    passing: bool = False
    """Start neurons that do not shrink their layer's input as x_i + 10."""
    p_start: float = 8.0
    """Power of the mean that stands for the maximum in training, at first."""
    p_end: float = 1000.0
    """The same at the end of its growth; from then on the maximum itself is trained."""
    p_from: float = 1 / 15
    """Share of the run after which p grows, exponentially."""
    p_to: float = 29 / 30
    """Share of the run after which p is infinite."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built or trained."""
        super().__post_init__()
        for name, least in (("width", 1), ("depth", 2), ("top", 1), ("group", 1)):
            if getattr(self, name) < least:
                raise ModelError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.hidden < 0:
            raise ModelError(f"hidden={self.hidden} must not be negative")
        if self.window:
            self._check_window()
        if not 0 < self.keep <= 1:
            raise ModelError(f"keep={self.keep} must be in (0, 1]")
        if not 2.0**-20 <= self.input_scale <= 2.0**20:
            raise ModelError(f"input_scale={self.input_scale} must be in [2^-20, 2^20]")
        if not 2 <= self.p_start <= self.p_end < math.inf:
            raise ModelError(f"p_start={self.p_start}, p_end={self.p_end}: 2 <= start <= end")
        if not 0 <= self.p_from < self.p_to <= 1:
            raise ModelError(f"p_from={self.p_from}, p_to={self.p_to}: 0 <= from < to <= 1")

    def _check_window(self) -> None:
        if not self.hidden:
            raise ModelError(f"window={self.window}: squares meet in a tanh layer, give hidden")
        _, *sides = self.input_shape
        steps = self.window_stride
        if steps < 1 or any(side < self.window or (side - self.window) % steps for side in sides):
            raise ModelError(
                f"squares of {self.window} pixels in steps of {steps} do not cover "
                f"{sides[0]}x{sides[1]} pixels"
            )

    @property
    def windows(self) -> int:
        """Squares of pixels in an image."""
        if not self.window:
            return 1
        _, *sides = self.input_shape
        return math.prod((side - self.window) // self.window_stride + 1 for side in sides)

    def sizes(self) -> list[int]:
        """Inputs of every layer of distances, then the outputs of the last one."""
        channels, *_ = self.input_shape
        seen = channels * self.window**2 if self.window else math.prod(self.input_shape)
        outputs = self.width if self.hidden else self.num_classes
        return [seen] + [self.width] * (self.depth - 1) + [outputs]

    def operations(self) -> dict[str, float]:
        """See NetworkConfig; coordinates of the distances that a training step takes part in."""
        sizes = self.sizes()
        seen = [sizes[0], *(self.keep * size for size in sizes[1:-1]), sizes[-1]]
        coordinates = self.windows * sum(n * o for n, o in itertools.pairwise(seen))
        return {name: count * coordinates for name, count in TRAINED_OPERATIONS.items()}

    def power(self, progress: float) -> float:
        """Power p at a share of the run; infinite at its end."""
        if progress >= self.p_to:
            return math.inf
        grown = max(0.0, (progress - self.p_from) / (self.p_to - self.p_from))
        return float(self.p_start * (self.p_end / self.p_start) ** grown)

    def coefficients(self) -> tuple[float, ...]:
        """c_i = q (1 - q)^(i - 1) / (1 - (1 - q)^top), each rounded once from its exact value."""
        if self.keep == 1:
            return (1.0,)
        q = Fraction(self.keep)
        total = 1 - (1 - q) ** self.top
        return tuple(float(q * (1 - q) ** i / total) for i in range(self.top))


class SampledCentering(Centering):
    """Centering of a layer of which each group of samples has computed some neurons only."""

    def forward(self, x: Tensor, subsets: Subsets | None = None) -> Tensor:
        """Centre x; the mean of a neuron is over the samples that kept it.

        Args:
            x: shape (B, features) or, with `subsets.outputs`, (B, kept features).
            subsets: what each group of samples has computed.
        """
        if subsets is None or subsets.outputs is None:
            return super().forward(x)
        group = torch.arange(len(x), device=x.device) // subsets.group
        kept = subsets.outputs[group]
        places = kept.flatten()
        zeros = x.new_zeros(len(self.mean))
        sums = zeros.scatter_add(0, places, x.flatten())
        counts = zeros.scatter_add(0, places, torch.ones_like(places, dtype=x.dtype))
        return x - (sums / counts.clamp(min=1))[kept]


class DistanceLayer(nn.Module):
    """Sorted distances of the input to the rows of a weight, centred but in the last layer."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        coefficients: tuple[float, ...],
        *,
        initial: str,
        centred: bool,
    ) -> None:
        super().__init__()
        self.ranked = RankedSum(coefficients)
        self.weight = set_initial(nn.Parameter(torch.empty(outputs, inputs)), initial)
        self.centre = SampledCentering(outputs) if centred else None

    def forward(self, x: Tensor, trained: Reduction | None, subsets: Subsets | None) -> Tensor:
        """Outputs (B, O), or (B, kept outputs).

        Args:
            x: shape (B, n), or (B, kept inputs).
            trained: what stands for the sorted sum in training; None: the sorted sum itself.
            subsets: inputs and outputs that take part; None: all.
        """
        y = distance(x, self.weight, trained or self.ranked, subsets)
        return y if self.centre is None else self.centre(y, subsets).to(self.weight.dtype)

    def carry(self, state: ErrorState) -> None:
        """Carry bounds through the layer in evaluation; all norms are largest entries."""
        state.translate(largest_entry(self.weight))
        # A coefficient is rounded twice: from its exact value, and to the program's type.
        terms = len(self.ranked.coefficients) + 2
        state.multiply(terms, upper=1.0, absolute=1.0)
        if self.centre is not None:
            state.translate(largest_entry(self.centre.mean))


class ScaledHead(nn.Module):
    """Logits s (b_k - x_k) of distances x_k; the trained number s changes no certificate.

    Margins and factors grow alike with s: only a cross-entropy can tell.
    """

    rule = "scaled"
    operations = 4

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = set_initial(nn.Parameter(torch.empty(1)), "ones")
        self.bias = set_initial(nn.Parameter(torch.empty(num_classes)), "zeros")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and factors (K, K), of values (B, K) that are 1-Lipschitz each."""
        scale = at_least_float32(self.weight)
        factors = equal_factors(x.shape[1], device=x.device).to(x) * scale.abs()
        return (at_least_float32(self.bias) - x) * scale, factors

    @property
    def scale(self) -> float:
        """|s|, exactly."""
        return float(self.weight.detach().double().abs())

    @property
    def growth(self) -> float:
        """Bound of what any part of the head multiplies an error by."""
        return max(1.0, self.scale)

    def factor_bounds(self) -> Tensor:
        """2 |s| for every pair of classes, float64 (K, K), diagonal 0."""
        return equal_factors(len(self.bias), device=self.weight.device) * self.scale

    def margin_error(self, state: ErrorState) -> Tensor:
        """Carry bounds through the head; the error of any logit difference, float64 (B,)."""
        state.translate(largest_entry(self.bias))
        state.multiply(1, upper=self.scale, absolute=self.scale)
        return 2 * state.error


class SortNet(LipschitzByConstruction):
    """Layers of sorted distances; a logit falls with the distance to the row of its class."""

    norm = "linf"

    def __init__(self, config: SortNetConfig) -> None:
        super().__init__(config)
        self.config = config
        sizes = config.sizes()
        self.blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            self.blocks.append(
                DistanceLayer(
                    inputs,
                    outputs,
                    # Pixels are never left out in training, so their distances are not sorted.
                    config.coefficients() if i else (1.0,),
                    initial="passing"
                    if config.passing and inputs <= outputs
                    else "standard_normal",
                    centred=config.hidden > 0 or i < config.depth - 1,
                )
            )
        self.head: ScaledHead | TanhHead = ScaledHead(config.num_classes)
        if config.hidden:
            features = config.windows * config.width
            self.head = TanhHead(features, config.hidden, config.num_classes)
        self.begin_step(step=0, progress=0.0, seed=0)

    def begin_step(self, *, step: int, progress: float, seed: int) -> None:
        """Power of the mean, and the key of the inputs that are left out; see CertifiedNetwork."""
        p = self.config.power(progress)
        self._trained: Reduction = RankedSum((1.0,)) if math.isinf(p) else PowerMean(p)
        self._key = f"{seed}/{step}"

    def _kept(self, layer: int, points: int, device: torch.device) -> Tensor | None:
        """Neurons of a hidden layer that the next one sees, int64 (groups, kept).

        Group i of a rank's micro-batch has the same ones on every rank.
        """
        if not self.training or self.config.keep == 1 or layer in (-1, len(self.blocks) - 1):
            return None
        digest = hashlib.sha256(f"{self._key}/{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        width = self.config.width
        with torch.device("cpu"):
            kept = int((torch.rand(width, generator=generator) < self.config.keep).sum())
            subsets = [
                torch.randperm(width, generator=generator)[: max(1, kept)].sort().values
                for _ in range(0, points, self._group)
            ]
        return to_device(torch.stack(subsets), device)

    @property
    def _group(self) -> int:
        """Points, that is windows of pixels, that share the inputs they see."""
        return self.config.group * self.config.windows

    def features(self, images: Tensor) -> Tensor:
        """The distances of the last layer, (B, K) or, for a tanh layer, (B, windows * width)."""
        self.check_images(images)
        x = self._points(centred_pixels(images, self.config.input_scale))
        trained = self._trained if self.training else None
        seen = None
        for i, block in enumerate(self.blocks):
            kept = self._kept(i, len(x), x.device)
            sampled = seen is not None or kept is not None
            arguments = (trained, Subsets(self._group, seen, kept) if sampled else None)
            x = self.run_block(block, x, *arguments)
            seen = kept
        return x.unflatten(0, (len(images), -1)).flatten(1)

    def _points(self, pixels: Tensor) -> Tensor:
        """What the first layer sees: images (B, n), or their windows (B * windows, n)."""
        if not self.config.window:
            return pixels.flatten(1)
        windows = F.unfold(pixels, self.config.window, stride=self.config.window_stride)
        return windows.mT.flatten(0, 1)

    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork; without a tanh layer all pairs of classes have one factor."""
        logits, factors = self.head(self.features(images))
        return logits, self.config.input_scale * factors

    def logits_and_rates(self, images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork."""
        if not isinstance(self.head, TanhHead):
            return super().logits_and_rates(images, labels, eps)
        scale = self.config.input_scale
        logits, rates = self.head(self.features(images), labels, scale * eps)
        return logits, scale * rates

    def logits_and_slopes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork; with a tanh layer the intervals of its arguments, in the pixels."""
        if not isinstance(self.head, TanhHead):
            return super().logits_and_slopes(images)
        logits, intervals = self.head.intervals(self.features(images))
        # Filled on the device: a list of the host would be copied, and waited for.
        units = intervals.new_ones(3, 1)
        units[2].fill_(self.config.input_scale)
        return logits, intervals * units

    @torch.no_grad()
    def slope_bounds(self, slopes: Tensor, norms: Tensor, *, matrices: Matrices) -> Tensor:
        """See CertifiedNetwork."""
        if not isinstance(self.head, TanhHead):
            return super().slope_bounds(slopes, norms, matrices=matrices)
        state = self._carried(norms, FLOAT64)
        self.head.carry_hidden(state)
        return self.head.interval_bounds(slopes, self._proved(state, state.error))

    def feature_radii(
        self, margins: Tensor, slopes: Tensor, curvature: Tensor, prediction: Tensor
    ) -> Tensor:
        """See CertifiedNetwork; with a tanh layer by intervals, where the images' are given."""
        if isinstance(self.head, TanhHead) and slopes.ndim == 3:
            return self.head.radii(margins, slopes, prediction)
        return super().feature_radii(margins, slopes, curvature, prediction)

    @property
    def head_rule(self) -> str:
        """See CertifiedNetwork."""
        return self.head.rule

    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        """The scale of the pixels: every layer is 1-Lipschitz in l-infinity for any weights."""
        super().lipschitz_upper_bound(matrices)
        return LipschitzBound(self.config.input_scale, {"pixels": self.config.input_scale})

    def margin_factor_bounds(self) -> Tensor:
        """See CertifiedNetwork."""
        if not all(bool(tensor.isfinite().all()) for tensor in self.state_dict().values()):
            raise ModelError("the network holds values that are not finite")
        return self.head.factor_bounds()

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/explanation/families.md, SortNet."""
        state = self._carried(norms, program)
        return self._proved(state, self.head.margin_error(state))

    def _carried(self, norms: Tensor, program: Program) -> ErrorState:
        """Bounds of the features."""
        scale = self.config.input_scale
        state = ErrorState.images(norms, 1, program)
        state.multiply(2, upper=scale, absolute=scale)
        for block in self.blocks:
            cast(DistanceLayer, block).carry(state)
        return state

    def _proved(self, state: ErrorState, error: Tensor) -> Tensor:
        """The error of what comes out of the head, with underflow; see proved_error."""
        operations = 6 + len(self.blocks) * (3 * self.config.top + 12) + self.head.operations
        growth = max(1.0, self.config.input_scale) * self.head.growth
        return proved_error(state, error, operations, growth)
