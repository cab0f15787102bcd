"""Steps of a preset on random images: `python -m benchmarks.train PRESET STEPS [--flag value]`.

In this process, without Ray, an index, MLflow or a checkpoint: nothing of them has to be installed.
Other flags are those of `pipeline.pretrain`.
"""

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.report import Row, write_result
from data_shards.format.tar import add_end, add_member
from pipeline import pretrain
from pipeline.presets.registry import run_preset
from pipeline.run import layout
from pipeline.tracking.spool import read_rows

IMAGES = 1024
_EPOCH = 50_000
"""Samples that count as an epoch; the images repeat."""
_RECORDS = 5
_FIRST = 1
"""Records left out of the medians: first steps compile kernels."""


def write_images(file: Path, shape: tuple[int, int, int], classes: int, count: int) -> None:
    """A tar of random images, which are smooth, so that a large one compresses like a photograph.

    Args:
        file: of the tar.
        shape: (C, H, W) of an image.
        classes: image i has label i mod classes.
        count: how many.
    """
    channels, height, width = shape
    generator = np.random.default_rng(0)
    kind = "jpg" if channels == 3 else "png"
    tar = io.BytesIO()
    for number in range(count):
        coarse = generator.integers(0, 256, (-(-height // 4), -(-width // 4), channels), np.uint8)
        picture = Image.fromarray(coarse.squeeze(2) if channels == 1 else coarse)
        body = io.BytesIO()
        picture.resize((width, height)).save(body, "JPEG" if kind == "jpg" else "PNG")
        add_member(tar, f"{number:06}.{kind}", body.getvalue())
        add_member(tar, f"{number:06}.cls", str(number % classes).encode())
    add_end(tar)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(tar.getvalue())


def figures(spool: Path) -> Row:
    """Medians over the records of a run, and its last loss."""
    rows = [row for row in read_rows(spool, "metrics") if "train/loss" in row["values"]]
    settled = [row["values"] for row in rows[_FIRST:] or rows]
    found: Row = {"step": rows[-1]["step"], "loss": rows[-1]["values"]["train/loss"]}
    for column, name in (
        ("images/s", "train/images_per_s"),
        ("TFLOP/s per device", "perf/tflops_per_device"),
        ("MFU", "perf/mfu"),
        ("waited for data, s", "data/wait_s"),
    ):
        values = [row[name] for row in settled if name in row]
        if values:
            found[column] = float(np.median(values))
    return found


def main(arguments: Sequence[str]) -> int:
    """Train and write the figures; the exit code is that of the training."""
    preset, steps, *flags = arguments
    model = run_preset(preset).model
    with tempfile.TemporaryDirectory() as folder:
        write_images(
            Path(folder, "images", "train-00000.tar"), model.input_shape, model.num_classes, IMAGES
        )
        words = [
            preset, "--cluster.launcher", "local", "--data.shards", f"{folder}/images",
            "--data.unindexed-samples", str(_EPOCH), "--checkpoint.none", "--storage", folder,
            "--name", "run", "--train.stop-after", steps,
            "--train.log-every", str(max(1, int(steps) // _RECORDS)), *flags,
        ]  # fmt: skip
        code = pretrain.main(words)
        if code == 0:
            spool = Path(folder, "run", layout.TRACKING, layout.SPOOL)
            row = {"what": " ".join([preset, *flags]), **figures(spool)}
            write_result(f"train_{preset}", [row], ["Random images; medians after the first."])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
