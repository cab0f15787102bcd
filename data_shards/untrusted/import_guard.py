"""A file of the user's folder that Python would import in place of a package of this project.

`python -m` puts the current folder first, and so does Ray in its processes: a module there that is
called `model` hides the package `model`.
"""

import importlib.util
from pathlib import Path

PACKAGES = ("certified_pretrain", "data_shards", "jobs", "model", "optim", "pipeline")
_HOME = Path(__file__).resolve().parents[2]


def refuse_shadowed(importing: str) -> None:
    """Check that Python finds the packages of this project where this file lies.

    Args:
        importing: the package that is being imported.

    Raises:
        ImportError: it finds another file of such a name; `python -m` says it in one line.
    """
    for package in PACKAGES:
        found = _origin(package)
        if found is not None and found.resolve().parent not in (_HOME, _HOME / package):
            raise ImportError(_hides(found, package), name=importing)


def hidden_by(folder: Path) -> str:
    """What to say of a file that hides a package where this folder comes first; "": there is none.

    Args:
        folder: the folder.
    """
    if folder.resolve() != _HOME:
        for package in PACKAGES:
            for found in (folder / f"{package}.py", folder / package / "__init__.py"):
                if found.exists():
                    return _hides(found, package)
    return ""


def _hides(found: Path, package: str) -> str:
    return (
        f"{found} hides the package {package!r} of certified-pretrain: rename it, or start from "
        "another folder"
    )


def _origin(package: str) -> Path | None:
    """The file that is or would be imported; None for a folder without one."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # imported already, by no finder
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None
