"""What the commands of this package share: errors in one line, and the exit status."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from data_shards.untrusted.terminal import PlainConsole


def exit_status(
    act: Callable[[Console, Console], int], refused: tuple[type[Exception], ...]
) -> int:
    """Do what a command asks for; returns its exit status, 2 for bad input or 1 for a failure.

    Args:
        act: of the consoles of standard output and standard error.
        refused: errors of bad input; they and all others are said in one line.
    """
    errors = PlainConsole(stderr=True)
    try:
        return act(PlainConsole(), errors)
    except refused as error:
        errors.print(f"error: {error}", soft_wrap=True)
        return 2
    except Exception as error:
        errors.print(f"failed: {type(error).__name__}: {error}", soft_wrap=True)
        return 1
