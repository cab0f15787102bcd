"""What a person sees of a job on the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from data_shards.untrusted.terminal import PlainConsole
from jobs.evaluation.progress import EvaluationProgress, OnProgress

_LINE_EVERY_S = 30.0


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
def following(console: Console) -> Iterator[OnProgress]:
    """Show the tasks that have ended and their scores so far: a bar, in a log a line at times."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    last = time.monotonic()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(progress: EvaluationProgress) -> None:
            nonlocal last
            bar.update(
                task, completed=progress.done, total=progress.total, description=str(progress)
            )
            if not console.is_terminal and time.monotonic() - last >= _LINE_EVERY_S:
                console.print(str(progress), soft_wrap=True)
                last = time.monotonic()

        yield show
