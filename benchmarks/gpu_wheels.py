"""What a machine with torch alone lacks for `benchmarks.gpu_day`, as wheels to be copied."""

import re
import subprocess
import sys
from pathlib import Path

WHEELS = (
    "numpy", "pillow", "simplejpeg", "webdataset", "braceexpand", "xxhash",  # images
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection",  # settings
    "tyro", "typeguard", "docstring_parser", "PyYAML",
    "rich", "Pygments", "markdown-it-py", "mdurl",  # console
    "deepspeed", "einops", "hjson", "msgpack", "ninja", "packaging", "py-cpuinfo", "psutil", "tqdm",
    "pytest", "pluggy", "iniconfig",
)  # fmt: skip
"""Distributions that a training without Ray, an index and MLflow imports, and that are not torch's
own: tests/benchmarks/test_bare_machine.py trains where nothing else is."""
LIMIT = 40_000_000
"""Bytes of all wheels together."""
_FROM_SOURCE = {"deepspeed"}
"""No wheel is published. What is built here without operators holds Python code alone."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_ROOT = Path(__file__).parents[1]


def pinned() -> list[str]:
    """The wheels at the versions that are tested, as requirements.

    Raises:
        ValueError: one has no tested version.
    """
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    pins = {_plain(line.partition("==")[0]): line for line in lines if "==" in line}
    if missing := [name for name in WHEELS if _plain(name) not in pins]:
        raise ValueError(f"constraints.txt has no version of {', '.join(missing)}")
    return [pins[_plain(name)] for name in WHEELS]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(folder: Path, python: str = "3.12") -> int:
    """Fetch the wheels for a Linux machine with a Python of this version.

    Returns:
        Their bytes.

    Raises:
        ValueError: they are larger than the limit.
        subprocess.CalledProcessError: pip could not get one; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    built = [pin for pin in pinned() if _plain(pin.partition("==")[0]) in _FROM_SOURCE]
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    binary = ["--only-binary", ":all:", "--python-version", python, *platforms]
    published = [pin for pin in pinned() if pin not in built]
    for command in (
        ["download", "--no-deps", "--dest", str(folder), *binary, *published],
        # Its set-up asks for the torch that is installed here.
        ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *built],
    ):
        subprocess.run([*pip, *command], check=True)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > LIMIT:
        raise ValueError(f"the wheels in {folder} have {size:,} bytes, more than {LIMIT:,}")
    return size
