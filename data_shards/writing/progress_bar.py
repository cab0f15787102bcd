"""Progress of images that are written or checked: images/s, MB/s, time left."""

import time

from data_shards.command_line.progress import ProgressBar


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
