"""Rules of this repository that no linter knows."""

import ast
import collections
import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.untrusted.limits import PREFIX, Limits
from pipeline.presets.registry import PRESETS
from pipeline.resilience.hang_detector import _WAITING

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("certified_pretrain", "pipeline", "model", "optim", "data_shards", "jobs")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST_FUNCTION = 75
FOLDERS = (*PACKAGES, "tests", "benchmarks", "docs", ".github")
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.toml", "Makefile", *(f"{folder}/**/*" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
    if path.name == "Makefile" or path.suffix in (".py", ".md", ".toml", ".yaml", ".yml")
)
MADE_BY_TESTS = ("model/artifact.json", "pipeline/new_thing.py", "pipeline.new_thing")


def test_no_folder_is_too_long_to_read():
    folders = collections.Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert [folder for folder, files in folders.items() if files > 16] == []


def test_every_package_has_sources():
    assert {path.parent.name for path in SOURCES} >= set(PACKAGES)


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {length} lines"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert long == []


def _named_paths(text):
    """Files and folders of the project, as `optim/zero3_adam.py`; capitals are placeholders."""
    heads = "|".join((*PACKAGES, "tests", "benchmarks", "docs"))
    for name in re.findall(rf"(?<![\w.$/{{}}-])/?((?:{heads})/[\w/.-]*\w)", text):
        if name == name.lower() and name not in MADE_BY_TESTS:
            yield name


def _named_modules(text):
    """Modules and what they define, as `optim.zero3_adam.in_sequence`.

    `model.x` and `optim.x` are also options and variables: they count where x is in the package.
    """
    heads = "|".join((*PACKAGES, "tests", "benchmarks"))
    for name in re.findall(rf"(?<![\w./-])((?:{heads})(?:\.[a-z]\w*)+)", text):
        head, second, *_ = name.split(".")
        inside = any((ROOT / head / file).exists() for file in (second, f"{second}.py"))
        if (inside or head not in ("model", "optim")) and name not in MADE_BY_TESTS:
            yield name


def _defined(name):
    """Whether a dotted name is a package, a module, or a word in the module that it begins with."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        if path.with_suffix(".py").exists():
            after = parts[count : count + 1]
            return all(re.search(rf"\b{word}\b", _text(path.with_suffix(".py"))) for word in after)
        if path.is_dir():
            return count == len(parts) or re.search(
                rf"\b{parts[count]}\b", _text(path / "__init__.py")
            )
    return False


@functools.cache
def _text(path):
    return path.read_text() if path.exists() else ""


def test_files_and_modules_that_a_text_names_exist():
    """In code, comments, manifests and documents; the log of changes names what was there, too."""
    for path in TEXTS:
        text = path.read_text()
        if path.name == "CHANGELOG.md":
            text = "\n".join(re.findall(r"^\| .* \| (.*) \|$", text, re.MULTILINE))
            assert len(text) > 1000
        wrong = [name for name in _named_paths(text) if not (ROOT / name).exists()]
        wrong += [name for name in _named_modules(text) if not _defined(name)]
        assert not wrong, path


def test_files_named_without_a_folder_exist():
    known = {path.name for path in TEXTS}
    for path in TEXTS:
        if "tests" not in path.relative_to(ROOT).parts and path.name != "CHANGELOG.md":
            named = set(re.findall(r"(?<![\w./*{}-])([a-z_0-9]+\.py)\b", path.read_text()))
            assert named <= known, path


def test_the_hang_detector_knows_where_a_thread_waits_for_other_ranks():
    """Else the innermost frame of a rank that waits would be taken for the one that hangs."""
    for part in _WAITING:
        _, package, *inside = part.rstrip("/").split("/")
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        assert Path(folder, *inside).exists(), part


def test_a_search_for_a_preset_ends_at_its_recipe():
    text = "".join(path.read_text() for path in (ROOT / "pipeline/presets").glob("*.py"))
    assert not [name for name in PRESETS if f'"{name}"' not in text]


@pytest.mark.parametrize(
    ("document", "least"),
    [("docs/reference/faults.md", 60), ("docs/reference/exit-codes.md", 7), ("SECURITY.md", 30)],
)
def test_tests_named_in_a_document_exist(document, least):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / document).read_text())
    assert len(named) >= least
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).exists(), test


def test_every_limit_stands_in_the_security_document():
    text = (ROOT / "SECURITY.md").read_text()
    for field in dataclasses.fields(Limits):
        assert f"`{PREFIX}{field.name.upper()}`" in text


OWN_JSON = (
    "data_shards/untrusted/json_input.py",
    "model/verifier/files.py",  # shares no code with what it verifies
    "pipeline/training/worker.py",  # what this process has just written
    "pipeline/resilience/heartbeat.py",  # between the ranks of one run
)
"""Where JSON is parsed; everything else goes through the first."""


def test_json_from_outside_is_parsed_in_one_place():
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if re.search(r"\bjson\.loads?\b", path.read_text())
    }
    assert found == set(OWN_JSON)


PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})


def _anchors(page):
    """What a link may name behind # in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", _text(page), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", _text(page), flags=re.S)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.integration
def test_importing_the_entry_is_quiet_and_starts_nothing():
    heavy = ("ray", "deepspeed", "mlflow")
    code = f"import sys, pipeline.pretrain; sys.exit(any(m in sys.modules for m in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
