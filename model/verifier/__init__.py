"""Derives certificates a second time, in NumPy; imports nothing else of the project."""

from typing import Any

from model.verifier.errors import RefusalError, UnsupportedError
from model.verifier.families.registry import family_of


def supported(network: dict[str, Any]) -> bool:
    """Whether certificates of a network can be derived again.

    Args:
        network: its configuration as artifact.json has it.
    """
    try:
        family_of(network, "network")
    except UnsupportedError:
        return False
    except RefusalError:
        return "kind" in network  # damaged, of a family that is known: `verify` says what is wrong
    return True
