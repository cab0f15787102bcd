"""Cost and loss of the sound certificate: python -m benchmarks.evaluate --artifact A --shards S.

Measures, in one run, the whole evaluation of a test set (three columns, certificate, figures), its
independent verification, and the bound of one 4096 x 4096 matrix beside the time of the matrix
products that it consists of; computes from that the cost for LipNeXt-1B on one GPU.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.figures import draw_missing
from jobs.evaluation.runner import compute
from model.certification.matrix_bounds import matrix_bound
from model.networks.base import CertifiedNetwork
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network, parameter_count
from pipeline.presets.registry import run_preset
from pipeline.run.evaluation_summary import EvaluationSummary

_ORDER = 4096
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


def evaluation_rows(artifact: str, shards: str) -> list[Row]:
    """Evaluation in this process, on Ray with two tasks, and its verification."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        fields: dict[str, Any] = {"artifact": artifact, "shards": shards, "record": False}
        fields["out"] = f"{folder}/one"
        evaluate(fields | {"launcher": "local", "out": f"{folder}/warm"})
        found: list[EvaluationSummary] = []
        config = EvaluationConfig(**{**fields, "launcher": "local"})
        one = seconds(lambda: found.append(compute(config)))
        rows.append({"what": "evaluation, this process", "seconds": one})
        drawing = seconds(lambda: draw_missing(Store(f"{folder}/one"), found[0]))
        rows.append({"what": "its pictures, drawn when the numbers are told", "seconds": drawing})
        two = seconds(lambda: evaluate(fields | {"out": f"{folder}/two"}))
        rows.append({"what": "evaluation, 2 Ray tasks, start of Ray included", "seconds": two})
        attack = fields | {"launcher": "local", "attack": "fast", "out": f"{folder}/attack"}
        rows.append({"what": "with --attack fast", "seconds": seconds(lambda: evaluate(attack))})
        command = [sys.executable, "-m", "model.verify", f"{folder}/one"]
        command += ["--artifact", artifact, "--data.shards", shards]
        verify = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        rows.append({"what": "python -m model.verify, all samples", "seconds": verify})
    columns = found[0].columns
    loss = max(columns["nominal"].cra[eps] - value for eps, value in columns["sound"].cra.items())
    rows.append({"what": "cra_nominal - cra_sound, largest", "points": 100 * loss})
    rows.append({"what": "proved constant - 1", "value": found[0].network_bound - 1})
    rows.append(
        {"what": "proved - observed", "value": found[0].network_bound - found[0].observed_lipschitz}
    )
    rows.append({"what": "float64 error of a margin", "value": columns["sound"].largest_error_ball})
    return rows


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


def main(
    artifact: Annotated[str, tyro.conf.arg(help="URL of a trained artifact")],
    shards: Annotated[str, tyro.conf.arg(help="URL of its shard set")],
    order: int = _ORDER,
    tflops: float = 53.0,
    width: int = 512,
    batch: int = 8,
) -> None:
    """Measure and write benchmarks/results/evaluate.md.

    Args:
        artifact: URL of a trained artifact.
        shards: URL of its shard set.
        order: rows of the matrix whose bound is timed.
        tflops: float64 product rate of the GPU for which costs are computed.
        width: channels of the network whose passes are timed.
        batch: its images, of 256 tokens.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [*evaluation_rows(artifact, shards), *bound_rows(order, device, tflops * 1e12)]
    rows += pass_rows(width, 4, batch, torch.device(device))
    notes = [
        "Targets: sound evaluation of the digits test set under 20 s on 2 cores; "
        "cra_nominal - cra_sound below 0.05 points.",
        "Rows marked (computed) are arithmetic at the stated rate, not measured.",
    ]
    write_result("evaluate", rows, notes)


if __name__ == "__main__":
    tyro.cli(main)
