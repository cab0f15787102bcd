"""The figures of an evaluation: accuracy over eps, certified radii, bounds of the matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.lib.stride_tricks import sliding_window_view

from jobs.figures import plot_style
from jobs.figures.plot_style import ATTACK, DEPLOYED, LINE, LINE_WIDTH, MARK_SIZE, PROOF, SMALL
from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import AttackScores, ColumnScores, EvaluationSummary

_COLUMNS: Mapping[str, dict[str, Any]] = {
    "nominal": {"color": LINE, "linestyle": "--", "linewidth": 1.5, "zorder": 4},
    "sound": {"color": PROOF, "linestyle": "-", "linewidth": LINE_WIDTH, "zorder": 3},
    "deployed": {"color": DEPLOYED, "linestyle": ":", "linewidth": 2.4, "zorder": 5},
}
_EXACT = 1e-17
"""Where a gap of 0 is drawn on a logarithmic axis."""
_NAMED_ROWS = 200
_LOW = 0.15
"""Below this share there is no room for words under a curve."""


def cra_png(summary: EvaluationSummary) -> bytes:
    """Draw certified robust accuracy over eps, and the accuracy under attack above it.

    The true robust accuracy lies in the shaded band between it and `cra_sound`.

    Returns:
        PNG bytes, 1120 x 700 pixels.
    """
    figure = plot_style.new_figure(8, 5)
    axes = figure.add_subplot()
    sound = summary.columns["sound"]
    curves = [column.curve for column in summary.columns.values() if not column.vacuous]
    limit = plot_style.largest_eps(sound.cra, curves)
    for name, column in summary.columns.items():
        label = f"cra_{name} ({column.program})"
        if column.vacuous:
            axes.plot([], [], label=f"{label}: vacuous", **_COLUMNS[name])
        else:
            eps, values = zip(*column.curve, strict=True)
            axes.plot(eps, 100 * np.asarray(values), label=label, **_COLUMNS[name])
    if summary.attack:
        _draw_attack(axes, sound, summary.attack, limit)
    _draw_marks(axes, {"clean": sound.clean, **sound.cra}, limit)
    # Room for the label of the clean accuracy.
    plot_style.accuracy_axes(axes, summary.norm, limit, top=110.0, what="share of samples (%)")
    plot_style.finish(figure, f"robust accuracy, {_samples(summary)}")
    return plot_style.png(figure)


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
    figure = plot_style.new_figure(8, 5)
    axes = figure.add_subplot()
    finite = np.isfinite(radius)
    marks = {ratio: eps_value(ratio) for ratio in summary.columns["sound"].cra}
    limit = 1.05 * max(marks.values(), default=0.0)
    if finite.any():
        limit = max(limit, 1.02 * float(radius[finite].max()))
    bins = np.linspace(0.0, limit, 61)
    parts = [radius[correct & finite], radius[~correct & finite]]
    labels = [f"correct prediction: {correct.sum()}", f"wrong prediction: {(~correct).sum()}"]
    axes.hist(parts, bins=list(bins), stacked=True, color=[PROOF, ATTACK], label=labels)
    top = axes.get_ylim()[1] * 1.12  # room for the names of the radii
    for ratio, eps in marks.items():
        axes.axvline(eps, color=LINE, linewidth=1.0, linestyle="--")
        axes.annotate(
            ratio,
            (eps, top),
            xytext=(-3, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            fontsize=SMALL,
        )
    for count, what in ((np.sum(radius == 0), "radius 0"), (np.sum(~finite), "infinite radius")):
        if count:
            axes.plot([], [], " ", label=f"{what}: {count}")
    axes.set_xlim(0.0, limit)
    axes.set_ylim(0.0, top)
    axes.set_xlabel(f"certified radius, column sound ({summary.norm}, pixels in [0, 1])")
    axes.set_ylabel("number of samples")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    plot_style.finish(figure, f"certified radii, {_samples(summary)}")
    return plot_style.png(figure)


def bounds_png(summary: EvaluationSummary) -> bytes:
    """Draw how far above 1 the norm of each matrix may lie, and how far that is from observation.

    Returns:
        PNG bytes, 1120 pixels wide; the height grows with the number of matrices.
    """
    rows = len(summary.layers)
    height = 2.1 + 0.17 * min(rows, _NAMED_ROWS)
    figure = plot_style.new_figure(8, height)
    axes = figure.add_subplot()
    places = np.arange(rows)
    upper = np.array([layer.upper for layer in summary.layers])
    lower = np.array([layer.lower for layer in summary.layers])
    excess, gap = np.abs(upper - 1).clip(_EXACT), (upper - lower).clip(_EXACT)
    above = upper >= 1
    axes.hlines(
        places, np.minimum(excess, gap), np.maximum(excess, gap), color=plot_style.RULE, zorder=1
    )
    axes.scatter(
        excess[above], places[above], s=26, color=PROOF, label="proved bound - 1", zorder=3
    )
    if not above.all():
        axes.scatter(
            excess[~above], places[~above], s=26, facecolor="white", edgecolor=PROOF,
            label="1 - proved bound", zorder=3,
        )  # fmt: skip
    axes.scatter(
        gap, places, s=30, marker="|", color=plot_style.OBSERVED, linewidth=2.0, zorder=4,
        label="proved bound - observed lower bound",
    )  # fmt: skip
    every = max(1, math.ceil(rows / _NAMED_ROWS))
    axes.set_yticks(
        places[::every], [layer.name for layer in summary.layers][::every], fontsize=SMALL - 1
    )
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel(
        "distance of the proved norm from 1, and of the proof from what was observed\n"
        "(logarithmic: 1e-7 is one part in ten million; a perfectly orthogonal matrix has norm 1)"
    )
    shown = np.log10([excess.min(), gap.min(), excess.max(), gap.max()])
    axes.set_xlim(10 ** np.floor(shown.min() - 0.1), 10 ** np.ceil(shown.max() + 0.1))
    proved, observed = map(_around_one, (summary.network_bound, summary.observed_lipschitz))
    plot_style.finish(
        figure,
        f"spectral norms of the matrices, {_artifact(summary)}\n"
        f"Lipschitz constant of the network: proved <= {proved}, observed >= {observed}",
    )
    return plot_style.png(figure)


def _draw_marks(axes: Axes, marks: Mapping[str, float], limit: float) -> None:
    """Marks on the curve of the sound column, the first one at eps 0."""
    places = [0.0, *(eps_value(ratio) for ratio in list(marks)[1:])]
    named = _with_room(places, limit)
    for at, (name, value) in zip(places, marks.items(), strict=True):
        axes.plot(at, 100 * value, "o", color=PROOF, markersize=MARK_SIZE, clip_on=False, zorder=6)
        if at in named:
            side, above = ("left", True) if at == 0 else ("right", value < _LOW)
            text = f"{name}\n{100 * value:.1f} %"
            _label(axes, text, (at, 100 * value), color=PROOF, side=side, above=above)


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
        fontsize=SMALL,
        color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        zorder=7,
    )


def _draw_attack(axes: Axes, sound: ColumnScores, attack: AttackScores, limit: float) -> None:
    labels = f"under attack ({attack.suite})", "not known"
    band = plot_style.draw_attack(axes, sound, attack, limit, color=ATTACK, labels=labels)
    at, _ = plot_style.attack_steps(sound, attack)
    named = _with_room(at.tolist(), limit)
    for ratio, value in attack.accuracy.items():
        eps, proved = eps_value(ratio), sound.cra[ratio]
        if eps in named:
            # Low marks of the sound column have their names above them.
            up = 32 if proved < _LOW and value < proved + 0.15 else 5
            side = "right" if eps > 0.9 * limit else "left"
            text, place = f"{100 * value:.1f} %", (eps, 100 * value)
            _label(axes, text, place, color=ATTACK, side=side, above=True, up=up)
    _name_band(axes, *band)


def _name_band(axes: Axes, grid: np.ndarray, below: np.ndarray, above: np.ndarray) -> None:
    """Words where the band is high over their whole width, about a sixth of the axis."""
    lowest = sliding_window_view(above, 331).min(1) - sliding_window_view(below, 331).max(1)
    # Well before the highest place, which lies beside the last number of the attack.
    first = int(np.argmax(lowest >= 0.8 * lowest.max()))
    if lowest[first] > 8:
        middle = first + 165
        height = (above[middle] + below[middle]) / 2
        axes.text(
            grid[middle], height, "not known", color=ATTACK, fontsize=SMALL, ha="center",
            va="center",
        )  # fmt: skip


def _around_one(value: float) -> str:
    """A number near 1 by its distance from 1."""
    return f"1 {'+' if value >= 1 else '-'} {abs(value - 1):.2e}"


def _samples(summary: EvaluationSummary) -> str:
    return f"{summary.samples} samples of {summary.split}, {_artifact(summary)}"


def _artifact(summary: EvaluationSummary) -> str:
    return f"step {summary.step}, artifact {summary.artifact_digest[:12]}"
