"""The samples: forward passes, and what every column says of them (section 8.5)."""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from model.verifier.certificate import COLUMNS, radii_of_table
from model.verifier.errors import (
    DisagreementError,
    Near,
    UnusableError,
    Within,
    agree,
    differ,
    shown,
    take,
)
from model.verifier.families.base import Family
from model.verifier.files import Body, Table
from model.verifier.mathematics.radii import Judged, image_norms, judge, nominal
from model.verifier.mathematics.rounding import PROGRAMS, Floats
from model.verifier.progress import Progress
from model.verifier.shards import Images, load_images

SAME_SAMPLE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.5}
"""How far another program's logits may be from the verifier's, or as far as its rounding allows.

Radii of `sound` and `deployed` may be smaller by as much, and never larger than what is proved."""
LARGEST_DIFFERENCE = 0.5
SAME_ERROR = 1e-3
"""`largest_error` is stated to be read; radii are proved with the verifier's own errors."""
FLOATS_AT_ONCE = 1 << 22  # activations of one batch
ERRORS = ("largest_error", "largest_error_ball")

Largest = dict[str, tuple[float, float, float]]
"""Largest E_x and the limits of the largest E_ball, by column."""
Unknown = dict[str, int]
"""Samples, by column, of whose program's rounding nothing is known."""


def check_samples(
    network: Family, images: Images, samples: Table, chosen: npt.NDArray[np.int64], body: Body
) -> tuple[Largest, Unknown]:
    """Evaluate the chosen samples and compare every column."""
    at_once = max(1, FLOATS_AT_ONCE // network.floats_per_image)
    shape = tuple(network.config["input_shape"])
    largest: Largest = dict.fromkeys(COLUMNS, (0.0, 0.0, 0.0))
    unknown: Unknown = dict.fromkeys(COLUMNS, 0)
    progress = Progress("samples", len(chosen))
    for rows, pixels in load_images(images, samples, chosen, shape, at_once):
        for name, found in check_batch(network, pixels, samples, rows, body).items():
            seen = (found.error, *found.error_ball)
            pairs = zip(largest[name], seen, strict=True)
            largest[name] = tuple(max(old, float(new.max())) for old, new in pairs)  # type: ignore[assignment]
            unknown[name] += int((~found.compared).sum())
        progress.add(len(rows))
    return largest, unknown


def check_batch(
    network: Family,
    pixels: npt.NDArray[np.uint8],
    samples: Table,
    rows: npt.NDArray[np.int64],
    body: Body,
) -> dict[str, Judged]:
    """Compare every column for some images, which are rows of samples.parquet."""
    values, local = network.evaluate(pixels)
    if not np.isfinite(values).all():
        raise UnusableError(f"the float64 logits of samples.parquet row {rows[0]} overflow")
    norms = image_norms(pixels, network.norm)
    judged = {}
    for name in COLUMNS:
        program = PROGRAMS[body["columns"][name]["program"]]
        prediction = _classes(samples, f"{name}_prediction", rows, values.shape[1])
        stated = samples[f"{name}_radius"][rows]
        if name == "nominal":
            judged[name] = nominal(network, values, local, prediction)
        else:
            judged[name] = judge(network, program, values, local, norms, prediction, stated)
        # Bounds of rounding are seldom approached: a sixteenth of one is no disagreement. Where
        # there is no bound, as after an overflow, the program may return anything.
        error = network.margin_error(norms, program)
        relative = error / 16 / np.maximum(1.0, np.abs(values).max(axis=1))
        tolerance = np.fmin(np.fmax(relative, SAME_SAMPLE[program.name]), LARGEST_DIFFERENCE)
        tolerance[np.isinf(error)] = np.inf
        judged[name] = judged[name]._replace(compared=np.isfinite(error))
        widest = 1.0 if network.norm == "linf" else float(np.sqrt(pixels[0].size))
        compare_column(samples, name, rows, values, judged[name], tolerance, widest)
    return judged


def _classes(
    samples: Table, column: str, rows: npt.NDArray[np.int64], classes: int
) -> npt.NDArray[np.int64]:
    """Classes of a column of samples.parquet, which must exist."""
    values = samples[column][rows].astype(np.int64)
    if (wrong := np.flatnonzero((values < 0) | (values >= classes))).size:
        i = int(wrong[0])
        raise DisagreementError(f"samples.parquet row {rows[i]} {column} is {values[i]}: no class")
    return values


@np.errstate(all="ignore")  # infinities are compared exactly
def compare_column(
    samples: Table,
    name: str,
    rows: npt.NDArray[np.int64],
    values: Floats,
    found: Judged,
    tolerance: Floats,
    widest: float,
) -> None:
    """Prediction, rival, margin and radius of one column.

    No radius may be larger than what is proved. For the rest: a stored prediction or rival may
    differ from the derived one only where the two are within the tolerance of each other, margin
    and radius are those of the stored ones. Radii larger than any distance of two images, `widest`,
    are alike in this comparison. An infinite tolerance compares nothing but the proof.
    """
    at = np.arange(len(rows))
    stored = {
        key: samples[f"{name}_{key}"][rows] for key in ("prediction", "rival", "margin", "radius")
    }
    rivals = _classes(samples, f"{name}_rival", rows, values.shape[1])
    smallest = found.radii.min(axis=1)
    due_radius = np.maximum(smallest, 0.0)
    derived = {
        "prediction": values.argmax(axis=1),
        "rival": found.radii.argmin(axis=1),
        "margin": found.margins[at, rivals],
        "radius": due_radius,
    }
    scale = tolerance * np.maximum(1.0, np.abs(values).max(axis=1))
    reach = tolerance * np.maximum(1.0, np.abs(smallest))
    # Where nothing is certified, every rival that allows nothing may be named.
    nothing = (stored["radius"] == 0) & (found.radii[at, rivals] <= reach)
    limits = (found.radii[at, rivals] <= smallest + reach) | nothing
    limits &= rivals != stored["prediction"]
    close = {
        "prediction": found.margins.min(axis=1) >= -scale,
        "rival": limits,
        "margin": np.abs(stored["margin"] - derived["margin"]) <= 2 * scale,  # two logits
        "radius": np.abs(np.minimum(stored["radius"], widest) - np.minimum(due_radius, widest))
        <= tolerance * np.maximum(1.0, due_radius),
    }
    if name == "nominal":  # a margin of 0 has no radius where two rows of the head are alike
        close["radius"] |= (stored["margin"] <= scale) & (derived["margin"] <= scale)
    for quantity, due in derived.items():
        if (wrong := np.flatnonzero((stored[quantity] != due) & ~close[quantity])).size:
            i = int(wrong[0])
            differ(f"{_place(samples, rows[i])} {name}_{quantity}", stored[quantity][i], due[i])
    if (wrong := np.flatnonzero(~found.proved)).size:
        i = int(wrong[0])
        place = f"{_place(samples, rows[i])} {name}_radius"
        raise DisagreementError(f"{place} is {shown(stored['radius'][i])}, which is not proved")


def _place(samples: Table, row: int) -> str:
    return f"samples.parquet row {row} ({shown(samples['key'][row])})"


def check_errors(body: Body, largest: Largest, complete: bool) -> None:
    """Compare `largest_error` and `largest_error_ball`; a part of the samples bounds them below."""
    for name, (error, least, most) in largest.items():
        for field, low, high in zip(ERRORS, (error, least), (error, most), strict=True):
            limit = high * (1 + SAME_ERROR) if complete else np.inf
            due = Within(low * (1 - SAME_ERROR), float(limit))
            agree(body["columns"][name].get(field, "nothing"), due, f"columns.{name}.{field}")


def check_table(body: Body, samples: Table, bound: Near) -> None:
    """Compare every number of `columns` that follows from samples.parquet, exactly."""
    ratios = radii_of_table(take(body, "eps", list, "certificate"))
    if not ratios:
        raise UnusableError("eps is empty")
    for name in COLUMNS:
        place = f"columns.{name}"
        column = body["columns"][name]
        program = PROGRAMS[column["program"]]
        radius, count = samples[f"{name}_radius"], len(samples["key"])
        if not (radius >= 0).all():
            row = int(np.flatnonzero(~(radius >= 0))[0])
            raise DisagreementError(f"samples.parquet row {row} {name}_radius is {radius[row]}")
        correct = samples[f"{name}_prediction"] == samples["label"]
        certified = certified_samples(samples, name, ratios)
        derived = {
            "program": program.name,
            "unit_roundoff": program.stored,
            "lipschitz": 1.0 if name == "nominal" else bound,
            "clean": int(correct.sum()) / count,
            "certified": certified,
            "cra": {eps: number / count for eps, number in certified.items()},
            "mean_radius": Near(math.fsum(radius[correct]) / count, 0.0),
            "vacuous": not (radius > 0).any(),
        }
        agree({key: column[key] for key in column if key not in ERRORS}, derived, place)


def certified_samples(samples: Table, name: str, ratios: dict[str, Fraction]) -> dict[str, int]:
    """By radius, how many samples are classified correctly with a greater one."""
    correct = samples[f"{name}_prediction"] == samples["label"]
    radius = samples[f"{name}_radius"][correct]
    return {eps: count_greater(radius, ratio) for eps, ratio in ratios.items()}


def count_greater(radius: npt.NDArray[np.float64], ratio: Fraction) -> int:
    """How many radii are greater than an exact ratio."""
    nearest = float(ratio)
    return int((radius > nearest if Fraction(nearest) <= ratio else radius >= nearest).sum())
