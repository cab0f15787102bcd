"""Pixels of sets that fit into memory: read whole in each process that needs them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_shards.sources.base import encode_png

Pixels = npt.NDArray[np.uint8]


class PackedImages:
    """All images of a set, (N, H, W) or (N, H, W, 3); pickled without them.

    Args:
        read: Returns the pixels; picklable.
    """

    def __init__(self, read: Callable[[], Pixels]) -> None:
        self._read = read
        self._pixels: Pixels | None = None

    def __call__(self, numbers: Sequence[int]) -> list[bytes]:
        """Return some images as PNG."""
        if self._pixels is None:
            self._pixels = self._read()
        return [encode_png(self._pixels[i]) for i in numbers]

    def __reduce__(self) -> tuple[type["PackedImages"], tuple[Any]]:
        return PackedImages, (self._read,)
