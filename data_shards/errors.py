"""The error of shard sets, and how the entries of this package end on an error."""

import contextlib
import sys
from collections.abc import Iterator

from data_shards.untrusted.limits import UntrustedError

_INTERRUPTED = 130


class ShardError(ValueError):
    """A shard set, a sample or a request for one is wrong; the message names what and where."""


@contextlib.contextmanager
def exit_on_error(kept: str = "") -> Iterator[None]:
    """Run an entry: one line on standard error in the place of a traceback.

    Args:
        kept: What Ctrl-C leaves for the next run; without it the interrupt goes on.

    Raises:
        SystemExit: With status 1 on a refused request, 130 when interrupted.
    """
    try:
        yield
    except (ShardError, UntrustedError, OSError) as error:  # OSError: a full disk, an absent store
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if not kept:
            raise
        sys.stderr.write(f"interrupted; {kept}\n")
        sys.exit(_INTERRUPTED)
