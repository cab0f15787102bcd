"""What a person sees of a job on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console

from data_shards.command_line.progress import ProgressBar
from data_shards.untrusted.terminal import PlainConsole
from jobs.evaluation.progress import OnProgress


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


@contextlib.contextmanager
def following(console: Console, label: str) -> Iterator[OnProgress]:
    """Show the tasks that have ended, their scores so far and the time that is left.

    Args:
        console: where.
        label: what is done.
    """
    with ProgressBar(label, 0, unit="tasks", console=console) as bar:
        yield lambda progress: bar.reach(progress.done, progress.total, progress.scores)
