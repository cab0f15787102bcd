"""A progress bar on standard error: images, images/s, MB/s, time left."""

import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_shards.untrusted.terminal import PlainConsole


class ProgressBar:
    """Counts images and bytes; as a context manager it is drawn, unless `shown` is false.

    Args:
        label: What is done.
        total: Images in all; 0 = not known.
        shown: Draw the bar.
        done: Images that earlier runs did; they do not count as throughput.
    """

    def __init__(self, label: str, total: int, *, shown: bool, done: int = 0) -> None:
        self._images = self._bytes = 0
        self._start = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}{task.fields[of]} images"),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            console=PlainConsole(stderr=True),
            disable=not shown,
        )
        self._task = self._progress.add_task(
            label, total=total or None, completed=done, rate="", of=f"/{total}" if total else ""
        )

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, images: int, size: int) -> None:
        """Count images and their bytes."""
        self._images += images
        self._bytes += size
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = f"{self._images / seconds:.0f} images/s, {self._bytes / seconds / 1e6:.1f} MB/s"
        self._progress.update(self._task, advance=images, rate=rate)
