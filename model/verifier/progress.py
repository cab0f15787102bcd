"""How far a long verification is: a line on standard error every ten seconds."""

import sys
import time

_EVERY_S = 10.0


class Progress:
    """Counts what is done and says how long the rest will take.

    Args:
        what: is done.
        total: how much there is.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._begin = self._said = time.monotonic()

    def add(self, count: int = 1) -> None:
        """Count what has been done since the last call."""
        self._done += count
        now = time.monotonic()
        if now - self._said < _EVERY_S or self._done >= self._total:
            return
        self._said = now
        left = int((now - self._begin) / self._done * (self._total - self._done))
        sys.stderr.write(
            f"{self._what}: {self._done} of {self._total}, left {left // 60}:{left % 60:02d}\n"
        )
