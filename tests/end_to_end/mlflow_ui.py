"""The MLflow UI and the report in a browser: docs/how-to/mlflow.md and its pictures.

    python -m tests.end_to_end.mlflow_ui --uri sqlite:///runs/mlflow.db --experiment digits

makes the pictures of docs/images again; it needs Chromium (Debian's package) and playwright.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from jobs.mlflow_views import views
from jobs.report import PAGE
from jobs.report import main as report
from pipeline.tracking.client import TrackingConfig
from pipeline.tracking.reader import Reader
from pipeline.tracking.ui_views import save_views

WAIT_MS = 120_000  # the first page compiles several MB of script on a busy machine
# Closes the assistant, which hides a third of the page on the first visit.
QUIET = """
localStorage["mlflow.assistant.panelOpen_v1"] = "false";
localStorage["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"] = "true";
"""
CHART = "[data-testid='experiment-view-compare-runs-card'] :is(.main-svg, canvas.foreground)"


def chromium():
    """Path of Debian's browser; None if there is none."""
    return shutil.which("chromium")


@contextlib.contextmanager
def server(uri, log):
    """The MLflow UI on a free port of the loopback device; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Job execution off: its helper processes outlive the server.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with Path(log).open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, process, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait_for(address, process, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the MLflow server did not start:\n{Path(log).read_text()}")


@contextlib.contextmanager
def browser():
    """A Chromium context with room for a table of ten columns."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        context = launched.new_context(viewport={"width": 1680, "height": 900})
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(QUIET)
        yield context
        launched.close()


@dataclass(frozen=True)
class Shot:
    """A page of the UI.

    Attributes:
        name: of the picture, without its ending.
        path: below the address of the server.
        texts: what a person must be able to read on it.
        charts: at least so many must be drawn.
        height: of the window, pixels.
        click: a file to open before the picture is taken.
        column: the heading to which the table is scrolled.
    """

    name: str
    path: str
    texts: tuple[str, ...]
    charts: int = 0
    height: int = 620
    click: str = ""
    column: str = ""

    def take(self, page, address, folder):
        """Open the page, wait until it shows what it should, and save a picture."""
        page.set_viewport_size({"width": 1680, "height": self.height})
        page.goto("about:blank")  # else only the fragment changes, and charts keep other runs
        page.goto(address + self.path)
        for text in self.texts:
            page.get_by_text(text, exact=True).first.wait_for()
        if self.click:
            page.get_by_text(self.click, exact=True).first.click()
            page.get_by_text(self.click, exact=True).nth(1).wait_for()  # its heading
        if self.column:
            _scroll_to(page, self.column)
        if self.charts:
            page.locator(CHART).nth(self.charts - 1).wait_for()
        page.wait_for_timeout(4000)  # pictures load, axes settle
        place = page.get_by_text("Path: file:").first
        if place.count():  # a folder of the machine that makes the picture
            place.evaluate("element => element.style.visibility = 'hidden'")
        path = Path(folder, f"{self.name}.png")
        page.screenshot(path=path)
        return path


def _scroll_to(page, column):
    """Scroll the body of a table, which takes its headings along, until a column is in sight."""
    heading = page.get_by_text(column, exact=True).first
    body = page.locator(".ag-center-cols-viewport").first
    for left in range(0, 10_000, 200):
        body.evaluate(f"element => element.scrollLeft = {left}")
        page.wait_for_timeout(200)
        place = heading.bounding_box() if heading.count() else None  # out of sight: not drawn
        if place and place["x"] + place["width"] < page.viewport_size["width"]:
            return
    raise RuntimeError(f"there is no column {column}")


def shots(config):
    """The pages of docs/how-to/mlflow.md for a store; saves its views."""
    reader = Reader(config)
    runs = reader.training_runs()
    evaluations = [e for found in reader.evaluations(runs).values() for e in found]
    saved = save_views(config, views(runs))
    views_of = {name[0]: (path, name) for name, path in saved.items()}
    names = tuple(run.name for run in runs)
    attacked = [e for e in evaluations if e.params["attack"] != "none"] or evaluations
    base = f"/#/experiments/{runs[0].experiment_id}"
    training = "?workflowType=machine_learning"
    models = tuple(model.name for found in reader.models(runs).values() for model in found)
    figures = (attacked[0].name, "cra.png", "radius.png")
    files = f"{base}/runs/{attacked[0].run_id}/artifacts{training}"

    def view(number, name, texts, **options):
        path, title = views_of[number]
        return Shot(name, path, (title, *texts), **options)

    return [
        view("1", "mlflow-runs", (*names, f"{len(runs)} matching runs"), height=500),
        view("2", "mlflow-steps", names, charts=5, height=900),
        view("3", "mlflow-settings", names, charts=3, height=900),
        view("4", "mlflow-evaluations", [e.name for e in evaluations], height=760),
        view("5", "mlflow-attack", {e.name for e in attacked}, charts=4, height=900),
        Shot("mlflow-models", f"{base}/models{training}", models, column="cra_sound/l2/255_255"),
        Shot("mlflow-cra", files, figures, height=970, click="cra.png"),
        Shot("mlflow-radius", files, figures, height=970, click="radius.png"),
    ]


def report_picture(context, page_path, picture):
    """Open a report as a file; returns what the console and the network had to say."""
    noise = []
    page = context.new_page()
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url))
    page.set_viewport_size({"width": 1200, "height": 1500})
    page.goto(Path(page_path).as_uri())
    broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.alt)")
    page.screenshot(path=picture)
    page.close()
    allowed = Path(page_path).as_uri()
    return [line for line in noise + broken if line != allowed and not line.startswith("data:")]


def make_pictures(config, out):
    """Save all pictures of docs/how-to/mlflow.md."""
    with tempfile.TemporaryDirectory() as folder, browser() as context:
        with server(config.uri, Path(folder, "server.log")) as address:
            page = context.new_page()
            for shot in shots(config):
                shot.take(page, address, out)
        arguments = ["--tracking.uri", config.uri, "--tracking.experiment", config.experiment]
        if report([*arguments, "--out", folder]):
            raise RuntimeError("the report failed")
        report_picture(context, Path(folder, PAGE), Path(out, "report.png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--out", default="docs/images")
    chosen = parser.parse_args()
    make_pictures(TrackingConfig(uri=chosen.uri, experiment=chosen.experiment), chosen.out)
