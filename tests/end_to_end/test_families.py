"""Every family from its first step to a served prediction, each act by its own command line."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_shards.sources.digits import digits
from data_shards.write import write_shard_set
from tests.end_to_end.conftest import ROOT
from tests.mlflow_database import empty_database

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPS = "1/2550"
"""Small enough for networks of a few steps."""
FAMILIES = {
    "lipnext": "digits",
    "sll": "digits-sll",
    "cpl": "digits-cpl",
    "aol": "digits-aol",
    "soc": "digits-soc",
    "soc with an MLP head": "digits-soc-mlp",
    "liresnet": "digits-liresnet",
    "bronet": "digits-bronet",
    "sortnet": "digits-sortnet",
    "sortnet with a tanh head": "digits-sortnet-mlp",
    "l-infinity-distance net": "digits-linfdist",
    "groupsort": "digits-groupsort",
}
"""Their presets on digits."""
SHORT = ["--train.epochs", "0.5", "--train.warmup-epochs", "0"]
PICTURES = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_shard_set(digits(), str(folder))
    return folder


def python(*words: str | Path) -> str:
    """Run a module as a person would; returns what it prints."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def command(capsys):
    """The same in this process, which has MLflow and torch loaded already."""

    def run(module: str, *words: str | Path) -> str:
        status = importlib.import_module(module).main([*map(str, words)])
        printed = capsys.readouterr()
        assert status == 0, f"{module} {words}\n{printed.out}\n{printed.err}"
        return printed.out

    return run


def pictures(shards: Path, samples: dict[str, list], folder: Path) -> Path:
    """The first images of the certified split, as files."""
    folder.mkdir()
    for shard, key in list(zip(samples["shard"], samples["key"], strict=True))[:PICTURES]:
        with tarfile.open(shards / shard) as members:
            (folder / f"{key}.png").write_bytes(members.extractfile(f"{key}.png").read())
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_certified_verified_promoted_and_served(
    family, shards, tmp_path, command
):
    tracking = empty_database(tmp_path, "families")
    recorded = ["--tracking.uri", tracking.uri, "--tracking.experiment", tracking.experiment]
    python(
        *("pipeline.pretrain", FAMILIES[family], "--data.shards", shards, "--storage", tmp_path),
        *(
            "--name",
            "run",
            "--tracking.uri",
            tracking.uri,
            "--tracking.experiment",
            tracking.experiment,
        ),
        *("--cluster.launcher", "local", "--checkpoint.no-evaluate", *SHORT),
    )
    (artifact,) = (tmp_path / "run" / "artifacts").iterdir()
    certificate = tmp_path / "certificate"
    evaluated = command(
        *(
            "jobs.evaluate_cra",
            "--artifact",
            artifact,
            "--data.shards",
            shards,
            "--out",
            certificate,
        ),
        *("--eps", EPS, "--cluster.launcher", "local", *recorded),
    )
    assert "cra_sound" in evaluated
    body = json.loads((certificate / "certificate.json").read_text())
    assert body["columns"]["sound"]["certified"][EPS] > 0

    verified = python("model.verify", certificate, "--artifact", artifact, "--data.shards", shards)
    assert verified.startswith("OK")
    assert "samples checked: 360 of 360" in verified

    norm = body["norm"]
    command("jobs.gate", "rule", "digits", "--rule.eps", EPS, "--rule.norm", norm, *recorded)
    command("jobs.gate", "candidate", "digits", certificate, *recorded)
    assert "digits version 1: promoted" in command("jobs.gate", "promote", "digits", *recorded)

    samples = pq.read_table(certificate / "samples.parquet").to_pydict()
    images = pictures(shards, samples, tmp_path / "images")
    out = tmp_path / "predictions.jsonl"
    command("jobs.predict", "models:/digits@champion", images, "--out", out, *recorded)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    predicted = {Path(row["path"]).stem: row for row in rows}
    assert len(predicted) == PICTURES
    for i in range(PICTURES):
        row = predicted[samples["key"][i]]
        # The radius that is served is the certified one.
        assert row["label"] == samples["sound_prediction"][i]
        assert row["radius"] == pytest.approx(samples["sound_radius"][i], rel=1e-6, abs=1e-9)
        assert row["certified"] == (samples["sound_radius"][i] > 1 / 2550)
        assert (row["norm"], row["eps"]) == (norm, EPS)
