"""Console scripts, and files of the user that hide a package of the project."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.untrusted.import_guard import hidden_by
from pipeline.run.ray_session import ray_session

ROOT = Path(__file__).resolve().parents[2]


def scripts():
    """Of pyproject.toml, which Python 3.10 has no parser for."""
    _, _, table = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")
    lines = table.partition("\n\n")[0].splitlines()
    return {name: entry.strip('"') for name, entry in (line.split(" = ") for line in lines)}


def test_every_entry_of_the_project_has_a_command_that_is_there():
    found = scripts()
    for entry in found.values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    modules = {entry.partition(":")[0] for entry in found.values()}
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("pipeline", "jobs", "data_shards")
        for path in (ROOT / package).glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert modules == runnable | {"model.verifier.command"}
    assert found.keys() >= {"certified-pretrain", "certified-evaluate", "certified-verify"}


def run(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", ["pipeline.plan", "jobs.predict"])
def test_a_file_that_hides_a_package_is_named_in_one_line(tmp_path, module):
    (tmp_path / "model.py").write_text("raise SystemExit('imported')\n")
    done = run(tmp_path, "-m", module, "digits")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/model.py hides the package 'model' of certified-pretrain" in done.stderr


def test_such_a_file_is_named_before_ray_starts_whose_processes_would_meet_it(
    tmp_path, monkeypatch
):
    """A command is not concerned itself: the folder of the script comes first, not the current."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    assert hidden_by(tmp_path) == ""  # a folder without __init__.py hides nothing
    (tmp_path / "jobs/__init__.py").write_text("")
    with (
        pytest.raises(ConnectionError, match=r"__init__\.py hides the package 'jobs'"),
        ray_session(),
    ):
        pass
    assert hidden_by(ROOT) == ""


def test_the_library_says_so_too(tmp_path):
    (tmp_path / "optim.py").write_text("")
    done = run(tmp_path, "-c", "import certified_pretrain")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert "optim.py hides the package 'optim'" in done.stderr
