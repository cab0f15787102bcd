"""Rules of this repository that no linter knows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "model", "optim", "data_shards", "jobs")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST_FUNCTION = 75


def test_every_package_has_sources():
    assert {path.parent.name for path in SOURCES} >= set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_a_search_for_a_preset_ends_at_its_recipe():
    text = "".join(path.read_text() for path in (ROOT / "pipeline/presets").glob("*.py"))
    assert not [name for name in PRESETS if f'"{name}"' not in text]


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md"])
def test_paths_named_in_documents_exist(document):
    named = re.findall(
        rf"`((?:{'|'.join(PACKAGES)}|tests|docs)/[\w./-]*)`", (ROOT / document).read_text()
    )
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_tests_named_in_the_faults_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/faults.md").read_text())
    assert len(named) > 50
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).exists(), test


def test_modules_named_in_the_readme_run():
    modules = set(
        re.findall(
            r"python -m ((?:pipeline|jobs|data_shards)\.\w+)", (ROOT / "README.md").read_text()
        )
    )
    assert {"pipeline.pretrain", "jobs.evaluate_cra", "data_shards.write"} <= modules
    for module in modules:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert '__name__ == "__main__"' in source, module


@pytest.mark.integration
def test_importing_the_entry_is_quiet_and_starts_nothing():
    heavy = ("ray", "deepspeed", "mlflow")
    code = f"import sys, pipeline.pretrain; sys.exit(any(m in sys.modules for m in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
