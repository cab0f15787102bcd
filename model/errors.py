"""The error of this package that a person can act on, and what to say of an unknown name."""

import difflib
from collections.abc import Iterable


class ModelError(ValueError):
    """A network setting, an image, a weight or an artifact file that is not valid."""


def known_names(name: object, known: Iterable[str]) -> str:
    """`(nearest: ...); known: ...`: the name that was probably meant, and all that there are."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" (nearest: {near[0]})" if near else ""
    return f"{hint}; known: {', '.join(names)}"
