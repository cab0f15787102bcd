"""What every network configuration has."""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from model.errors import ModelError

# The messages of the families name the values, so pydantic need not repeat the whole input.
STRICT = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkConfig:
    """What all families have in common; each derives its own configuration from it."""

    has_products: ClassVar[bool] = True
    """Whether the features are products with matrices, whose FLOPs say how long a pass takes."""

    kind: str
    """Family of the network, a name of `model.networks.registry.FAMILIES`."""
    input_shape: tuple[int, int, int]
    """Channels, height and width of an image exactly as its source has it."""
    num_classes: int
    """Number of classes."""

    def __post_init__(self) -> None:
        """Refuse what no family can be built for."""
        if self.num_classes < 2:
            raise ModelError(f"num_classes={self.num_classes} must be at least 2")
        if min(self.input_shape) < 1:
            raise ModelError(f"input_shape={self.input_shape} must have positive sides")

    def operations(self) -> dict[str, float]:
        """Operations of one image's forward and backward pass that are no products, by name.

        Of a network whose features are products there are none worth counting.
        """
        return {}

    def least_flops(self) -> float | None:
        """Least FLOPs of one image's forward and backward pass, from a formula.

        None, as for most families: they are what the passes of one image more are counted to take.
        A formula is for a network that multiplies in fewer ways than it could.
        """
        return None
