"""SortNet (arXiv 2210.01787), with the l-infinity-distance net (arXiv 2102.05363) as keep = 1.

Every neuron is 1-Lipschitz in l-infinity for any weights: sorting and |.| are, and the
coefficients of the sorted distances are not negative and sum to at most 1.
"""

import hashlib
import itertools
import math
from fractions import Fraction
from typing import Literal, cast

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.centering import Centering
from model.config import STRICT, NetworkConfig
from model.contract import CertifiedNetwork, LipschitzBound
from model.distance import PowerMean, RankedSum, Reduction, Subsets, distance
from model.errors import ModelError
from model.initial import set_initial
from model.layers import at_least_float32
from model.linf import centred_pixels, equal_factors, largest_entry, proved_error
from model.lipschitz import Matrices
from model.rounding import Carried, Program


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SortNetConfig(NetworkConfig):
    """SortNet: layers of sorted l-infinity distances to weight vectors, centred in between."""

    kind: Literal["sortnet"] = "sortnet"
    width: int
    """Neurons of every layer but the last, which has one per class."""
    depth: int
    """Layers, the last one counted."""
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
        if not 0 < self.keep <= 1:
            raise ModelError(f"keep={self.keep} must be in (0, 1]")
        if not 2.0**-20 <= self.input_scale <= 2.0**20:
            raise ModelError(f"input_scale={self.input_scale} must be in [2^-20, 2^20]")
        if not 2 <= self.p_start <= self.p_end < math.inf:
            raise ModelError(f"p_start={self.p_start}, p_end={self.p_end}: 2 <= start <= end")
        if not 0 <= self.p_from < self.p_to <= 1:
            raise ModelError(f"p_from={self.p_from}, p_to={self.p_to}: 0 <= from < to <= 1")

    def sizes(self) -> list[int]:
        """Inputs of every layer, then the number of classes."""
        return [math.prod(self.input_shape)] + [self.width] * (self.depth - 1) + [self.num_classes]

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

    def carry(self, state: Carried) -> None:
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

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = set_initial(nn.Parameter(torch.empty(1)), "ones")
        self.bias = set_initial(nn.Parameter(torch.empty(num_classes)), "zeros")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and factors (K, K), of values (B, K) that are 1-Lipschitz each."""
        scale = at_least_float32(self.weight)
        factors = equal_factors(x.shape[1]).to(x) * scale.abs()
        return (at_least_float32(self.bias) - x) * scale, factors

    @property
    def scale(self) -> float:
        """|s|, exactly."""
        return float(self.weight.detach().double().abs())

    def carry(self, state: Carried) -> None:
        """Carry bounds through the head."""
        state.translate(largest_entry(self.bias))
        state.multiply(1, upper=self.scale, absolute=self.scale)


class SortNet(CertifiedNetwork):
    """Layers of sorted distances; a logit falls with the distance to the row of its class."""

    norm = "linf"

    def __init__(self, config: SortNetConfig) -> None:
        super().__init__()
        self.input_shape = config.input_shape
        self.num_classes = config.num_classes
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
                    centred=i < config.depth - 1,
                )
            )
        self.head = ScaledHead(config.num_classes)
        self.begin_step(step=0, progress=0.0, seed=0)

    def begin_step(self, *, step: int, progress: float, seed: int) -> None:
        """Power of the mean, and the key of the inputs that are left out; see CertifiedNetwork."""
        p = self.config.power(progress)
        self._trained: Reduction = RankedSum((1.0,)) if math.isinf(p) else PowerMean(p)
        self._key = f"{seed}/{step}"

    def _kept(self, layer: int, batch: int, device: torch.device) -> Tensor | None:
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
                for _ in range(0, batch, self.config.group)
            ]
        return torch.stack(subsets).to(device)

    def features(self, images: Tensor) -> Tensor:
        """The distances of the last layer, shape (B, K); see CertifiedNetwork."""
        self.check_images(images)
        x = centred_pixels(images, self.config.input_scale).flatten(1)
        trained = self._trained if self.training else None
        seen = None
        for i, block in enumerate(self.blocks):
            kept = self._kept(i, len(x), x.device)
            sampled = seen is not None or kept is not None
            arguments = (trained, Subsets(self.config.group, seen, kept) if sampled else None)
            if self.checkpoint_blocks:
                x = checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *arguments)
            seen = kept
        return x

    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork; all pairs of classes have one factor."""
        logits, factors = self.head(self.features(images))
        return logits, self.config.input_scale * factors

    @property
    def head_rule(self) -> str:
        """See CertifiedNetwork."""
        return "scaled"

    @property
    def bounded_matrices(self) -> tuple[str, ...]:
        """None: the constant holds for any weights."""
        return ()

    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        """The scale of the pixels: every layer is 1-Lipschitz in l-infinity for any weights."""
        return LipschitzBound(self.config.input_scale, {"pixels": self.config.input_scale})

    def margin_factor_bounds(self) -> Tensor:
        """Twice the scale of the head for every pair; see CertifiedNetwork."""
        if not all(bool(tensor.isfinite().all()) for tensor in self.state_dict().values()):
            raise ModelError("the network holds values that are not finite")
        return equal_factors(self.num_classes).to(self.head.weight.device) * self.head.scale

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/families.md, SortNet."""
        scale = self.config.input_scale
        state = Carried.images(norms, 1, program)
        state.multiply(2, upper=scale, absolute=scale)
        for block in self.blocks:
            cast(DistanceLayer, block).carry(state)
        self.head.carry(state)
        operations = 10 + len(self.blocks) * (3 * self.config.top + 12)
        growth = max(1.0, scale) * max(1.0, self.head.scale)
        return proved_error(state, 2 * state.error, operations, growth)
