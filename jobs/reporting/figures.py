"""The figures of a report as SVG: robust accuracy over eps, and over the cost of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_shards.untrusted.text import figure_text
from jobs.figures import plot_style
from jobs.reporting.report_data import ComparisonGroup, ReportEntry
from model.certification.eps import eps_value

_PANELS = 3


def curves_svg(group: ComparisonGroup, places: Sequence[int]) -> bytes:
    """Draw `cra_sound` of every run over eps, and the band up to its accuracy under attack.

    The true robust accuracy lies in the band. Its upper edge has a mark where the attack was run.

    Args:
        group: the runs.
        places: place of each run in the report, which decides its colour and line style.
    """
    figure = plot_style.new_figure(9, 5)
    axes = figure.add_subplot()
    sound = [entry.chosen.summary.columns["sound"] for entry in group.entries]
    limit = plot_style.largest_eps(group.eps, [column.curve for column in sound])
    attacked = False
    for place, entry, column in zip(places, group.entries, sound, strict=True):
        summary, style = entry.chosen.summary, plot_style.run_style(place)
        eps, cra = (np.array(values) for values in zip(*column.curve, strict=True))
        label = f"{figure_text(entry.reported.run.name)}, step {summary.step}"
        axes.plot(eps, 100 * cra, linewidth=plot_style.LINE_WIDTH, label=label, **style)
        if summary.attack:
            plot_style.draw_attack(axes, column, summary.attack, limit, color=style["color"])
            attacked = True
    for ratio in group.eps:
        at = eps_value(ratio)
        axes.axvline(at, color=plot_style.MARK, linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            ratio, (at, 101), ha="center", va="bottom", fontsize=plot_style.SMALL,
            color=plot_style.LINE,
        )  # fmt: skip
    if attacked:
        grey: dict[str, Any] = {"color": plot_style.LINE}
        axes.plot(
            [], [], "v", markersize=plot_style.MARK_SIZE, label="under attack: upper bound", **grey
        )
        axes.fill_between(
            [], [], [], alpha=plot_style.UNKNOWN_ALPHA, linewidth=0, label="not known", **grey
        )
    what = "robust accuracy, sound (%)"
    plot_style.accuracy_axes(axes, group.norm, limit, top=106.0, what=what)
    plot_style.finish(figure)
    return plot_style.svg(figure)


def cost_svg(group: ComparisonGroup, places: Sequence[int]) -> bytes:
    """Draw `cra_sound` of every checkpoint over the device time that training took until then.

    Args:
        group: the runs.
        places: see `curves_svg`.
    """
    ratios = [r for r in group.eps if group.best(r) > 0][:_PANELS] or list(group.eps[:1])
    times = [t for entry in group.entries for t in _path(entry, ratios[0])[:, 0]]
    scale, unit = time_unit(max(times, default=1.0))
    figure = plot_style.new_figure(9, 3.4)
    panels = figure.subplots(1, len(ratios), squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        for place, entry in zip(places, group.entries, strict=True):
            path = _path(entry, ratio)
            axes.plot(
                path[:, 0] / scale, 100 * path[:, 1], marker="o", markersize=4, linewidth=1.6,
                label=figure_text(entry.reported.run.name), **plot_style.run_style(place),
            )  # fmt: skip
        axes.set_title(f"eps {ratio}", fontsize=plot_style.NORMAL)
        axes.set_xlim(left=0.0)
        axes.set_xlabel(f"device time ({unit})")
    panels[0].set_ylabel(f"cra_sound, {group.norm} (%)")
    plot_style.finish(figure)
    return plot_style.svg(figure)


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the seconds of the unit in which a duration reads well, and its name."""
    if seconds < 300:
        return 1.0, "s"
    return (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _path(entry: ReportEntry, ratio: str) -> np.ndarray:
    """Device seconds and `cra_sound` of the checkpoints whose time is known, shape (n, 2)."""
    found = [
        (seconds, e.summary.columns["sound"].cra.get(ratio, np.nan))
        for e in entry.by_step
        if (seconds := entry.reported.cost.up_to(e.summary.step)) is not None
    ]
    return np.array(found, dtype=float).reshape(-1, 2)
