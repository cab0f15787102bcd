"""The figures of an evaluation: accuracy over eps, certified radii, bounds of the matrices.

Nothing uses pyplot state, so that threads may draw at the same time.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.lib.stride_tricks import sliding_window_view

from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import AttackScores, ColumnScores, EvaluationSummary

_STYLE: Mapping[str, dict[str, Any]] = {
    "nominal": {"color": "0.45", "linestyle": "--", "linewidth": 1.5, "zorder": 4},
    "sound": {"color": "tab:blue", "linestyle": "-", "linewidth": 2.0, "zorder": 3},
    "deployed": {"color": "tab:green", "linestyle": ":", "linewidth": 2.4, "zorder": 5},
}
_BLUE, _RED = "tab:blue", "tab:red"
_EXACT = 1e-17
"""Where a gap of 0 is drawn on a logarithmic axis."""
_NAMED_ROWS = 200
_LOW = 0.15
"""Below this share there is no room for words under a curve."""


def cra_png(summary: EvaluationSummary) -> bytes:
    """Draw certified robust accuracy over eps, and the accuracy under attack above it.

    What broke at some eps is broken at every larger one, so the attack is a step function. The
    true robust accuracy lies in the shaded band between it and `cra_sound`.

    Returns:
        PNG bytes, 1120 x 700 pixels.
    """
    figure = Figure(figsize=(8, 5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    sound = summary.columns["sound"]
    limit = _largest_eps(summary)
    for name, column in summary.columns.items():
        label = f"cra_{name} ({column.program})"
        if column.vacuous:
            axes.plot([], [], label=f"{label}: vacuous", **_STYLE[name])
        else:
            eps, values = zip(*column.curve, strict=True)
            axes.plot(eps, 100 * np.asarray(values), label=label, **_STYLE[name])
    if summary.attack:
        _draw_attack(axes, sound, summary.attack, limit)
    _draw_marks(axes, {"clean": sound.clean, **sound.cra}, limit)
    axes.set_xlim(0.0, limit)
    axes.set_ylim(0.0, 110.0)  # room for the label of the clean accuracy
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel(f"eps ({summary.norm}, pixels in [0, 1])")
    axes.set_ylabel("share of samples (%)")
    _finish(axes, f"robust accuracy, {_samples(summary)}")
    return _png(figure)


def radius_histogram_png(
    summary: EvaluationSummary, *, radius: np.ndarray, correct: np.ndarray
) -> bytes:
    """Draw how many samples have which sound certified radius; wrong predictions are set apart.

    Args:
        summary: names the evaluation and the radii of its table.
        radius: certified radius of every sample's prediction; may be infinite.
        correct: whether the prediction is the label.

    Returns:
        PNG bytes, 1120 x 700 pixels.
    """
    figure = Figure(figsize=(8, 5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    finite = np.isfinite(radius)
    marks = {ratio: eps_value(ratio) for ratio in summary.columns["sound"].cra}
    limit = 1.05 * max(marks.values(), default=0.0)
    if finite.any():
        limit = max(limit, 1.02 * float(radius[finite].max()))
    bins = np.linspace(0.0, limit, 61)
    parts = [radius[correct & finite], radius[~correct & finite]]
    labels = [f"correct prediction: {correct.sum()}", f"wrong prediction: {(~correct).sum()}"]
    axes.hist(parts, bins=list(bins), stacked=True, color=[_BLUE, _RED], label=labels)
    top = axes.get_ylim()[1] * 1.12  # room for the names of the radii
    for ratio, eps in marks.items():
        axes.axvline(eps, color="0.25", linewidth=1.0, linestyle="--")
        axes.annotate(
            ratio,
            (eps, top),
            xytext=(-3, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            fontsize=8,
        )
    for count, what in ((np.sum(radius == 0), "radius 0"), (np.sum(~finite), "infinite radius")):
        if count:
            axes.plot([], [], " ", label=f"{what}: {count}")
    axes.set_xlim(0.0, limit)
    axes.set_ylim(0.0, top)
    axes.set_xlabel(f"certified radius, column sound ({summary.norm}, pixels in [0, 1])")
    axes.set_ylabel("number of samples")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, f"certified radii, {_samples(summary)}")
    return _png(figure)


def bounds_png(summary: EvaluationSummary) -> bytes:
    """Draw how far above 1 the norm of each matrix may lie, and how far that is from observation.

    Returns:
        PNG bytes, 1120 pixels wide; the height grows with the number of matrices.
    """
    rows = len(summary.layers)
    height = 1.9 + 0.17 * min(rows, _NAMED_ROWS)
    figure = Figure(figsize=(8, height), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(rows)
    upper = np.array([layer.upper for layer in summary.layers])
    lower = np.array([layer.lower for layer in summary.layers])
    excess, gap = np.abs(upper - 1).clip(_EXACT), (upper - lower).clip(_EXACT)
    above = upper >= 1
    axes.hlines(places, np.minimum(excess, gap), np.maximum(excess, gap), color="0.85", zorder=1)
    axes.scatter(
        excess[above], places[above], s=26, color=_BLUE, label="proved bound - 1", zorder=3
    )
    if not above.all():
        axes.scatter(
            excess[~above], places[~above], s=26, facecolor="white", edgecolor=_BLUE,
            label="1 - proved bound", zorder=3,
        )  # fmt: skip
    axes.scatter(
        gap, places, s=30, marker="|", color="tab:orange", linewidth=2.0, zorder=4,
        label="proved bound - observed lower bound",
    )  # fmt: skip
    every = max(1, math.ceil(rows / _NAMED_ROWS))
    axes.set_yticks(places[::every], [layer.name for layer in summary.layers][::every], fontsize=7)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("difference (logarithmic axis)")
    shown = np.log10([excess.min(), gap.min(), excess.max(), gap.max()])
    axes.set_xlim(10 ** np.floor(shown.min() - 0.1), 10 ** np.ceil(shown.max() + 0.1))
    proved, observed = map(_around_one, (summary.network_bound, summary.observed_lipschitz))
    _finish(
        axes,
        f"spectral norms of the matrices, {_artifact(summary)}\n"
        f"Lipschitz constant of the network: proved <= {proved}, observed >= {observed}",
    )
    return _png(figure)


def _largest_eps(summary: EvaluationSummary) -> float:
    """Where the axis ends: past the table's radii, and where every curve has reached 0."""
    columns = [column for column in summary.columns.values() if not column.vacuous]
    alive = [eps for column in columns for eps, value in column.curve if value > 0]
    return 1.05 * max([eps_value(ratio) for ratio in summary.columns["sound"].cra] + alive)


def _draw_marks(axes: Axes, marks: Mapping[str, float], limit: float) -> None:
    """Marks on the curve of the sound column, the first one at eps 0."""
    places = [0.0, *(eps_value(ratio) for ratio in list(marks)[1:])]
    named = _with_room(places, limit)
    for at, (name, value) in zip(places, marks.items(), strict=True):
        axes.plot(at, 100 * value, "o", color=_BLUE, markersize=5, clip_on=False, zorder=6)
        if at in named:
            side, above = ("left", True) if at == 0 else ("right", value < _LOW)
            text = f"{name}\n{100 * value:.1f} %"
            _label(axes, text, (at, 100 * value), color=_BLUE, side=side, above=above)


def _with_room(places: Sequence[float], limit: float) -> set[float]:
    """The places that can be named: those too close to the one before stay without a label."""
    named = [0.0]
    for at in sorted(places):
        if at - named[-1] > 0.08 * limit:
            named.append(at)
    return set(named)


def _label(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    *,
    color: str,
    side: str,
    above: bool,
    up: int = 5,
) -> None:
    axes.annotate(
        text,
        at,
        xytext=(6 if side == "left" else -5, up if above else -6),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        fontsize=8,
        color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        zorder=7,
    )


def _draw_attack(axes: Axes, sound: ColumnScores, attack: AttackScores, limit: float) -> None:
    known = {eps_value(ratio): value for ratio, value in attack.accuracy.items()}
    at = np.array([0.0, *sorted(known)])
    accuracy = 100 * np.array([sound.clean, *(known[eps] for eps in sorted(known))])
    label = f"under attack ({attack.suite})"
    axes.step([*at, limit], [*accuracy, accuracy[-1]], where="post", color=_RED, linewidth=1.2)
    axes.plot(at[1:], accuracy[1:], "v", color=_RED, markersize=5, label=label, clip_on=False)
    named = _with_room(at.tolist(), limit)
    for ratio, value in attack.accuracy.items():
        eps, proved = eps_value(ratio), sound.cra[ratio]
        if eps in named:
            # Low marks of the sound column have their names above them.
            up = 32 if proved < _LOW and value < proved + 0.15 else 5
            side = "right" if eps > 0.9 * limit else "left"
            text, place = f"{100 * value:.1f} %", (eps, 100 * value)
            _label(axes, text, place, color=_RED, side=side, above=True, up=up)
    _shade(axes, sound, (at, accuracy), limit)


def _shade(
    axes: Axes, sound: ColumnScores, attack: tuple[np.ndarray, np.ndarray], limit: float
) -> None:
    """The band between proof and attack, both in per cent of the samples."""
    at, accuracy = attack
    curve, proved = (np.array(column) for column in zip(*sound.curve, strict=True))
    # A fine grid that holds the steps, with the upper bound valid from each eps on.
    grid = np.union1d(np.linspace(0.0, limit, 2001), at)
    above = accuracy[np.searchsorted(at, grid, side="right") - 1]
    below = np.interp(grid, curve, 100 * proved)
    axes.fill_between(
        grid, below, above, where=above >= below, color=_RED, alpha=0.12, linewidth=0,
        label="not known",
    )  # fmt: skip
    # The words go where the band is high over their whole width, about a sixth of the axis.
    lowest = sliding_window_view(above, 331).min(1) - sliding_window_view(below, 331).max(1)
    # Well before the highest place, which lies beside the last number of the attack.
    first = int(np.argmax(lowest >= 0.8 * lowest.max()))
    if lowest[first] > 8:
        middle = first + 165
        height = (above[middle] + below[middle]) / 2
        axes.text(
            grid[middle], height, "not known", color=_RED, fontsize=9, ha="center", va="center"
        )


def _around_one(value: float) -> str:
    """A number near 1 by its distance from 1."""
    return f"1 {'+' if value >= 1 else '-'} {abs(value - 1):.2e}"


def _samples(summary: EvaluationSummary) -> str:
    return f"{summary.samples} samples of {summary.split}, {_artifact(summary)}"


def _artifact(summary: EvaluationSummary) -> str:
    return f"step {summary.step}, artifact {summary.artifact_digest[:12]}"


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
