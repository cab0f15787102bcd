"""Each family's forward and backward pass beside its public implementation.

    python -m benchmarks.families --checkouts FOLDER

FOLDER holds git checkouts of the public repositories by their names; a row whose checkout is
missing reads `not run`. Same input, batch, width, depth and thread; the two take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import family_peers
from benchmarks.family_peers import Pass, Peer
from benchmarks.report import Row, write_result
from model.networks.config import NetworkConfig
from model.networks.liresnet.bronet import BRONetConfig
from model.networks.liresnet.network import LiResNetConfig
from model.networks.registry import build_network
from model.networks.sll.layers import AlmostOrthogonal
from model.networks.sll.network import SllConfig
from model.networks.soc.network import SocConfig
from model.networks.soc.skew_conv import SkewConvolution

TARGET = 1.1
_IMAGES: dict[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 10}


@dataclass(frozen=True)
class Pair:
    """Our implementation and a public one of the same sizes."""

    name: str
    shape: tuple[int, ...]
    """Of the input."""
    ours: Callable[[], Pass]
    public: Peer


def network(config: NetworkConfig) -> Pass:
    """Our network in training, with the factors of its margins."""
    made = build_network(config)
    made.initialise(0)
    made.train()

    def forward(images: Tensor) -> Tensor:
        logits, factors = made.logits_and_margin_factors(images)
        return logits.square().mean() + factors.mean()

    return forward


def layer(made: nn.Module) -> Pass:
    """One of our layers in training."""
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=p.shape[0] ** -0.5)
    made.train()
    return lambda x: made(x).square().mean()


def _residual(scaling: Any) -> Callable[[], Pass]:
    config = SllConfig(
        **_IMAGES, scaling=scaling, channels=20, conv_layers=8, dense_layers=3, dense_inner=1024
    )
    return partial(network, config)


_CPL = Peer(
    "MILES-PSL/Convex-Potential-Layer",
    partial(family_peers.cpl, 20, 8, 3, 1024),
    absent=("advertorch", "advertorch.attacks", "autoattack", "pandas"),
)


def pairs() -> list[Pair]:
    """All that are compared."""
    regularised: dict[str, Any] = {**_IMAGES, "width": 64, "dense_width": 512, "dense_layers": 4}
    sizes = (64, 4, 512, 4)
    return [
        Pair(
            "SLL, 8 convolutions of 20 channels, 3 dense layers of 1280 x 1024",
            (128, 3, 32, 32),
            _residual("sll"),
            Peer(
                "araujoalexandre/Lipschitz-SLL-Networks",
                partial(family_peers.sll, 20, 8, 3, 1024),
                absent=("torchvision", "torchvision.transforms"),
            ),
        ),
        # What a norm costs does not depend on the batch: the paper's is 256.
        *(
            Pair("CPL, of the same sizes", (b, 3, 32, 32), _residual("cpl"), _CPL)
            for b in (32, 128)
        ),
        Pair(
            "AOL, convolution of 192 channels, 8 x 8",
            (32, 192, 8, 8),
            lambda: layer(AlmostOrthogonal(192, 192, kernel=3, positions=64)),
            Peer("berndprach/1LipschitzLayersCompared", partial(family_peers.aol, 192)),
        ),
        Pair(
            "SOC, layer of 64 channels, 16 x 16 (ours fast, 2021's plain series)",
            (16, 64, 16, 16),
            lambda: layer(SkewConvolution(64, 64, 3, stride=1, train_terms=6, terms=15)),
            Peer("singlasahil14/SOC", partial(family_peers.soc_layer, 64)),
        ),
        Pair(
            "LipConvnet-5 (both fast series)",
            (16, 3, 32, 32),
            partial(network, SocConfig(**_IMAGES, depth=5)),
            Peer(
                "singlasahil14/improved_l2_robustness",
                partial(family_peers.lipconvnet, 5),
                absent=("apex", "torchvision"),
            ),
        ),
        Pair(
            "LiResNet L4W64, 4 dense layers of 512",
            (32, 3, 32, 32),
            partial(network, LiResNetConfig(**regularised, depth=4)),
            Peer("hukkai/liresnet", partial(family_peers.liresnet, *sizes)),
        ),
        Pair(
            "BRONet L4W64, rank 32, 4 dense layers of 512",
            (32, 3, 32, 32),
            partial(network, BRONetConfig(**regularised, depth=4, rank=32)),
            Peer("ntuaislab/BRONet", partial(family_peers.bronet, *sizes), folder="bronet"),
        ),
    ]


NOT_RUN: list[Row] = [
    {"family": "SortNet, l-infinity-distance net", "public": "not run: a CUDA extension"},
    {"family": "GroupSort in l-infinity", "public": "not run: no public implementation"},
]


def _once(forward: Pass, x: Tensor) -> tuple[float, float]:
    """Processor and wall seconds of a forward and backward pass."""
    cpu, wall = time.process_time(), time.perf_counter()
    forward(x).backward()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(pair: Pair, public: Pass, repeats: int) -> dict[str, Any]:
    """Median times of both and their ratio, the median over the turns."""
    ours = pair.ours()
    x = torch.rand(pair.shape, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(len(pair.shape) == 4 and pair.shape[1] > 3)  # a layer passes gradients on
    for forward in (ours, public):
        _once(forward, x)
    turns = []
    for turn in range(repeats):
        order = (ours, public) if turn % 2 else (public, ours)
        times = {forward: _once(forward, x) for forward in order}
        turns.append((times[ours], times[public]))
    ratio = statistics.median(mine[0] / other[0] for mine, other in turns)
    return {
        "ours CPU s": statistics.median(mine[0] for mine, _ in turns),
        "public CPU s": statistics.median(other[0] for _, other in turns),
        "ours wall s": statistics.median(mine[1] for mine, _ in turns),
        "public wall s": statistics.median(other[1] for _, other in turns),
        "ours / public (CPU)": ratio,
        "target": f"<= {TARGET:g}: {'met' if ratio <= TARGET else 'missed'}",
    }


def table(checkouts: Path, repeats: int) -> list[Row]:
    """A row for each pair."""
    rows: list[Row] = []
    for pair in pairs():
        hash_ = family_peers.commit(checkouts, pair.public)
        row = {"family": pair.name, "batch": pair.shape[0]}
        if hash_ is None:
            rows.append({**row, "public": f"not run: no checkout of {pair.public.repository}"})
            continue
        torch.manual_seed(0)
        public = family_peers.load(checkouts, pair.public)
        found = measure(pair, public, repeats)
        rows.append({**row, "public": f"{pair.public.repository} {hash_}", **found})
    return rows + NOT_RUN


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkouts", type=Path, required=True, help="folder of git checkouts")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_result(
        "families",
        table(arguments.checkouts, arguments.repeats),
        [
            "CIFAR size, float32, training mode, all gradients; networks with what bounds the "
            "margins (estimated norms, factors of the head).",
            f"Median of {arguments.repeats} turns after one to warm up; the ratio is the median of "
            "the ratios of neighbouring turns.",
            "Public code runs as published, but for calls of `.cuda()`, which do nothing, and "
            "cuDNN's gradient of a filter in LipConvnet, which is torch's.",
        ],
    )


if __name__ == "__main__":
    main()
