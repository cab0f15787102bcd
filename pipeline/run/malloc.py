"""What becomes of freed memory in the processes that this project starts."""

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Numbers of glibc's mallopt(3)."""
_LARGEST_BLOCK = 32 << 20
"""Larger blocks go back to the system as soon as they are freed; glibc takes no higher limit."""
KEPT = 256 << 20
"""Bytes that a process keeps at most of what it has freed and does not use."""


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next pass, where the allocator is glibc's.

    Every step and every batch frees what the next one asks for. Memory that goes back to the system
    in between comes back page by page: 4 % of a manifold step, 6 % of a forward pass on a CPU.
    Between passes a process holds up to `KEPT` more; its peak hardly changes (docs/log.md). What
    the environment says of the allocator stands.

    Returns:
        Whether it was set.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    # The first ends glibc's own adaptation of both.
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, KEPT))
