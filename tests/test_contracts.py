"""The contracts on imports are closed by default: what is not named is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("certified_pretrain", "pipeline", "model", "optim", "data_shards", "jobs")

FORBIDDEN = {
    "jobs.report": "pipeline.new_thing",
    "jobs.predict": "certified_pretrain.networks",
    "certified_pretrain.training": "pipeline.training.trainer",
    "jobs.gate": "pipeline.checkpoint.reader",
    "jobs.figures.plots": "jobs.model_registry.promotion",
    "model.networks.head": "optim.matrix_exp",
    "model.attacks": "data_shards.format.shard_index",
    "model.certification.rounding": "model.networks.base",
    "pipeline.run.events": "pipeline.training.trainer",
    "pipeline.driver.goodput": "deepspeed",
    "pipeline.plan": "ray",
    "data_shards.format.tar": "s3fs",
    "data_shards.sources.transcode": "torch",
    "data_shards.storage.store": "data_shards.format.shard_index",
    "optim.matmul": "data_shards.rng",
}
"""Imports of modules that exist or might be added, one for every kind of contract."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What the linter says of a copy of the packages with every forbidden import in it."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.png", "*.md")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    (copy / "pipeline/new_thing.py").write_text('"""A module that no contract names."""\n')
    for importer, imported in FORBIDDEN.items():
        path = copy / f"{importer.replace('.', '/')}.py"
        path.write_text(path.read_text() + f"\nimport {imported}\n")
    linter = Path(sys.executable).with_name("lint-imports")
    environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"}
    done = subprocess.run(
        [linter, "--no-cache"], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_a_forbidden_import_breaks_a_contract(broken, importer):
    assert f"{importer} -> {FORBIDDEN[importer]} " in broken


def test_a_module_that_no_layer_names_breaks_a_contract(broken):
    _, _, listed = broken.partition("not listed as layers")
    assert "- pipeline.new_thing" in listed


def test_no_folder_holds_more_than_a_reader_can_take_in():
    for package in PACKAGES:
        for folder in [ROOT / package, *(p for p in (ROOT / package).rglob("*") if p.is_dir())]:
            files = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
            assert len(files) <= 16, f"{folder.relative_to(ROOT)} has {len(files)} files"
