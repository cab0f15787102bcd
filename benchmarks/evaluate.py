"""Cost and loss of the sound certificate: python -m benchmarks.evaluate --artifact A --shards S.

Measures, in one run, the whole evaluation of a test set (three columns, certificate, figures), its
independent verification, and the bound of one 4096 x 4096 matrix beside the time of the matrix
products that it consists of; computes from that the cost for LipNeXt-1B on one GPU.
"""

import subprocess
import sys
import tempfile
from typing import Annotated, Any

import torch
import tyro

from benchmarks.float64_pass import ORDER, bound_rows, pass_rows, seconds
from benchmarks.report import Row, write_result
from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.figures import draw_missing
from jobs.evaluation.runner import compute
from pipeline.run.evaluation_summary import EvaluationSummary


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


def main(
    artifact: Annotated[str, tyro.conf.arg(help="URL of a trained artifact")],
    shards: Annotated[str, tyro.conf.arg(help="URL of its shard set")],
    order: int = ORDER,
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
