"""The commands of the tutorial after training, as they stand there, on a trained network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.end_to_end.ray_cluster import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]


def test_the_tutorial_leads_from_a_run_to_a_promoted_model(digits_run, tmp_path):
    storage = digits_run.storage
    (evaluation,) = digits_run.folder.glob("artifacts/*/evaluation/test")
    images = tmp_path / "photos/cat"
    images.mkdir(parents=True)
    for number, image in enumerate(load_digits().images[:3]):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(images / f"{number}.png")
    text = (ROOT / "docs/tutorial.md").read_text().partition("## 3.")[2]
    for name, value in {
        "runs/data/photos": f"{storage}/data/digits",
        "runs/photos": str(digits_run.folder),
        "photos/cat": str(images),
        "sqlite:///runs/": f"sqlite:///{storage}/",
        "--tracking.experiment photos": "--tracking.experiment digits",
        "jobs.report photos": f"jobs.report {digits_run.name}",
        "step-00000627": evaluation.parents[1].name,
    }.items():
        assert name in text
        text = text.replace(name, value)
    commands = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "photos version 1: promoted" in done.stdout
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["error"] for row in rows] == [None] * 3
    assert (tmp_path / "report/report.html").stat().st_size > 10_000
