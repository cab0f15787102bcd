"""Counter-based random words: a pure function of (seed, stream, purpose, counter).

Only raw words of the Philox bit generator are used. NumPy keeps those stable between releases,
which it does not promise for the distributions of `numpy.random.Generator`.
"""

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError

WORDS_PER_COUNTER = 4
_LIMIT = 2**64


def philox_words(
    seed: int, stream: int, *, purpose: int, count: int, start: int = 0, attempt: int = 0
) -> npt.NDArray[np.uint64]:
    """Return `count` rows of four 64-bit words, one row per counter value from `start` on.

    Args:
        seed: First half of the key, in [0, 2**64).
        stream: Second half of the key: the epoch, or the number of an image.
        purpose: Separates uses that share a key.
        count: Number of rows.
        start: First counter value; row i is the same whatever the start.
        attempt: Separates repeated draws for one counter value.

    Returns:
        Words, shape (count, 4).

    Raises:
        ShardError: seed or stream outside [0, 2**64).
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < _LIMIT:
            raise ShardError(f"{name} {value} is outside [0, 2**64)")
    generator = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64),
        counter=np.array([start, 0, attempt, purpose], dtype=np.uint64),
    )
    words = generator.random_raw(count * WORDS_PER_COUNTER)
    return np.asarray(words, dtype=np.uint64).reshape(count, WORDS_PER_COUNTER)


def unit_interval(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Map words to [0, 1) with 53 bits each, keeping the shape."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
