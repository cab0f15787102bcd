"""An environment that has some distributions, as links, and nothing else that is installed here."""

import importlib.metadata
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement


def with_dependencies(name: str) -> set[str]:
    """A distribution, and what it needs of what is installed."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found.add(name)
            needed = [Requirement(text) for text in requires]
            waiting += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def bare_python(folder: Path, names: Iterable[str]) -> Path:
    """Interpreter of a new environment in a folder that finds these distributions alone."""
    venv.create(folder, with_pip=False, symlinks=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=variables))
    for name in names:
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            link = site / top
            if top != ".." and not link.exists():
                link.symlink_to(Path(str(importlib.metadata.distribution(name).locate_file(top))))
    return folder / "bin" / "python"
