"""Progress of work that takes longer than a few seconds: a bar, in a log a line at times."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from data_shards.untrusted.terminal import PlainConsole

_LINE_EVERY_S = 10.0


class ProgressBar:
    """What is done of how much, and the time that is left; as a context manager it is drawn.

    Args:
        label: what is done.
        total: units in all; 0 = not known yet.
        unit: their name.
        shown: draw anything.
        done: units that earlier runs did; they say nothing about the time.
        console: where; default: standard error.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str,
        shown: bool = True,
        done: int = 0,
        console: Console | None = None,
    ) -> None:
        self._label, self._unit = label, unit
        self._console = console or PlainConsole(stderr=True)
        self._shown = shown
        self._total, self._done, self._before = total, done, done
        self._begin = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}{task.fields[of]} {task.fields[unit]}", markup=False),
            TextColumn("{task.fields[note]}", markup=False),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task(
            label, total=total or None, completed=done, of=self._of(), unit=unit, note=""
        )

    def _of(self) -> str:
        return f"/{self._total}" if self._total else ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count units that are done.

        Args:
            units: how many.
            note: what else there is to say now.
        """
        self.reach(self._done + units, self._total, note)

    def reach(self, done: int, total: int, note: str = "") -> None:
        """Say how much is done of how much."""
        self._done, self._total = done, total
        self._bar.update(self._task, completed=done, total=total or None, of=self._of(), note=note)
        now = time.monotonic()
        ended = total and done >= total
        if not self._shown or self._console.is_terminal or ended:
            return
        if now - self._said >= _LINE_EVERY_S:
            self._said = now
            line = f"{self._label}: {done}{self._of()} {self._unit}  {note}  left {self.left()}"
            self._console.print(" ".join(line.split()), soft_wrap=True)

    def left(self) -> str:
        """The time that is left, as minutes and seconds; `?` before one unit is done."""
        made = self._done - self._before
        if made <= 0 or not self._total:
            return "?"
        seconds = (time.monotonic() - self._begin) / made * max(0, self._total - self._done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class ImageProgress(ProgressBar):
    """Counts images and bytes; see `ProgressBar`."""

    def __init__(self, label: str, total: int, *, shown: bool, done: int = 0) -> None:
        super().__init__(label, total, unit="images", shown=shown, done=done)
        self._bytes = 0

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._shown and self._done > self._before:
            self._console.print(
                f"{self._label}: {self._done}{self._of()} images, {self._rate()}", soft_wrap=True
            )

    def __call__(self, images: int, size: int) -> None:
        """Count images and their bytes."""
        self._bytes += size
        self._done += images
        self.reach(self._done, self._total, self._rate())

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-3)
        images = self._done - self._before
        return f"{images / seconds:.0f} images/s, {self._bytes / seconds / 1e6:.1f} MB/s"
