"""What describes a LipNeXt network; its layers read it, too."""

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from model.errors import ModelError
from model.networks.config import STRICT, NetworkConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LipNeXtConfig(NetworkConfig):
    """LipNeXt (arXiv 2601.18513): 1-Lipschitz in l2, convolution free, orthogonal matrices only."""

    kind: Literal["lipnext"] = "lipnext"
    patch: int
    """Side of the square patches that the stem turns into channels."""
    width: int
    """Channels C of every block; each block has two C x C orthogonal matrices."""
    depth: int
    """Number of blocks."""
    alpha: float = 1 / 16
    """Share of the channels shifted in each of the four directions, in (0, 1/4]."""
    beta: float = 0.5
    """Share of the channels that pass through the absolute value, in [0, 1]."""
    position: bool = True
    """Learn one scalar per grid position in each block (the p of the block formula)."""
    shift: Literal["unit", "doubling"] = "unit"
    """By how many positions a block shifts: by 1, or by 1, 2, 4, ... block after block, starting
    again beyond half of the shorter side of the grid."""
    pool: Literal["l2", "grid", "flat"] = "l2"
    """`l2`: the norm of every channel over the grid; `grid`: over each of pool_windows x
    pool_windows windows; `flat`: every value of every position is a feature."""
    pool_windows: int = 1
    """Windows per side of the grid for `grid`."""
    pool_tau: float = 1e-6
    """Smoothing of the norms of a pool, sqrt(s + pool_tau^2); keeps their gradient finite at 0."""
    initial: Literal["haar", "identity_m"] = "haar"
    """`haar`: every matrix is Haar distributed on SO(C); `identity_m`: the same with M = I."""
    head: Literal["unit", "linear"] = "unit"
    """`unit`: the rows of the classifier are normalised; `linear`: used as they are."""
    fold: Literal["auto", "always", "never"] = "auto"
    """Multiply M R^T out before it meets the tokens; `auto`: when there are more tokens than C."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, or would not be 1-Lipschitz."""
        super().__post_init__()
        channels, height, width = self.input_shape
        for name in ("patch", "width", "depth"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} must be at least 1")
        if height % self.patch or width % self.patch:
            whole, most = math.gcd(height, width), math.isqrt(self.width // channels)
            fit = [str(side) for side in range(1, whole + 1) if whole % side == 0 and side <= most]
            raise ModelError(
                f"patch={self.patch} does not divide the image of {height}x{width}; of width "
                f"{self.width} these fit: {', '.join(fit) or 'none'}"
            )
        if self.width < self.stem_channels:
            raise ModelError(
                f"width={self.width} is smaller than the {self.stem_channels} values of a patch "
                f"({channels} * {self.patch}^2): the stem could not embed them"
            )
        if not 0 < self.alpha <= 0.25:
            raise ModelError(f"alpha={self.alpha} must be in (0, 1/4]")
        if not 0 <= self.beta <= 1:
            raise ModelError(f"beta={self.beta} must be in [0, 1]")
        if not 1 <= self.shifted_channels <= self.width / 4:
            raise ModelError(
                f"width={self.width} cannot be shifted with alpha={self.alpha}: "
                f"4 * {self.shifted_channels} channels must lie in 4..{self.width}"
            )
        # Its square is added in float32, whose smallest normal number is 1.2e-38.
        if not 1e-18 <= self.pool_tau <= 1:
            raise ModelError(f"pool_tau={self.pool_tau} must be in [1e-18, 1]")
        self._check_windows()

    def _check_windows(self) -> None:
        if self.pool_windows < 1 or any(side % self.pool_windows for side in self.grid):
            raise ModelError(
                f"pool_windows={self.pool_windows} does not divide the grid of "
                f"{self.grid[0]}x{self.grid[1]} positions"
            )
        if self.pool != "grid" and self.pool_windows > 1:
            raise ModelError(
                f"pool_windows={self.pool_windows} needs pool=grid: pool={self.pool} has no windows"
            )

    @property
    def stem_channels(self) -> int:
        """Values of one patch."""
        return self.input_shape[0] * self.patch**2

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the token grid."""
        return self.input_shape[1] // self.patch, self.input_shape[2] // self.patch

    @property
    def shifted_channels(self) -> int:
        """Channels shifted in each direction."""
        return round(self.alpha * self.width)

    @property
    def shift_distances(self) -> tuple[int, ...]:
        """By how many positions each block shifts them."""
        # Further than half of a side is nearer the other way round.
        powers = max(1, min(self.grid) // 2).bit_length() if self.shift == "doubling" else 1
        return tuple(2 ** (block % powers) for block in range(self.depth))

    @property
    def features(self) -> int:
        """Values that the head sees."""
        if self.pool == "flat":
            return self.width * math.prod(self.grid)
        return self.width * self.pool_windows**2

    @property
    def absolute_channels(self) -> int:
        """Channels under the absolute value."""
        return round(self.beta * self.width)

    def least_flops(self) -> float:
        """See NetworkConfig; with M R^T folded, however the tokens are multiplied.

        Per block two products of T tokens with C x C matrices, 2 T C^2 FLOPs each; the backward
        pass costs twice the forward pass, and once for the stem, whose input needs no gradient.
        The product M R^T itself is once per batch, and left out.
        """
        tokens, width = math.prod(self.grid), self.width
        stem = 2 * tokens * self.stem_channels * width
        blocks = self.depth * 2 * (2 * tokens * width**2)
        head = 2 * self.features * self.num_classes
        return float(2 * stem + 3 * (blocks + head))
