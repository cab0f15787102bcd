"""Certification tax of LiResNet and BRONet: python -m benchmarks.family_liresnet.

The share of a training step that the bound costs: a step less one that takes the same maps as they
are stored, without norms to estimate and without matrices to make orthonormal. One thread.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from model import orthogonal_layers
from model.bronet import BRONetConfig
from model.build import build_network
from model.config import NetworkConfig
from model.liresnet import LiResNetConfig
from model.regularised import RegularisedConvolution

_SIZES = {"input_shape": (3, 32, 32), "num_classes": 10, "dense_layers": 8}


def _stored(x: Tensor, share: float) -> Tensor:
    return x


@contextlib.contextmanager
def _free_of_charge() -> Iterator[None]:
    """No norm is estimated, no row is made orthonormal."""

    def no_estimate(self: RegularisedConvolution, kernel: Tensor) -> Tensor:
        return kernel.new_ones(())

    with (
        mock.patch.object(orthogonal_layers, "orthonormal_rows", _stored),
        mock.patch.object(RegularisedConvolution, "_estimate", no_estimate),
    ):
        yield


def tax_row(name: str, config: NetworkConfig, batch: int, device: torch.device) -> Row:
    """Seconds of a forward and backward pass with and without what the bound needs."""
    network = build_network(config)
    network.initialise(0)
    network.to(device).train()
    images = torch.rand(batch, 3, 32, 32, device=device)

    def step() -> None:
        logits, factors = network.logits_and_margin_factors(images)
        (logits.square().mean() + factors.mean()).backward()

    def free_step() -> None:
        with _free_of_charge():
            step()

    work: dict[str, Callable[[], None]] = {"step": step, "free": free_step}
    found = interleaved(work, device, repeats=2, budget_s=60)
    share = 1 - found["free"] / found["step"]
    return {
        "network": name,
        "batch": batch,
        "step s": found["step"],
        "without bound s": found["free"],
        "tax %": 100 * share,
    }


def main(widths: list[int]) -> None:
    """Run all and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for width in widths:
        dense = 4 * width
        configs: dict[str, NetworkConfig] = {
            f"LiResNet L12W{width}, dense {dense}": LiResNetConfig(
                **_SIZES, width=width, dense_width=dense
            ),
            f"BRONet L12W{width}, dense {dense}": BRONetConfig(
                **_SIZES, width=width, dense_width=dense, rank=width // 2
            ),
        }
        rows += [
            tax_row(name, config, batch, device)
            for name, config in configs.items()
            for batch in (16, 64)
        ]
    write_result(
        "family_liresnet",
        rows,
        [
            "CIFAR size, float32, forward and backward pass with all gradients.",
            "Without bound: stem and blocks without their norms, matrices used as they are stored.",
            "BRONet's transforms and its low-rank products belong to the network, not to the tax.",
            "The public implementations: `python -m benchmarks.families`.",
        ],
    )


if __name__ == "__main__":
    main([int(width) for width in sys.argv[1:]] or [128])
