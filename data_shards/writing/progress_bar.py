"""Progress of images that are written or checked: images/s, MB/s, time left."""

import time

from data_shards.command_line.progress import ProgressBar


class ImageProgress(ProgressBar):
    """Counts images and bytes; see `ProgressBar`."""

    def __init__(self, label: str, total: int, *, shown: bool, done: int = 0) -> None:
        super().__init__(label, total, unit="images", shown=shown, done=done)
        self._images = self._bytes = 0
        self._start = time.monotonic()

    def __call__(self, images: int, size: int) -> None:
        """Count images and their bytes."""
        self._images += images
        self._bytes += size
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = f"{self._images / seconds:.0f} images/s, {self._bytes / seconds / 1e6:.1f} MB/s"
        self.advance(images, rate)
