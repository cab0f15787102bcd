"""The float64 program of a certificate on a device: python -m benchmarks.float64_pass [--width N].

The bound of one large matrix beside the products that it consists of, with the cost for LipNeXt-1B
that follows, and the pass of a certification beside its own products. Imports no evaluation job.
"""

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from model.certification.matrix_bounds import matrix_bound
from model.networks.base import CertifiedNetwork
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network, parameter_count
from pipeline.presets.registry import run_preset

ORDER = 4096
_PRODUCTS = 4  # Gram matrix and three squarings
_IMAGES = 50_000
_LARGE = "imagenet-L32W4096"


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bound_rows(order: int, device: str, rate: float) -> list[Row]:
    """The bound of one matrix, and what follows for the 1B network at `rate` FLOP/s."""
    random = torch.randn(order, order, generator=torch.Generator().manual_seed(0))
    x = torch.linalg.qr(random.double().to(device))[0].float()
    double = x.double()
    product = min(seconds(lambda: double @ double) for _ in range(3))
    bound = min(seconds(lambda: matrix_bound(x, "x")) for _ in range(2))
    measured = 2 * order**3 / product
    config = cast(LipNeXtConfig, run_preset(_LARGE).model)
    matrices = 2 * config.depth + 1
    bounds = matrices * _PRODUCTS * 2 * config.width**3
    tokens = math.prod(config.grid)
    forward = _IMAGES * tokens * (2 * config.depth + 1) * 2 * config.width**2
    size = f"{parameter_count(config) / 1e9:.2f}B"
    return [
        {"what": f"bound of one {order} x {order} matrix", "seconds": bound},
        {"what": "ratio to its four products", "value": bound / (_PRODUCTS * product)},
        {"what": "float64 product rate here, GFLOP/s", "value": measured / 1e9},
        {"what": f"{size}: bound of all matrices at {rate / 1e12:g} TFLOP/s (computed)",
         "seconds": bounds / rate},
        {"what": f"{size}: float64 pass over {_IMAGES} images, folded (computed)",
         "seconds": forward / rate},
    ]  # fmt: skip


def pass_rows(width: int, depth: int, batch: int, device: torch.device) -> list[Row]:
    """The pass of a certification, in both programs, beside the matrix products in it."""
    config = LipNeXtConfig(
        input_shape=(3, 32, 32), num_classes=10, patch=2, width=width, depth=depth
    )
    tokens = batch * math.prod(config.grid)
    rows: list[Row] = []
    for dtype in (torch.float64, torch.float32):
        with torch.device(device):
            network = build_network(config).to(dtype).eval()
            images = torch.rand(batch, *config.input_shape, dtype=dtype)
            x, weight = (
                torch.rand(tokens, width, dtype=dtype),
                torch.rand(width, width, dtype=dtype),
            )
            patches = torch.rand(tokens, config.stem_channels, dtype=dtype)
        network.initialise(seed=0)

        def products(x: Tensor = x, weight: Tensor = weight, patches: Tensor = patches) -> None:
            F.linear(patches, weight[:, : patches.shape[1]])
            for _ in range(depth):
                torch.mm(weight, weight)  # M R^T
                for _ in range(2):
                    F.linear(x, weight)

        def evaluation(network: CertifiedNetwork = network, images: Tensor = images) -> None:
            network.logits_and_slopes(images)

        with torch.no_grad():
            times = interleaved({"pass": evaluation, "products": products}, device, repeats=5)
        ratio = times["products"] / times["pass"]
        flops = 2 * width * (tokens * (config.stem_channels + 2 * depth * width) + depth * width**2)
        what = f"C={width}, {depth} blocks, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        rows += [
            {"what": f"{what}: pass", "seconds": times["pass"]},
            {"what": f"{what}: product rate, GFLOP/s", "value": flops / times["products"] / 1e9},
            {"what": f"{what}: share of that rate", "value": ratio, "target": ">= 0.6"},
        ]
    return rows


def main(order: int = ORDER, width: int = 2048, depth: int = 4, batch: int = 64) -> None:
    """Measure and write the table.

    Args:
        order: rows of the matrix whose bound is timed.
        width: channels of the network whose passes are timed.
        depth: its blocks.
        batch: its images, of 256 tokens.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passes = pass_rows(width, depth, batch, device)
    rate = next(row["value"] for row in passes if "product rate" in row["what"]) * 1e9
    rows = [*bound_rows(order, str(device), rate), *passes]
    write_result("float64_pass", rows, [f"{device}. (computed): arithmetic at the rate measured."])


if __name__ == "__main__":
    tyro.cli(main)
