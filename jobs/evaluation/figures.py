"""The pictures of a finished evaluation; drawing them takes longer than certifying a small set."""

from __future__ import annotations

from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from jobs.evaluation.image_strip import closest_images, strip_png
from jobs.evaluation.stored_result import read_result
from jobs.figures.plots import bounds_png, cra_png, radius_histogram_png
from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.run.layout import BOUNDS_FIGURE, CLOSEST_FIGURE, CRA_FIGURE, RADIUS_FIGURE

PICTURES = (CRA_FIGURE, RADIUS_FIGURE, BOUNDS_FIGURE, CLOSEST_FIGURE)


def draw_missing(out: Store, summary: EvaluationSummary) -> None:
    """Draw those pictures of an evaluation that do not lie beside its result yet.

    Args:
        out: where the result lies.
        summary: its summary, with the shard set's URL of today.

    Raises:
        EvaluationError: there is no finished evaluation.
        ShardError: an image cannot be read.
    """
    missing = set(PICTURES) - set(out.ls())
    if not summary.layers:
        missing.discard(BOUNDS_FIGURE)
    if not missing:
        return
    result = read_result(out)
    if CRA_FIGURE in missing:
        out.write(CRA_FIGURE, cra_png(summary))
    if RADIUS_FIGURE in missing:
        correct = result.sound.prediction == result.label
        histogram = radius_histogram_png(summary, radius=result.sound.radius, correct=correct)
        out.write(RADIUS_FIGURE, histogram)
    if BOUNDS_FIGURE in missing:
        out.write(BOUNDS_FIGURE, bounds_png(summary))
    if CLOSEST_FIGURE in missing:
        index = load_index(summary.shards_url)
        images = closest_images(
            index, summary.split, result.sound, result.label, summary.class_names
        )
        title = f"{summary.dataset}, step {summary.step}"
        out.write(CLOSEST_FIGURE, strip_png(images, norm=summary.norm, title=title))


def remove_pictures(out: Store) -> None:
    """Remove those of an earlier result, before another one lies there."""
    for name in set(PICTURES) & set(out.ls()):
        out.remove(name)
