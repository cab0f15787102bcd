"""A picture of test images with what is proved of each, the closest to another class first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_shards.format.shard_index import ShardIndex
from data_shards.streaming.sample_reader import decode, fetch
from data_shards.untrusted.text import figure_text
from jobs.evaluation.sample_records import ColumnRecords
from jobs.figures import plot_style
from jobs.figures.plot_style import ATTACK, PROOF, SMALL
from model.artifact.artifact import class_name

SHOWN = 16
"""Images of a strip."""
_COLUMNS = 8
_LONGEST_NAME = 14


class StripImage(NamedTuple):
    """One image of a strip."""

    pixels: Tensor
    """uint8 (C, H, W)."""
    label: str
    prediction: str
    radius: float
    """Certified radius of the prediction, column sound."""


def closest_images(
    index: ShardIndex,
    split: str,
    sound: ColumnRecords,
    label: np.ndarray,
    class_names: Sequence[str],
) -> list[StripImage]:
    """The samples with the smallest sound radii, read from their shards.

    Args:
        index: the shard set.
        split: of the samples.
        sound: what is proved of all samples of the split, in index order.
        label: their classes.
        class_names: by class; empty: their numbers are shown.

    Raises:
        ShardError: an image cannot be read.
    """
    chosen = np.argsort(sound.radius, kind="stable")[:SHOWN]
    rows = index.select(split)[chosen].tolist()
    encoded = fetch(index, rows)
    return [
        StripImage(
            decode(index, row, encoded[row]),
            class_name(class_names, int(label[at])),
            class_name(class_names, int(sound.prediction[at])),
            float(sound.radius[at]),
        )
        for at, row in zip(chosen.tolist(), rows, strict=True)
    ]


def strip_png(images: Sequence[StripImage], *, norm: str, title: str) -> bytes:
    """Draw some images with their label, prediction and certified radius.

    Args:
        images: at least one.
        norm: norm of the radii.
        title: what they are of.

    Returns:
        PNG bytes, 1120 pixels wide.
    """
    rows = -(-len(images) // _COLUMNS)
    figure = plot_style.new_figure(8, 0.75 + 1.5 * rows)
    for place, image in enumerate(images):
        axes = figure.add_subplot(rows, _COLUMNS, place + 1)
        axes.imshow(_drawn(image.pixels), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        right = image.label == image.prediction
        color = PROOF if right else ATTACK
        for side in axes.spines.values():
            side.set_color(color)
            side.set_linewidth(1.5)
        said = "right" if right else f"as {_short(image.prediction)}"
        axes.set_title(f"{_short(image.label)}\n{said}", fontsize=SMALL - 1, color=color)
        axes.set_xlabel(f"radius {image.radius:.3g}", fontsize=SMALL - 1)
    figure.suptitle(
        f"{figure_text(title)}: the smallest certified radii ({norm}, pixels in [0, 1]) first\n"
        "above each image its label, then what the network takes it for",
        fontsize=SMALL,
    )
    return plot_style.png(figure)


def _drawn(pixels: Tensor) -> np.ndarray:
    """(H, W) of a grey image, (H, W, 3) of a colour image."""
    channels = pixels.permute(1, 2, 0).to(torch.uint8).numpy()
    return channels[:, :, 0] if channels.shape[2] == 1 else channels


def _short(name: str) -> str:
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return figure_text(name)
