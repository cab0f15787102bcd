"""What a person sees of an evaluation on the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from jobs.evaluation.progress import EvaluationProgress, OnProgress

_LINE_EVERY_S = 30.0


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
