"""Random faults at random steps: the run ends with the same bits as if nothing had happened."""

import json
import subprocess
import sys

import pytest

from tests.end_to_end.chaos import HEAD, chaos, surroundings
from tests.end_to_end.ray_cluster import ROOT, cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

LITTLE_MEMORY = """
import sys
from pipeline.launch import ray_launcher
from pipeline.pretrain import main

def entry(settings):
    import torch
    from pipeline.launch import ray_launcher
    from pipeline.training.objective import Objective
    genuine = Objective.forward

    def forward(self, images, labels, now):
        if len(images) > 6 and now.step >= 12 and torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return genuine(self, images, labels, now)

    Objective.forward = forward
    ray_launcher._rank_entry(settings)

ray_launcher._rank_entry = entry
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def ray(tmp_path):
    with cluster(tmp_path, HEAD) as running:
        yield running


def test_three_seeds_of_chaos(tmp_path):
    with surroundings(tmp_path) as around:
        lines = list(chaos(around, range(3)))
    assert [line for ok, line in lines if not ok] == []
    assert len(lines) == 3


def test_one_rank_without_memory(ray, tmp_path):
    """Ray ends the group whose other rank waits; no failure is allowed, and none is counted."""
    options = (
        "digits --train.global-batch 48 --train.epochs 1 --train.warmup-epochs 0 --model.width 24 "
        f"--checkpoint.every-steps 5 --checkpoint.no-evaluate --cluster.address {ray.gcs} "
        f"--cluster.device cpu --storage {tmp_path} --name run"
    )
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, *options.split()],
        cwd=ROOT,
        env=ray.environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run/events.jsonl").read_text().splitlines()
    started = [row for row in map(json.loads, lines) if row["event"] == "Started"]
    assert [row["micro_batch"] for row in started] == [24, 12, 6]
    assert [row["step"] for row in started] == [0, 10, 10]
    assert started[-1]["facts"]["out of memory"] == "with micro-batches of 24, 12"
    spool = (tmp_path / "run/tracking/spool.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, spool) if "train/loss" in r.get("values", {})]
    assert steps == [*range(1, 13), *range(11, 13), *range(11, 31)]
