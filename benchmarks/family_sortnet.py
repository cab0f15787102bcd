"""Time and memory of a SortNet layer, 1024 x 1024 at batch 128, against the plain broadcast.

    python -m benchmarks.family_sortnet

The peer makes the tensor of all distances (512 MiB) as published code does, and leaves the backward
pass to autograd. One thread; time is processor time, memory what the process grows by at its peak.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from model.networks.linf.distance import PowerMean, RankedSum, Reduction, distance
from model.networks.linf.sortnet import SortNetConfig

BATCH, WIDTH, POWER = 128, 1024, 8.0
SORTED = SortNetConfig(input_shape=(1, 1, 1), num_classes=2, width=1, depth=2, keep=0.85)
CASES: dict[str, tuple[Reduction, bool]] = {
    "training, p = 8": (PowerMean(POWER), True),
    "training, p = 300": (PowerMean(300.0), True),
    "top 10, with gradient": (RankedSum(SORTED.coefficients()), True),
    "top 10, without": (RankedSum(SORTED.coefficients()), False),
}


def broadcast(x: Tensor, w: Tensor, reduction: Reduction) -> Tensor:
    """The formulas as they are written."""
    a = (x[:, None] - w).abs()
    if isinstance(reduction, PowerMean):
        largest = a.amax(-1, keepdim=True)
        mean = (a / largest).pow(reduction.p).sum(-1).pow(1 / reduction.p)
        return largest.squeeze(-1) * mean
    coefficients = torch.tensor(cast(RankedSum, reduction).coefficients)
    return a.topk(len(coefficients), -1).values @ coefficients


Layer = Callable[[Tensor, Tensor, Reduction], Tensor]
LAYERS: dict[str, Layer] = {"tiled": distance, "broadcast": broadcast}


def work(layer: Layer, case: str) -> Callable[[], None]:
    """One pass of a layer over the same inputs."""
    reduction, gradient = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, WIDTH, generator=generator, requires_grad=gradient)
    w = torch.randn(WIDTH, WIDTH, generator=generator, requires_grad=gradient)

    def run() -> None:
        x.grad = w.grad = None
        y = layer(x, w, reduction)
        if gradient:
            y.sum().backward()

    return run


def peak_mib(layer: str, case: str) -> float:
    """MiB that a fresh process grows by at its peak in a pass; Linux only."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (layer, case))


def _peak(layer: str, case: str) -> float:
    torch.set_num_threads(1)
    # Code is loaded and threads start in a first pass of a small layer.
    small = torch.rand(2, 64, requires_grad=True)
    LAYERS[layer](small, small.detach(), CASES[case][0]).sum().backward()
    run = work(LAYERS[layer], case)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Measure all cases and record them."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in CASES:
        contestants = {name: work(layer, case) for name, layer in LAYERS.items()}
        seconds = interleaved(contestants, torch.device("cpu"), repeats=3, budget_s=8)
        memory = {name: peak_mib(name, case) for name in LAYERS}
        rows.append(
            {
                "case": case,
                "tiled s": seconds["tiled"],
                "broadcast s": seconds["broadcast"],
                "times faster": seconds["broadcast"] / seconds["tiled"],
                "tiled MiB": memory["tiled"],
                "broadcast MiB": memory["broadcast"],
            }
        )
    write_result(
        "family_sortnet",
        rows,
        [
            f"Layer {WIDTH} x {WIDTH}, batch {BATCH}, float32; forward, and backward where named.",
            "Target: at least 3 times faster in training, peak below 64 MiB.",
        ],
    )


if __name__ == "__main__":
    main()
