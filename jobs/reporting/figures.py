"""The figures of a report as SVG: robust accuracy over eps, and over the cost of training."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from jobs.reporting.report_data import ComparisonGroup, ReportEntry
from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import EvaluationSummary

COLORS = (
    "#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b",
    "#e377c2", "#17becf", "#bcbd22", "#7f7f7f", "#d62728",
)  # fmt: skip
_STYLES = ("-", "--", "-.", ":")
"""Line styles tell runs apart beyond the number of colours, and without colours."""
_PANELS = 3


def color_of(place: int) -> str:
    """Colour of the run at a place of the report."""
    return COLORS[place % len(COLORS)]


def curves_svg(group: ComparisonGroup, places: Sequence[int]) -> bytes:
    """Draw `cra_sound` of every run over eps, and the band up to its accuracy under attack.

    The true robust accuracy lies in the band. What broke at some eps is broken at every larger
    one, so the band's upper edge is a step function, with a mark where the attack was run.

    Args:
        group: the runs.
        places: place of each run in the report, which decides its colour and line style.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    limit = _largest_eps(group)
    for place, entry in zip(places, group.entries, strict=True):
        summary, color = entry.chosen.summary, color_of(place)
        eps, cra = (
            np.array(values) for values in zip(*summary.columns["sound"].curve, strict=True)
        )
        label = f"{entry.reported.run.name}, step {summary.step}"
        axes.plot(eps, 100 * cra, color=color, linestyle=_style(place), linewidth=2, label=label)
        if summary.attack:
            _draw_band(axes, summary, color, limit)
    for ratio in group.eps:
        axes.axvline(eps_value(ratio), color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            ratio, (eps_value(ratio), 101), ha="center", va="bottom", fontsize=8, color="0.35"
        )
    if any(entry.chosen.summary.attack for entry in group.entries):
        axes.plot([], [], "v", color="0.4", markersize=5, label="under attack: upper bound")
        axes.fill_between([], [], [], color="0.4", alpha=0.15, linewidth=0, label="not known")
    axes.set_xlim(0.0, limit)
    axes.set_ylim(0.0, 106.0)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel(f"eps ({group.norm}, pixels in [0, 1])")
    axes.set_ylabel("robust accuracy, sound (%)")
    _finish(figure, axes)
    return _svg(figure)


def cost_svg(group: ComparisonGroup, places: Sequence[int]) -> bytes:
    """Draw `cra_sound` of every checkpoint over the device time that training took until then.

    Args:
        group: the runs.
        places: see `curves_svg`.
    """
    ratios = [r for r in group.eps if group.best(r) > 0][:_PANELS] or list(group.eps[:1])
    times = [t for entry in group.entries for t in _path(entry, ratios[0])[:, 0]]
    scale, unit = time_unit(max(times, default=1.0))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(ratios), squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        for place, entry in zip(places, group.entries, strict=True):
            path = _path(entry, ratio)
            axes.plot(
                path[:, 0] / scale, 100 * path[:, 1], marker="o", markersize=4, linewidth=1.6,
                color=color_of(place), linestyle=_style(place), label=entry.reported.run.name,
            )  # fmt: skip
        axes.set_title(f"eps {ratio}", fontsize=10)
        axes.set_xlim(left=0.0)
        axes.set_xlabel(f"device time ({unit})")
    panels[0].set_ylabel(f"cra_sound, {group.norm} (%)")
    _finish(figure, *panels)
    return _svg(figure)


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


def _largest_eps(group: ComparisonGroup) -> float:
    """Past all radii of the table, and where every curve has reached 0."""
    curves = [entry.chosen.summary.columns["sound"].curve for entry in group.entries]
    alive = [eps for curve in curves for eps, value in curve if value > 0]
    return 1.03 * max([*(eps_value(ratio) for ratio in group.eps), *alive])


def _draw_band(axes: Axes, summary: EvaluationSummary, color: str, limit: float) -> None:
    sound, attack = summary.columns["sound"], summary.attack
    if attack is None:
        return
    known = {0.0: sound.clean, **{eps_value(r): v for r, v in attack.accuracy.items()}}
    at = np.array(sorted(known))
    broken = np.array([known[eps] for eps in sorted(known)])
    curve, proved = (np.array(values) for values in zip(*sound.curve, strict=True))
    grid = np.union1d(np.linspace(0.0, limit, 801), at)
    above = broken[np.searchsorted(at, grid, side="right") - 1]
    below = np.interp(grid, curve, proved, right=0.0)
    axes.fill_between(grid, 100 * below, 100 * above, color=color, alpha=0.07, linewidth=0)
    edge = {"color": color, "linewidth": 0.9, "alpha": 0.7}
    axes.step([*at, limit], 100 * broken[[*range(at.size), -1]], where="post", **edge)
    axes.plot(at[1:], 100 * broken[1:], "v", color=color, markersize=5, clip_on=False)


def _style(place: int) -> str:
    return _STYLES[place % len(_STYLES)]


def _finish(figure: Figure, *panels: Axes) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize=9,
        frameon=False,
    )  # fmt: skip


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
