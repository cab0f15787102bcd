"""Radii as people write them: ratios such as 36/255."""

import math
import re
from collections.abc import Sequence

_RATIO = re.compile(r"(\d+)/([1-9]\d*)")


def eps_value(ratio: str) -> float:
    """Return the radius of a ratio such as ``36/255``, pixels in [0, 1].

    Raises:
        ValueError: if the text is not a positive ratio of two integers.
    """
    match = _RATIO.fullmatch(ratio)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"eps {ratio!r} is not a positive ratio such as 36/255")
    return int(match[1]) / int(match[2])


def check_table(eps: Sequence[str]) -> None:
    """Check the radii of a table.

    Raises:
        ValueError: one is not a positive ratio, or is named twice.
    """
    for ratio in eps:
        eps_value(ratio)
    if len(set(eps)) < len(eps):
        raise ValueError(f"eps {tuple(eps)} names a ratio twice")


def check_reach(eps: Sequence[str], norm: str, input_shape: Sequence[int]) -> None:
    """Check that no radius exceeds the distance of any two images with pixels in [0, 1].

    Args:
        eps: ratios.
        norm: "l2" or "linf".
        input_shape: channels, height and width.

    Raises:
        ValueError: one does: pixels up to 255 were thought of.
    """
    diameter = 1.0 if norm == "linf" else math.sqrt(math.prod(input_shape))
    for ratio in eps:
        if eps_value(ratio) > diameter:
            raise ValueError(
                f"eps {ratio} is larger than {diameter:g}, the greatest distance between two "
                "images with pixels in [0, 1]: eps is in these units, 36 of 255 is 36/255"
            )
