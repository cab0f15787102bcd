"""Processes that a job starts: none goes on when the job is told to stop."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterable
from types import FrameType


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit with the usual status, so that what is open is closed."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def end_processes(processes: Iterable[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Ask processes to stop, wait for them, kill those that take longer.

    Args:
        processes: some may have ended.
        grace_s: seconds that they are given.
    """
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(0.1)
    for process in running:
        process.kill()  # does nothing to one that has ended
        process.wait()
