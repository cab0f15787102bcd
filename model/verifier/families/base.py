"""What a family of networks states so that the verifier can prove its radii."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from model.verifier.errors import SAME_BOUND
from model.verifier.mathematics.linear_head import Head
from model.verifier.mathematics.matrix_bounds import MatrixBounds, bounds_of_matrix
from model.verifier.mathematics.rounding import ErrorState, Floats, Program
from model.verifier.network_config import Config, Setting

Tensors = Mapping[str, npt.NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]


class Family(ABC):
    """A network with its stored float32 tensors."""

    norm: ClassVar[Literal["l2", "linf"]] = "l2"
    same_bound: ClassVar[float] = SAME_BOUND
    """Relative difference of stated and derived bounds that is no disagreement."""
    settings: ClassVar[Mapping[str, Setting]]
    """Fields of the configuration, besides kind, input_shape and num_classes."""
    head: Head

    def __init__(
        self, config: Config, tensors: Tensors, matrices: Mapping[str, MatrixBounds]
    ) -> None:
        self.config, self.tensors, self.matrices = config, tensors, matrices

    @classmethod
    def misfit(cls, config: Config) -> str | None:
        """What cannot be built with such settings, each of them within its limits."""
        return None

    @classmethod
    @abstractmethod
    def shapes(cls, config: Config) -> Shapes:
        """Names and shapes of all stored tensors."""

    @classmethod
    def bounded(cls, config: Config) -> list[str]:
        """Names of the matrices of the certificate's `layers`, in order."""
        return []

    @classmethod
    def bound_matrix(
        cls, config: Config, name: str, tensor: npt.NDArray[np.float32]
    ) -> MatrixBounds:
        """The numbers of one of `layers`."""
        return bounds_of_matrix(tensor)

    def parts(self) -> dict[str, float]:
        """Constants of the parts of the network that are not 1 for any weights."""
        return {}

    @property
    def bound(self) -> float:
        """L: Lipschitz constant of the features in the pixels; infinite if nothing is proved."""
        return math.prod(self.parts().values()) * (1 + 2.0**-40) if self.parts() else 1.0

    @abstractmethod
    def features(self, images: npt.NDArray[np.uint8]) -> Floats:
        """Features (B, F) of images (B, channels, height, width) in float64."""

    @abstractmethod
    def carry(self, norms: Floats, program: Program) -> ErrorState:
        """Error of the features of images of at most these norms, shape (B,)."""

    @abstractmethod
    def underflow(self, program: Program) -> float:
        """Omega of section 5, step 6, for activations of size 1."""

    def refuted(self) -> str | None:
        """What a stored number says of this network that is not so."""
        return None

    @property
    def nominal_bound(self) -> float:
        """What the nominal column multiplies its factors by."""
        return 1.0

    @property
    def floats_per_image(self) -> int:
        """Largest number of values of an activation of one image."""
        return int(np.prod(self.config["input_shape"]))

    def wide(self, name: str) -> Floats:
        """A tensor in float64; the conversion is exact."""
        return self.tensors[name].astype(np.float64)

    def filter(self, i: int) -> Floats:
        """Weight of block i in float64; a matrix is a filter of one tap."""
        weight = self.wide(f"blocks.{i}.weight")
        return weight if weight.ndim == 4 else weight[:, :, None, None]

    def evaluate(self, images: npt.NDArray[np.uint8]) -> tuple[Floats, Any]:
        """Logits (B, K), and what the head knows of every image."""
        with np.errstate(all="ignore"):  # what overflows is refused where logits are looked at
            return self.head.logits(self.features(images))

    def margin_error(self, norms: Floats, program: Program) -> Floats:
        """E(N): error of a margin of the program, for images of at most these norms."""
        with np.errstate(all="ignore"):  # what overflows or is not a number counts as infinite
            state = self.carry(norms, program)
            return state.close(self.head.margin_error(state), self.underflow(program))

    def settle(self, local: Any, norms: Floats, program: Program) -> Any:
        """What the head knows of every image, raised by the error of its features."""
        with np.errstate(all="ignore"):
            return self.head.settle(local, self.carry(norms, program))
