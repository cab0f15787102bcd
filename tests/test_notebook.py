"""The notebook of the documentation: its cells name things that exist; a slow test runs it."""

import ast
import importlib
import json
from pathlib import Path

import pytest

import certified_pretrain as cp

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/first-steps.ipynb"


def cells():
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_cells_compile_and_name_what_exists():
    used = set()
    for node in ast.walk(ast.parse("\n".join(cells()))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("cp."):
            name = ast.unparse(node).removeprefix("cp.")
            value = cp
            for part in name.split("."):
                value = getattr(value, part)
            used.add(name)
    assert used >= {"networks.lipnext", "ManifoldAdam", "certified", "evaluate", "load"}
    methods = {"certify", "attack", "save", "plot", "evaluate"}
    assert all(f".{method}(" in "".join(cells()) for method in methods)


def test_it_is_kept_without_outputs():
    """Else every run would change the file."""
    assert '"output_type"' not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_it_runs_and_the_attack_stays_outside_of_the_radius(monkeypatch, tmp_path):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=280, resources=resources).execute()
    text = str([cell.get("outputs") for cell in notebook.cells])
    assert "inside: 0 of 64 changed" in text
    assert text.count("image/png") == 2
