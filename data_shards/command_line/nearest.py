"""The names that were probably meant by an unknown one."""

import difflib
from collections.abc import Iterable

_NEAR, _LEAST = 3, 0.5


def nearest(name: str, known: Iterable[str]) -> str:
    """` (nearest: ...)` with up to three known names, or nothing.

    A name is near if it is like the whole, or if its last part, after a dot, is like the last part.
    """

    def likeness(other: str) -> float:
        last, others = (text.rpartition(".")[2].strip("-") for text in (name, other))
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        part = difflib.SequenceMatcher(None, last, others).ratio()
        # The last part decides: the others are known by heart less well.
        return max(whole, 0.99 * part if "." in other or "." in name else 0)

    ranked = sorted(
        ((likeness(other), other) for other in known), key=lambda row: (-row[0], row[1])
    )
    near = [other for score, other in ranked[:_NEAR] if score >= _LEAST]
    return f" (nearest: {', '.join(near)})" if near else ""
