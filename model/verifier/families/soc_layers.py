"""What LipConvnets consist of: their convolutions in order."""

from collections.abc import Iterator
from typing import NamedTuple

from model.verifier.network_config import Config


class Layer(NamedTuple):
    """One convolution and what follows it."""

    channels: int
    """Of the convolution."""
    side: int
    stride: int
    pooled: bool
    positions: int


def is_matrix(config: Config, layer: Layer) -> bool:
    """Whether an orthogonal matrix is stored in place of a filter of one tap."""
    return layer.side == 1 and config["pointwise"] == "manifold"


def convolutions(config: Config) -> Iterator[Layer]:
    """All convolutions. The last stage halves the image first and has filters of one tap."""
    channels = config["width"]
    _, height, width = config["input_shape"]
    positions = height * width
    yield Layer(channels, 3, 1, False, positions)
    per_stage = config["depth"] // config["stages"]
    for stage in range(config["stages"]):
        last = stage == config["stages"] - 1
        for i in range(per_stage):
            stride = 2 if i == (0 if last else per_stage - 1) else 1
            channels, positions = channels * stride**2, positions // stride**2
            pooled = i == per_stage - 1 and not (last and config["head"] == "mlp")
            yield Layer(channels, 1 if last else 3, stride, pooled, positions)
            channels = channels // 2 if pooled else channels
