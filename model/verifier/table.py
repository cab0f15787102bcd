"""The table: what follows from samples.parquet alone (section 8.6)."""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from model.verifier.certificate import COLUMNS, radii_of_table
from model.verifier.files import Body, Table
from model.verifier.mathematics.arithmetic import PROGRAMS
from model.verifier.refusal import DisagreementError, Near, UnusableError, agree, take
from model.verifier.samples import ERRORS


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
