import ast
from pathlib import Path

import pytest

from pipeline.run import layout

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = Path("pipeline/run/layout.py")


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 100_000_000, 12_345_678_901])
def test_the_name_of_a_step_says_which_one_it_is(step):
    assert layout.step_of(layout.step_folder(step)) == step
    assert layout.step_of(f"s3://bucket/run/{layout.checkpoint(step)}/") == step


@pytest.mark.parametrize(
    "name",
    [
        "step-500",
        "step-backup",
        "step-00000500.bak",
        "step-00000500 ",
        "step-000000500",  # would be a second name of step 500
        "step--0000500",
        "step-٠٠٠٠٠٥٠٠",
        "Step-00000500",
        "copy of step-00000500",
        ".DS_Store",
        "",
    ],
)
def test_every_other_name_is_no_step(name):
    assert layout.step_of(name) is None


def _texts(tree):
    """String constants that are no docstrings, nor parts of other strings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        if isinstance(node.value, str):
            yield node.lineno, node.value


def _spelled(tree):
    """Where a module spells a path of a run's folder by itself."""
    files = {
        value for value in vars(layout).values() if isinstance(value, str) and "." in value
    } - {layout.__name__, layout.__file__, layout.__doc__, vars(layout)["__cached__"]}
    folders = {layout.CHECKPOINTS, layout.ARTIFACTS, layout.TRACKING, "hangs", "damaged", "profile"}
    for line, text in _texts(tree):
        words = text.split("/")
        if files & set(words) or (len(words) > 1 and words[0] in folders) or "step-" in text:
            yield line, text
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "child":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and argument.value in folders:
                    yield node.lineno, argument.value


def test_no_other_module_spells_a_path_of_a_run():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for package in ("pipeline", "jobs")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.relative_to(ROOT) != LAYOUT
        for line, text in _spelled(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_a_spelled_path_is_found():
    code = 'run.child("checkpoints")\nrun.write("run.json", b"")\nf"hangs/step-{step:08d}.txt"\n'
    assert {line for line, _ in _spelled(ast.parse(code))} == {1, 2, 3}
