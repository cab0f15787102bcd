import pytest

from benchmarks import published
from model.certification.eps import eps_value
from pipeline.presets.registry import PRESETS, run_preset


def record(preset, seed, clean, *certified):
    radii = published.FIGURES[preset].certified
    return {
        "preset": preset,
        "seed": seed,
        "commit": "0123456789ab",
        "processor_s": 60,
        "clean": clean,
        "certified": dict(zip(radii, certified, strict=True)),
    }


def test_the_table_is_current():
    """After a new preset or run: python -m benchmarks.published."""
    assert published.PAGE.read_text() == published.page(published.stored_records())


def test_a_row_has_what_was_published_and_the_mean_of_what_was_run():
    name = "cifar10-sll-XL"
    records = [record(name, 0, 0.72, 0.64), record(name, 1, 0.73, 0.65)]
    rows = {row.split("`")[1]: row for row in published.page(records).splitlines() if "`" in row}
    row = rows[name]
    assert "| 73.3 / 64.8 |" in row
    assert "| 72.5 / 64.5 (seeds 0, 1; 60 processor s each; 0123456) |" in row
    assert rows["cifar10-cpl-XL"].endswith("| not run |")
    assert "| none read |" in rows["cifar10-sll-M"]


def test_every_preset_that_needs_published_data_has_a_row_and_nothing_else_has_a_figure():
    rows = [row.split("`")[1] for row in published.page([]).splitlines() if row.startswith("| `")]
    assert len(rows) == len(set(rows))
    assert {name for name in PRESETS if run_preset(name).data.source == "none"} <= set(rows)
    assert set(published.FIGURES) <= set(rows)


@pytest.mark.parametrize("name", published.FIGURES)
def test_figures_fall_with_the_radius(name):
    figure = published.FIGURES[name]
    radii = [eps_value(ratio) for ratio in figure.certified]
    values = [figure.clean or 100.0, *figure.certified.values()]
    assert radii == sorted(radii)
    assert values == sorted(values, reverse=True)
