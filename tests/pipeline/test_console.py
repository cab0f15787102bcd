"""The line of progress says what the records say."""

import io

import pytest
from rich.text import Text

from data_shards.command_line.progress import ProgressBar
from data_shards.untrusted.terminal import PlainConsole
from pipeline.driver.console import RunConsole
from pipeline.run.events import Metrics, Started


def metrics(step, loss):
    values = {"train/loss": loss, "train/clean": 0.5, "train/certified": 0.25}
    values |= {"train/images_per_s": 9.0, "train/lr": 1e-3, "train/eps": 0.1}
    return Metrics(step, values, time_ms=0)


def lines(records, monkeypatch):
    """The plain lines after each record, with one due every time."""
    monkeypatch.setattr("pipeline.driver.console._PLAIN_INTERVAL_S", 0.0)
    out = io.StringIO()
    display = RunConsole(PlainConsole(file=out, width=200))
    display.started(Started({}, 0, 1000))
    for record in records:
        display.metrics(record)
    return out.getvalue().splitlines()


def test_a_record_of_20_steps_is_shown_as_it_is(monkeypatch):
    shown = lines([metrics(20, 8.0), metrics(40, 1.44)], monkeypatch)
    assert "step 40/1000  loss 1.4400" in shown[-1]


def test_records_of_single_steps_are_averaged_over_20(monkeypatch):
    records = [metrics(step, float(step)) for step in range(1, 31)]
    shown = lines(records, monkeypatch)
    assert "loss 1.0000" in shown[0]
    assert "loss 20.5000" in shown[-1]  # the mean of 11 to 30


@pytest.mark.parametrize("width", [80, 110, 200])
def test_a_terminal_of_any_width_shows_step_figures_and_time_left(width):
    out = io.StringIO()
    display = RunConsole(PlainConsole(file=out, width=width, force_terminal=True))
    display.started(Started({}, 0, 1000))
    display.metrics(metrics(20, 1.44))
    display.close()
    shown = " ".join(Text.from_ansi(out.getvalue().split("\x1b[2K")[-1]).plain.split())
    for part in ("step 20/1000", "left", "loss 1.4400", "certified 25.0%", "9 img/s"):
        assert part in shown, shown


def test_a_line_of_a_long_job_has_the_time_that_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    with ProgressBar("certifying", 4, unit="tasks", console=PlainConsole(file=out)) as bar:
        now[0] = 5.0
        bar.advance()
        assert out.getvalue() == ""  # not every one
        now[0] = 30.0
        bar.advance(note="clean 99 %")
    assert out.getvalue().strip() == "certifying: 2/4 tasks clean 99 % left 0:30"
