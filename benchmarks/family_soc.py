"""SOC: a training step with the fast and with the plain series: python -m benchmarks.family_soc.

The plain series is differentiated by autograd; everything else is the same. One thread.
"""

from collections.abc import Callable
from unittest import mock

import torch

from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from model.networks.registry import build_network
from model.networks.soc import skew_conv
from model.networks.soc.network import SocConfig
from model.networks.soc.skew_conv import SkewConvolution, fast_series, series

# Channels, side of the image and of the filter: one layer of each stage of LipConvnet-20.
_LAYERS = ((32, 32, 3), (64, 16, 3), (128, 8, 3), (256, 4, 3), (2048, 1, 1))
_BATCH = 16
_TARGET = 1.3


def _step(work: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward pass."""

    def step() -> None:
        work().square().sum().backward()

    return step


def _compare(work: Callable[[], torch.Tensor], device: torch.device, repeats: int) -> Row:
    """Seconds of both, and their ratio."""

    def with_series(function: object) -> Callable[[], None]:
        def step() -> None:
            with mock.patch.object(skew_conv, "fast_series", function):
                _step(work)()

        return step

    contestants = {"plain": with_series(series), "fast": with_series(fast_series)}
    found = interleaved(contestants, device, repeats=repeats, budget_s=60)
    return {
        "plain s": found["plain"],
        "fast s": found["fast"],
        "plain / fast": found["plain"] / found["fast"],
    }


def layer_rows(device: torch.device) -> list[Row]:
    """One layer of each stage."""
    rows: list[Row] = []
    for channels, side, kernel in _LAYERS:
        layer = SkewConvolution(channels, channels, kernel, stride=1, train_terms=6, terms=15)
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(std=channels**-0.5)
        layer.to(device)
        x = torch.randn(_BATCH, channels, side, side, device=device, requires_grad=True)

        def work(layer: SkewConvolution = layer, x: torch.Tensor = x) -> torch.Tensor:
            return layer(x)

        name = f"layer {channels} channels, {side} x {side}, filter {kernel} x {kernel}"
        rows.append({"what": name, **_compare(work, device, 7)})
    return rows


def network_row(device: torch.device) -> Row:
    """All of LipConvnet-20, CIFAR size."""
    network = build_network(SocConfig(input_shape=(3, 32, 32), num_classes=10, depth=20))
    network.initialise(0)
    network.to(device).train()
    images = torch.rand(_BATCH, 3, 32, 32, device=device)
    found = _compare(lambda: network(images), device, 3)
    return {"what": "LipConvnet-20, forward and backward pass", **found}


def main() -> None:
    """Run all and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_result(
        "family_soc",
        [*layer_rows(device), network_row(device)],
        [
            f"Batch {_BATCH}, 6 terms, float32, forward and backward pass with all gradients.",
            f"Target: LipConvnet-20 at least {_TARGET} times faster with the fast series.",
            "The public implementations: `python -m benchmarks.families`.",
        ],
    )


if __name__ == "__main__":
    main()
