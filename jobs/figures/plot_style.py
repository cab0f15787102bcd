"""How every figure looks: colours, sizes, axes, and the bytes of a file.

Nothing uses pyplot state, so that threads may draw at the same time.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from model.certification.eps import eps_value
from pipeline.run.evaluation_summary import AttackScores, ColumnScores

COLORS = (
    "#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b",
    "#e377c2", "#17becf", "#bcbd22", "#7f7f7f", "#d62728",
)  # fmt: skip
"""Of runs and systems, one after another."""
PROOF, OBSERVED, DEPLOYED, ATTACK = COLORS[0], COLORS[1], COLORS[2], COLORS[9]
LINE, MARK, RULE = "0.4", "0.6", "0.85"
"""Greys: a line without a colour of its own, a radius, what only guides the eye."""
SMALL, NORMAL = 8, 10
"""Sizes of words in a figure and of its title, in points."""
LINE_WIDTH, MARK_SIZE = 2.0, 5.0
UNKNOWN_ALPHA = 0.12
"""Of the band between proof and attack."""
_LINES = ("-", "--", "-.", ":")


def run_style(place: int) -> dict[str, Any]:
    """Colour and line of the run at a place of a report.

    Lines tell runs apart beyond the number of colours, and without colours.
    """
    return {"color": COLORS[place % len(COLORS)], "linestyle": _LINES[place % len(_LINES)]}


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches, of 140 pixels each in a PNG."""
    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def accuracy_axes(axes: Axes, norm: str, limit: float, *, top: float, what: str) -> None:
    """Shares of samples in per cent over eps; `top` leaves room for words above 100."""
    axes.set_xlim(0.0, limit)
    axes.set_ylim(0.0, top)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel(f"eps ({norm}, pixels in [0, 1])")
    axes.set_ylabel(what)


def largest_eps(ratios: Iterable[str], curves: Iterable[Sequence[tuple[float, float]]]) -> float:
    """Where an axis ends: past the radii, and where every curve over eps has reached 0."""
    alive = [eps for curve in curves for eps, share in curve if share > 0]
    return 1.05 * max([*(eps_value(ratio) for ratio in ratios), *alive])


def attack_steps(sound: ColumnScores, attack: AttackScores) -> tuple[np.ndarray, np.ndarray]:
    """Radii from 0 on, and the accuracy under attack there in per cent.

    What broke at some eps is broken at every larger one: the accuracy is a step function.
    """
    known = {0.0: sound.clean, **{eps_value(r): v for r, v in attack.accuracy.items()}}
    at = np.array(sorted(known))
    return at, 100 * np.array([known[eps] for eps in at.tolist()])


def draw_attack(
    axes: Axes,
    sound: ColumnScores,
    attack: AttackScores,
    limit: float,
    *,
    color: str,
    labels: tuple[str, str] = ("", ""),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy under attack, and the band down to the proof, in which the true one lies.

    Args:
        axes: from `accuracy_axes`.
        sound: the column of what is proved.
        attack: what the attack left.
        limit: largest eps of the axis.
        color: of all of it.
        labels: of the attack and of the band in the legend; empty ones are left out.

    Returns:
        A fine grid of eps, lower and upper edge of the band in per cent.
    """
    at, accuracy = attack_steps(sound, attack)
    axes.step([*at, limit], [*accuracy, accuracy[-1]], where="post", linewidth=1.2, color=color)
    axes.plot(
        at[1:], accuracy[1:], "v", markersize=MARK_SIZE, clip_on=False, color=color,
        label=labels[0],
    )  # fmt: skip
    curve, proved = (np.array(column) for column in zip(*sound.curve, strict=True))
    # A fine grid that holds the steps, with the upper bound valid from each eps on.
    grid = np.union1d(np.linspace(0.0, limit, 2001), at)
    above = accuracy[np.searchsorted(at, grid, side="right") - 1]
    below = 100 * np.interp(grid, curve, proved, right=0.0)
    axes.fill_between(
        grid, below, above, where=list(above >= below), color=color, alpha=UNKNOWN_ALPHA,
        linewidth=0, label=labels[1],
    )  # fmt: skip
    return grid, below, above


def finish(figure: Figure, title: str = "") -> None:
    """Title, grid and frame of every panel; one legend below, of the first panel's lines."""
    panels = figure.axes
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        panels[0].set_title(title, fontsize=NORMAL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize=SMALL,
        frameon=False,
    )  # fmt: skip


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, the same bytes every day."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
