"""Evaluations without drawings: four figures take longer than the certificates of a small set."""

import io

import pytest
from PIL import Image

from jobs.evaluation import figures

DRAWN = {
    name: getattr(figures, name)
    for name in ("cra_png", "radius_histogram_png", "bounds_png", "strip_png")
}


def _blank(*_args, **_more) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session", autouse=True)
def blank_figures():
    """An evaluation of this process writes empty PNGs, except with `drawn_figures`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(figures, name, _blank)
        yield


@pytest.fixture(scope="module")
def drawn_figures(blank_figures):
    """In the modules that ask for it evaluations draw."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in DRAWN.items():
            patch.setattr(figures, name, draw)
        yield
