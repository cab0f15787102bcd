"""A network that the project does not have: one file, and one line of FAMILIES registers it."""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from model.certification.matrix_bounds import Matrices
from model.certification.rounding import ErrorState, Program, gamma
from model.networks.base import CertifiedNetwork, LipschitzBound
from model.networks.centering import Centering
from model.networks.config import STRICT, NetworkConfig
from model.networks.head import Head
from model.networks.init import set_initial


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyConfig(NetworkConfig):
    """Pixels, scaled one by one, centred."""

    kind: Literal["toy"] = "toy"
    gain: float = 0.5
    """Each pixel is multiplied by gain * sin(its weight)."""


class Toy(CertifiedNetwork):
    """head(centre(gain * sin(w) * x)): the constant of the features is gain, for any w."""

    norm = "l2"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.gain = config.gain
        self.pixels = torch.Size(config.input_shape).numel()
        self.w = set_initial(nn.Parameter(torch.empty(self.pixels)), "normal")
        self.centre = Centering(self.pixels)
        self.head = Head(self.pixels, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.centre(self.gain * self.w.sin() * images.flatten(1).to(self.w.dtype))

    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, factors = self.head(self.features(images))
        return logits, self.gain * factors

    @property
    def bounded_matrices(self) -> tuple[str, ...]:
        return ()

    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        return LipschitzBound(self.gain, {})

    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        norm = norms.double() * self.gain
        state = ErrorState(norm, gamma(16, program.activation) * norm, program, norm)
        state.translate(float(self.centre.mean.double().norm()) * 1.001)
        return self.head.margin_error(state, largest_factor)
