"""The figure of an evaluation: certified robust accuracy over eps."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jobs.config import eps_value
from jobs.records import EvaluationSummary


def cra_png(summary: EvaluationSummary) -> bytes:
    """Draw the CRA curve with marks at the table's radii.

    Uses no pyplot state, so that threads may draw at the same time.

    Returns:
        PNG bytes, 1120 x 700 pixels.
    """
    figure = Figure(figsize=(8, 5), dpi=140, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    eps, cra = zip(*summary.curve, strict=True)
    axes.plot(eps, [100 * value for value in cra], color="tab:blue", linewidth=1.8)
    marks = {"0": summary.clean, **summary.cra}
    for ratio, value in marks.items():
        at = 0.0 if ratio == "0" else eps_value(ratio)
        axes.plot(at, 100 * value, "o", color="tab:blue", markersize=5)
        name = "clean" if ratio == "0" else ratio
        axes.annotate(
            f"{name}\n{100 * value:.1f} %",
            (at, 100 * value),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=9,
        )
    limit = max(eps[-1], *(eps_value(ratio) for ratio in summary.cra))
    axes.set_xlim(0.0, limit)
    axes.set_ylim(0.0, 112.0)  # room for the labels of marks near 100 %
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel(f"eps ({summary.norm}, pixels in [0, 1])")
    axes.set_ylabel("certified robust accuracy (%)")
    axes.set_title(
        f"{summary.column}: {summary.samples} samples of {summary.split}, step {summary.step}, "
        f"artefact {summary.artifact_digest[:12]}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
