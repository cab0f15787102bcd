"""Which release of this project made something."""

import importlib.metadata


def release() -> str:
    """The installed one; "not installed" where the code runs from a checkout."""
    try:
        return importlib.metadata.version("certified-pretrain")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
