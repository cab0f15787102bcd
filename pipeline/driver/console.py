"""What the person sees: a live line on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from data_shards.untrusted.terminal import PlainConsole
from pipeline.run.events import Metrics, Started

_PLAIN_INTERVAL_S = 5.0
_WINDOW = 20
"""Steps over which the line takes means, or those of one record if it has more."""
_AVERAGED = ("train/loss", "train/clean", "train/certified", "train/images_per_s", "perf/mfu")


class _Lenient:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, UnicodeEncodeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_console() -> Iterator[Console]:
    """Standard output that ends no run: a log on a full disk, a pipe whose reader has gone."""
    yield PlainConsole(file=_Lenient(sys.stdout))
    try:
        sys.stdout.flush()
    except OSError:  # else the interpreter tries once more, and turns its exit status into 120
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class RunConsole:
    """Shows the progress of one run.

    On a terminal a live line, or as many as its width needs; in logs (Ray jobs, CI) a plain line
    every few seconds. Loss, accuracies, rate and MFU are means over the last 20 steps, or over the
    last record where it has more; goodput is of the run so far.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._records: deque[tuple[int, Mapping[str, float]]] = deque()
        self._step = 0
        self._total = 0
        self._task: TaskID | None = None
        self._first: tuple[int, float] | None = None
        self._next_plain = 0.0
        self._peak = ""
        self._bar = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("left"),
            TimeRemainingColumn(),
            # On a narrow terminal this column alone is broken into lines; the others stay whole.
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1)),
            console=console,
            transient=False,
        )

    def started(self, event: Started) -> None:
        """Print the facts of the run and begin the progress line."""
        for name, value in event.facts.items():
            self.console.print(Text.assemble((f"{name}:", "dim"), f" {value}"))
        self._total, self._step = event.total_steps, event.step
        self._records.clear()
        self._peak = " of measured" if event.measured_flops else ""
        if self.console.is_terminal:
            self._task = self._bar.add_task("", total=event.total_steps, completed=event.step)
            self._bar.start()

    def metrics(self, event: Metrics) -> None:
        """Advance the progress line."""
        self._records.append((max(1, event.step - self._step), event.values))
        self._step = event.step
        while sum(steps for steps, _ in self._records) - self._records[0][0] >= _WINDOW:
            self._records.popleft()
        if self._task is not None:
            self._bar.update(self._task, completed=event.step, description=self._summary(event))
            return
        now = time.monotonic()
        self._first = self._first or (event.step, now)
        if now >= self._next_plain or event.step == self._total:
            self._next_plain = now + _PLAIN_INTERVAL_S
            left = self._seconds_left(event.step, now)
            self.console.print(
                f"step {event.step}/{self._total}  {self._summary(event)}  left {left}",
                soft_wrap=True,
            )

    def _seconds_left(self, step: int, now: float) -> str:
        first_step, first_time = self._first or (step, now)
        if step == first_step:
            return "?"
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def _summary(self, event: Metrics) -> str:
        mean = self._means()
        if "train/loss" not in mean:
            return f"{event.values['train/skipped']:.0f} steps skipped"
        return (
            f"loss {mean['train/loss']:.4f}  clean {mean['train/clean']:.1%}  "
            f"certified {mean['train/certified']:.1%}  lr {event.values['train/lr']:.2e}  "
            f"eps {event.values['train/eps']:.3f}  {mean['train/images_per_s']:.0f} img/s"
            f"{self._use(event, mean)}"
        )

    def _means(self) -> dict[str, float]:
        """Means over the steps of the window; records whose steps were all skipped have none."""
        found = {}
        for name in _AVERAGED:
            rows = [(steps, row[name]) for steps, row in self._records if name in row]
            if rows:
                found[name] = sum(steps * value for steps, value in rows) / sum(n for n, _ in rows)
        return found

    def _use(self, event: Metrics, mean: Mapping[str, float]) -> str:
        mfu, goodput = mean.get("perf/mfu"), event.values.get("perf/goodput")
        text = "" if mfu is None else f"  MFU {mfu:.1%}{self._peak}"
        return text if goodput is None else f"{text}  goodput {goodput:.1%}"

    def message(self, text: str, label: str = "", style: str = "") -> None:
        """Print one line above the progress line.

        Args:
            text: the line, as it is.
            label: what stands before it.
            style: of the label.
        """
        self.console.print(Text.assemble((label, style), text), soft_wrap=True)

    def close(self) -> None:
        """End the progress line."""
        if self._task is not None:
            self._bar.stop()
            self._task = None
