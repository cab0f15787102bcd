"""Certification tax of LiResNet and BRONet: python -m benchmarks.family_liresnet.

The share of a training step that the bound costs: a step less one that takes the same maps as they
are stored, without norms to estimate and without matrices to make orthonormal. One thread.

`--checkouts FOLDER` with git checkouts adds the public implementations. Their tax is the part of a
step that does not grow with the batch, from steps of two batches.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

from benchmarks import family_peers
from benchmarks.family_peers import Peer
from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from model.networks.config import NetworkConfig
from model.networks.liresnet import layers
from model.networks.liresnet.bronet import BRONetConfig
from model.networks.liresnet.network import LiResNetConfig
from model.networks.liresnet.regularized_conv import RegularisedConvolution
from model.networks.registry import build_network

_SIZES = {"input_shape": (3, 32, 32), "num_classes": 10, "dense_layers": 8}


def _stored(x: Tensor, share: float) -> Tensor:
    return x


@contextlib.contextmanager
def _free_of_charge() -> Iterator[None]:
    """No norm is estimated, no row is made orthonormal."""

    def no_estimate(self: RegularisedConvolution, kernel: Tensor) -> Tensor:
        return kernel.new_ones(())

    with (
        mock.patch.object(layers, "orthonormal_rows", _stored),
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


def public_rows(
    name: str, peer: Peer, checkouts: Path | None, batches: tuple[int, int]
) -> list[Row]:
    """The same of a public implementation, whose maps cannot be had without their bound."""
    hash_ = checkouts and family_peers.commit(checkouts, peer)
    if not checkouts or not hash_:
        return [{"network": f"{name}, {peer.repository}: not run, no checkout"}]
    forward = family_peers.load(checkouts, peer)

    def step(images: Tensor) -> None:
        forward(images).backward()

    inputs = {str(batch): torch.rand(batch, 3, 32, 32) for batch in batches}
    work = {batch: partial(step, images) for batch, images in inputs.items()}
    found = interleaved(work, torch.device("cpu"), repeats=2, budget_s=60)
    small, large = batches
    per_image = (found[str(large)] - found[str(small)]) / (large - small)
    return [
        {
            "network": f"{name}, {peer.repository} {hash_}",
            "batch": batch,
            "step s": found[str(batch)],
            "without bound s": batch * per_image,
            "tax %": 100 * (1 - batch * per_image / found[str(batch)]),
        }
        for batch in batches
    ]


def main(width: int = 128, checkouts: Path | None = None) -> None:
    """Run all and write the table.

    Args:
        width: channels.
        checkouts: folder of git checkouts of the public implementations.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense, batches = 4 * width, (16, 64)
    sizes: dict[str, Any] = {**_SIZES, "width": width, "dense_width": dense}
    configs: dict[str, NetworkConfig] = {
        "LiResNet": LiResNetConfig(**sizes),
        "BRONet": BRONetConfig(**sizes, rank=width // 2),
    }
    public = {
        "LiResNet": (family_peers.liresnet, "hukkai/liresnet", ""),
        "BRONet": (family_peers.bronet, "ntuaislab/BRONet", "bronet"),
    }
    rows: list[Row] = []
    for family, config in configs.items():
        name = f"{family} L12W{width}, dense {dense}"
        rows += [tax_row(name, config, batch, device) for batch in batches]
        build, repository, folder = public[family]
        peer = Peer(repository, partial(build, width, 12, dense, 8), folder=folder)
        rows += public_rows(name, peer, checkouts, batches)
    write_result(
        "family_liresnet",
        rows,
        [
            "CIFAR size, float32, forward and backward pass with all gradients.",
            "Without bound: stem and blocks without their norms, matrices used as they are stored; "
            "of public code, the part of the step that grows with the batch.",
            "BRONet's transforms and its low-rank products belong to the network, not to the tax "
            "(with public code, what of them does not grow with the batch counts as tax).",
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
