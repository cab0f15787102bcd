"""A training on a machine that has torch and the wheels of `benchmarks.gpu_day`, nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_day import PARTS
from benchmarks.gpu_wheels import WHEELS
from benchmarks.train import write_images
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from jobs.errors import EvaluationError
from jobs.evaluation.runner import (
    artifact_info,
)
from pipeline import pretrain
from tests.bare_site import bare_python, with_dependencies

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("pyarrow", "ray", "mlflow", "scipy", "sklearn", "matplotlib", "pandas", "s3fs")

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs a module where nothing but the wheels is installed, not even this project."""
    names = {*WHEELS, *with_dependencies("torch"), *with_dependencies("triton")}
    folder = tmp_path_factory.mktemp("bare")
    python = bare_python(folder / "environment", names)
    installed = {path.name for path in python.parents[1].glob("lib/*/site-packages/*")}
    assert "torch" in installed
    assert not installed & set(LARGE)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def run(*words):
        return subprocess.run(
            [python, "-m", *map(str, words)],
            env={**environment, "HOME": str(folder)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def trained(bare, tmp_path_factory):
    """A run of three steps that keeps nothing, and what it has said."""
    folder = tmp_path_factory.mktemp("run")
    write_images(folder / "images/train-00000.tar", (1, 8, 8), 10, 64)
    done = bare(
        "pipeline.pretrain", "digits", "--cluster.launcher", "local", "--checkpoint.none",
        "--data.shards", folder / "images", "--data.unindexed-samples", 1000, "--storage", folder,
        "--name", "run", "--train.stop-after", 3, "--train.precision", "bf16",
        "--train.log-every", 1, "--model.depth", 1,
    )  # fmt: skip
    return folder, done


def test_a_run_trains_without_ray_an_index_and_mlflow(trained):
    folder, done = trained
    assert done.returncode == 0, done.stdout + done.stderr
    spool = (folder / "run/tracking/spool.jsonl").read_text().splitlines()
    losses = [row["values"]["train/loss"] for row in map(json.loads, spool)
              if "train/loss" in row.get("values", {})]  # fmt: skip
    assert len(losses) == 3
    assert json.loads(spool[-1])["status"] == "FINISHED"
    assert "No module named 'mlflow'" in done.stderr


def test_a_run_that_keeps_nothing_says_so_and_so_does_what_follows_it(trained, capsys):
    folder, done = trained
    left = {path.name for path in (folder / "run").iterdir()}
    assert not left & {"checkpoints", "artifacts"}
    assert sum(path.stat().st_size for path in (folder / "run").rglob("*")) < 200_000
    assert "--checkpoint.none: this run keeps nothing, is not certified" in done.stdout
    assert "nothing can be evaluated" in done.stdout
    assert "--resume" not in done.stdout
    words = ["--resume", "--name", "run", "--storage", str(folder)]
    assert pretrain.main(words) == 2
    assert "nothing to go on from" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match=r"a run with --checkpoint\.none has none"):
        artifact_info(str(folder / "run"))


def test_what_needs_an_index_says_what_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "data_shards.untrusted.parquet")
    monkeypatch.delattr("data_shards.untrusted.parquet")
    with pytest.raises(ShardError, match="is a Parquet file, and pyarrow is not installed"):
        load_index(str(tmp_path))
    monkeypatch.setitem(sys.modules, "data_shards.write", None)
    words = ["digits", "--cluster.launcher", "local", "--storage", str(tmp_path)]
    assert pretrain.main(words) == 2
    assert "--data.source digits: its shards cannot be written" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_day_runs_on_a_cpu(bare, tmp_path):
    done = bare("benchmarks.gpu_day", "run", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_day.json").read_text())
    said = {name: result["said"] for name, result in results.items()}
    assert [result["ended"] for result in results.values()] == ["done"] * len(PARTS), said
    assert "skipped" in said["kernels"]  # they are found, and there is no GPU
    measured = {"network_step", "optimizer_step", "train_digits", "float64_pass"}
    assert measured <= {table["name"] for result in results.values() for table in result["tables"]}
    assert len(list(tmp_path.rglob("*"))) <= 8
