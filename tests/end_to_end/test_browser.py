"""Three trainings and nine evaluations, as a person sees them in Chromium."""

import importlib.util

import pytest

from jobs.evaluate_cra import evaluate
from jobs.report import PAGE
from jobs.report import main as report
from pipeline.tracking.client import TrackingConfig
from tests.end_to_end.conftest import pretrain
from tests.end_to_end.mlflow_ui import browser, chromium, report_picture, server, shots

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="needs pip install playwright"
    ),
]

SHORT = ("--cluster.launcher", "local", "--train.epochs", "3", "--checkpoint.every-steps", "23")
SMALL = (
    *(*SHORT, "--train.global-batch", "64", "--train.warmup-epochs", "1"),
    *("--model.depth", "2", "--checkpoint.no-evaluate"),
)
RUNS = {
    "base": ("--model.width", "32"),
    "wide-eps": ("--model.width", "32", "--loss.eps", "0.6"),
    "narrow": ("--model.width", "16"),
}


@pytest.fixture(scope="module")
def config(storage):
    """A store with three training runs, each evaluated at three steps, the last with an attack."""
    tracking = TrackingConfig(uri=f"sqlite:///{storage}/mlflow.db", experiment="digits")
    for name, changes in RUNS.items():
        run = pretrain(storage, name, *SMALL, *changes)
        artifacts = sorted(run.folder.glob("artifacts/*"))
        for attack, folder in zip(("none", "none", "fast"), artifacts, strict=True):
            fields = {"artifact": str(folder), "launcher": "local", "attack": attack}
            evaluate({**fields, "tracking": tracking})
    return tracking


def test_mlflow_shows_the_comparison_as_documented(config, tmp_path):
    pages = shots(config)
    with server(config.uri, tmp_path / "server.log") as address, browser() as context:
        page = context.new_page()
        for shot in pages:  # each waits for its texts and charts
            assert shot.take(page, address, tmp_path).read_bytes().startswith(b"\x89PNG")
    (evaluations,) = [shot for shot in pages if shot.name == "mlflow-evaluations"]
    assert len(evaluations.texts) == 1 + 9


def test_report_renders_with_no_console_error_and_no_network(config, tmp_path):
    out = tmp_path / "report"
    options = ["--tracking.uri", config.uri, "--out", str(out)]
    assert report([*RUNS, *options]) == 0
    with browser() as context:
        assert report_picture(context, out / PAGE, tmp_path / "report.png") == []
        page = context.new_page()
        page.goto((out / PAGE).as_uri())
        for row, name in enumerate(RUNS):
            assert name in page.locator("tbody").first.locator("tr").nth(row).inner_text()
        page.get_by_text("base: test images, classes, checkpoints, columns, figures").click()
        assert page.get_by_alt_text("radius.png of base").is_visible()
