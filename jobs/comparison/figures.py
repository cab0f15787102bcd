"""The figure of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from data_shards.untrusted.text import figure_text
from jobs.comparison.table import System
from jobs.figures import plot_style


def comparison_png(group: Sequence[System]) -> bytes:
    """Draw the mean CRA curve of every system of one norm, and beside it what training took.

    Returns:
        PNG bytes, 1680 x 770 pixels.
    """
    figure = plot_style.new_figure(12, 5.5)
    curves, cost = figure.subplots(1, 2, width_ratios=(2.2, 1))
    styles = [plot_style.run_style(place) for place in range(len(group))]
    sound = [[run.summary.columns["sound"].curve for run in system.finals] for system in group]
    for system, style, grids in zip(group, styles, sound, strict=True):
        eps = np.array([at for at, _ in grids[0]])
        values = 100 * np.array([[value for _, value in grid] for grid in grids])
        curves.plot(eps, values.mean(0), linewidth=1.6, label=system.preset, **style)
        spread = values.min(0), values.max(0)
        curves.fill_between(eps, *spread, color=style["color"], alpha=0.15, linewidth=0)
    first = group[0].finals[0].summary
    limit = plot_style.largest_eps(group[0].eps, [grid for grids in sound for grid in grids])
    what = "certified robust accuracy, column sound (%)"
    plot_style.accuracy_axes(curves, first.norm, limit, top=101.0, what=what)
    places = np.arange(len(group))
    seconds = [statistics.fmean(run.seconds for run in system.finals) for system in group]
    cost.barh(places, seconds, color=[style["color"] for style in styles], alpha=0.5)
    for place, system in zip(places, group, strict=True):
        run = system.finals[0]
        text = f" {run.parameters / 1e3:,.0f} k parameters, {run.steps:,} steps"
        cost.annotate(text, (0, place), va="center", fontsize=plot_style.SMALL)
    cost.set_yticks(places, [system.preset for system in group], fontsize=plot_style.SMALL)
    cost.invert_yaxis()
    cost.set_xlabel("processor seconds of training (mean)")
    plot_style.finish(figure, f"{first.samples} samples of {figure_text(first.dataset)}")
    return plot_style.png(figure)
