"""Re-derive a certificate: `python -m model.verify CERTIFICATE --artifact URL --shards URL`.

Follows section 8 of docs/certificate.md with an implementation of its own (`verify_numpy.py` is the
mathematics, `verify_files.py` opens the files). Exit status 0: everything derived agrees; 1: the
first disagreement is named; 2: an input cannot be used.

What it cannot tell. The digest is no signature: whoever changes a file may recompute it. So a
change is caught because the number is derived again, and a consistent change of the weights or of
the images makes a certificate of another model or another data set, with other digests. Nothing can
be derived of `code_version`, and of `observed_lipschitz` only that it does not exceed the proved
bound. Of samples that were not drawn, only shard, key, label and the table are checked.
"""

import argparse
import math
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model import verify_numpy as derive
from model.verify_files import (
    LARGEST_JSON,
    LARGEST_SHARD,
    LARGEST_TABLE,
    PIXEL_UNIT,
    SAME_BOUND,
    Body,
    DisagreementError,
    Near,
    RefusalError,
    Shard,
    Table,
    UnusableError,
    agree,
    beside,
    compare_rows,
    differ,
    digest_of,
    parse_object,
    read_artifact,
    read_bytes,
    read_table,
    rows_of_split,
    sha256,
    shown,
    take,
)

SAME_SAMPLE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.5}
COLUMNS = {"nominal": ("float32",), "sound": ("float64",), "deployed": ("float32", "bfloat16")}
FIELDS = {
    *("schema", "norm", "pixel_unit", "perturbation", "native_shape", "network_shape", "model"),
    *("shards", "eps", "layers", "parts", "network_bound", "head", "observed_lipschitz"),
    *("columns", "samples_sha256", "code_version", "digest"),
}
ERRORS = ("largest_error", "largest_error_ball")  # compared once samples are evaluated
FLOATS_AT_ONCE = 1 << 24  # activations of one batch


# 1. certificate.json


def read_certificate(folder: str) -> Body:
    """Read certificate.json; check its digest and what does not depend on anything else."""
    place = beside(folder, "certificate.json")
    body = parse_object(read_bytes(place, LARGEST_JSON), place)
    if missing := sorted(FIELDS - body.keys()):
        raise UnusableError(f"{place} has no field {missing[0]}")
    agree(body["digest"], digest_of(body, place), "digest")
    if unknown := sorted(body.keys() - FIELDS):
        raise DisagreementError(f"the unknown field {shown(unknown[0])} cannot be derived")
    agree(body["schema"], "certified-radius/1", "schema")
    agree(body["norm"], "l2", "norm")
    agree(body["pixel_unit"], PIXEL_UNIT, "pixel_unit")
    agree(body["perturbation"], "exact real norm, any real vector", "perturbation")
    agree(body["network_shape"], take(body, "native_shape", list, "certificate"), "network_shape")
    take(body, "code_version", str, "certificate")
    if take(body, "columns", dict, "certificate").keys() != COLUMNS.keys():
        differ("columns (names)", sorted(body["columns"]), sorted(COLUMNS))
    return body


def radii_of_table(body: Body) -> dict[str, Fraction]:
    """The list `eps` as exact ratios."""
    ratios: dict[str, Fraction] = {}
    for text in take(body, "eps", list, "certificate"):
        if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,9}(/[1-9][0-9]{0,8})?", text):
            raise UnusableError(f"eps {shown(text)} is not a ratio such as 36/255")
        if text in ratios:
            raise DisagreementError(f"eps {text} occurs twice")
        ratios[text] = Fraction(text)
    if not ratios:
        raise UnusableError("eps is empty")
    return ratios


# 3. The bounds


class Proof(NamedTuple):
    """The derived bounds that radii follow from."""

    network: derive.Network
    matrices: dict[str, derive.MatrixBounds]
    bound: float
    rows: npt.NDArray[np.float64]
    nominal_factors: npt.NDArray[np.float64]
    factors: npt.NDArray[np.float64]

    def error(self, program: str) -> Callable[[npt.NDArray[np.float64]], Any]:
        """E as a function of the norms of images."""
        largest = float(self.factors.max())
        return lambda norms: derive.margin_error(
            self.network, self.matrices, largest, norms, derive.PROGRAMS[program]
        )


def derive_bounds(network: derive.Network, body: Body) -> Proof:
    """Derive the bounds of all weights and compare `layers` to `observed_lipschitz`."""
    depth = network.config["depth"]
    blocks = [f"blocks.{i}.{matrix}" for i in range(depth) for matrix in "RM"]
    matrices, layers = {}, []
    for name in ["stem.weight", *blocks]:
        tensor = network.tensors[name]
        matrices[name] = derive.bounds_of_matrix(tensor)
        numbers = {key: Near(value) for key, value in matrices[name]._asdict().items()}
        layers.append(
            {"name": name, "shape": list(tensor.shape), "sha256": sha256(tensor.data), **numbers}
        )
    parts = derive.parts_of_network(depth, matrices)
    bound = derive.network_bound(depth, matrices)
    agree(body["layers"], layers, "layers")
    agree(body["parts"], {name: Near(value) for name, value in parts.items()}, "parts")
    agree(body["network_bound"], Near(bound), "network_bound")
    kind = network.config["head"]
    weight = network.wide("head.weight")
    if kind == "unit" and np.sqrt(np.square(weight).sum(axis=1)).min() < 1e-6:
        raise UnusableError("a row of the head is nearly zero and cannot be normalised")
    rows = derive.head_rows(network)
    plain, factors = derive.margin_factors(network, rows)
    agree(body["head"], {"kind": kind, "largest_factor": Near(float(factors.max()))}, "head")
    observed = take(body, "observed_lipschitz", float, "certificate")
    if not 0 <= observed <= bound:
        raise DisagreementError(f"observed_lipschitz {observed} is not within [0, {bound}]")
    return Proof(network, matrices, bound, rows, plain, factors)


# 4. The shard set


class Images(NamedTuple):
    """The certified split of a shard set."""

    folder: str
    shards: list[Body]
    rows: Table
    """Rows of the split, in index order."""


def read_samples(folder: str, body: Body) -> Table:
    """Read samples.parquet, which must be the file that the certificate names."""
    place = beside(folder, "samples.parquet")
    data = read_bytes(place, LARGEST_TABLE)
    agree(body["samples_sha256"], sha256(data), "samples_sha256")
    kinds = {"shard": "string", "key": "string", "pixels_sha256": "string", "label": "integer"}
    for name in COLUMNS:
        kinds |= {f"{name}_prediction": "integer", f"{name}_rival": "integer"}
        kinds |= {f"{name}_margin": "number", f"{name}_radius": "number"}
    return read_table(data, kinds, place)


def read_index(folder: str, classes: int, body: Body, samples: Table) -> Images:
    """Read a shard set's index: its split must be the rows of samples.parquet, in order."""
    place = beside(folder, "index.json")
    header = parse_object(read_bytes(place, LARGEST_JSON), place)
    digest = digest_of(header, place)
    due = {"schema_version": 2, "image_shape": body["native_shape"], "num_classes": classes}
    for name, value in {"digest": digest, **due}.items():
        agree(header.get(name), value, f"{place}: {name}")
    shards = take(header, "shards", list, place)
    for shard in shards:
        file = take(shard, "file", str, f"{place}: shards")
        if not re.fullmatch(r"(train|test)-[0-9]{5,9}\.tar", file):
            raise UnusableError(f"{place}: {shown(file)} is no name of a shard")
    data = read_bytes(beside(folder, "index.parquet"), LARGEST_TABLE)
    agree(header.get("rows_sha256"), sha256(data), f"{place}: rows_sha256")
    split = take(take(body, "shards", dict, "certificate"), "split", str, "shards")
    rows = rows_of_split(data, split, beside(folder, "index.parquet"))
    count = len(rows["key"])
    derived = {"name": header.get("name"), "index_digest": digest, "split": split, "samples": count}
    agree(body["shards"], derived, "shards")
    compare_rows(shards, rows, samples, place)
    return Images(folder, shards, rows)


def load_images(
    images: Images,
    samples: Table,
    chosen: npt.NDArray[np.int64],
    shape: tuple[int, int, int],
    at_once: int,
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """Row numbers and decoded images, shard by shard; label and pixels as the tar has them."""
    shard_of = images.rows["shard"][chosen]
    for number in np.unique(shard_of):
        file = images.shards[number]
        place = beside(images.folder, file["file"])
        data = read_bytes(place, LARGEST_SHARD)
        agree(file.get("sha256"), sha256(data), f"index.json: sha256 of {file['file']}")
        shard = Shard(data, place)
        members = chosen[shard_of == number]
        for start in range(0, len(members), at_once):
            batch, pixels = members[start : start + at_once], []
            for i in batch:
                key, extension = samples["key"][i], images.rows["extension"][i]
                where = f"samples.parquet row {i} ({shown(key)})"
                agree(int(samples["label"][i]), shard.label(key), f"{where} label")
                pixels.append(shard.pixels(key, extension, shape))
                digest = sha256(pixels[-1].data)
                agree(samples["pixels_sha256"][i], digest, f"{where} pixels_sha256")
            yield batch, np.stack(pixels)


# 5. The samples


def check_samples(
    proof: Proof, images: Images, samples: Table, chosen: npt.NDArray[np.int64], body: Body
) -> dict[str, tuple[float, float]]:
    """Evaluate the chosen samples and compare every column.

    Returns:
        Largest E_x and E_ball by column, over the samples checked.
    """
    config = proof.network.config
    tokens = math.prod(config["input_shape"][1:]) // config["patch"] ** 2
    at_once = max(1, FLOATS_AT_ONCE // (tokens * config["width"]))
    shape = tuple(config["input_shape"])
    scaled = proof.bound * proof.factors
    largest = dict.fromkeys(COLUMNS, (0.0, 0.0))
    for rows, pixels in load_images(images, samples, chosen, shape, at_once):
        values = derive.logits(proof.network, proof.rows, pixels)
        if not np.isfinite(values).all():
            raise UnusableError(f"the float64 logits of samples.parquet row {rows[0]} overflow")
        norms = derive.image_norms(pixels)
        for name in COLUMNS:
            program = body["columns"][name]["program"]
            predictions = stored_classes(samples, f"{name}_prediction", rows, values.shape[1])
            if name == "nominal":
                found = derive.nominal_radii(values, predictions, proof.nominal_factors)
            else:
                error = proof.error(program)
                found = derive.proved_radii(values, predictions, scaled, norms, error)
            compare_column(samples, name, rows, values, found, SAME_SAMPLE[program])
            both = (found.error.max(), found.error_ball.max())
            largest[name] = (max(largest[name][0], both[0]), max(largest[name][1], both[1]))
    return largest


def stored_classes(
    samples: Table, column: str, rows: npt.NDArray[np.int64], classes: int
) -> npt.NDArray[np.int64]:
    """Classes of a column of samples.parquet, which must exist."""
    values = samples[column][rows].astype(np.int64)
    if (wrong := np.flatnonzero((values < 0) | (values >= classes))).size:
        i = int(wrong[0])
        raise DisagreementError(f"samples.parquet row {rows[i]} {column} is {values[i]}: no class")
    return values


def compare_column(
    samples: Table,
    name: str,
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
    found: derive.Radii,
    tolerance: float,
) -> None:
    """Prediction, rival, margin and radius of one column.

    A stored prediction or rival may differ from the derived one only where the two are within the
    tolerance of each other; margin and radius are those of the stored ones.
    """
    at = np.arange(len(rows))
    derived = {"prediction": values.argmax(axis=1), "rival": found.radii.argmin(axis=1)}
    rivals = stored_classes(samples, f"{name}_rival", rows, values.shape[1])
    derived["margin"] = found.margins[at, rivals]
    derived["radius"] = np.maximum(found.radii.min(axis=1), 0.0)
    scale = tolerance * np.maximum(1.0, np.abs(values).max(axis=1))
    # How far the stored rival is from the smallest radius; infinities are compared exactly.
    reach = np.maximum(1.0, np.abs(found.radii.min(axis=1)))
    behind = found.radii[at, rivals] <= found.radii.min(axis=1) + tolerance * reach
    close = {
        "prediction": found.margins.min(axis=1) >= -scale,
        "rival": behind & np.isfinite(found.radii[at, rivals]),
        "margin": np.abs(samples[f"{name}_margin"][rows] - derived["margin"]) <= scale,
        "radius": np.abs(samples[f"{name}_radius"][rows] - derived["radius"])
        <= tolerance * np.maximum(1.0, derived["radius"]),
    }
    for quantity, due in derived.items():
        stored = samples[f"{name}_{quantity}"][rows]
        if (wrong := np.flatnonzero((stored != due) & ~close[quantity])).size:
            i = int(wrong[0])
            place = f"samples.parquet row {rows[i]} ({shown(samples['key'][rows[i]])})"
            differ(f"{place} {name}_{quantity}", stored[i], due[i])


# 6. The table


def check_table(body: Body, samples: Table, bound: float) -> None:
    """Compare every number of `columns` that follows from samples.parquet, exactly."""
    ratios = radii_of_table(body)
    for name, programs in COLUMNS.items():
        place = f"columns.{name}"
        column = take(body["columns"], name, dict, "columns")
        program = take(column, "program", str, place)
        if program not in programs:
            raise UnusableError(f"{place}.program is {shown(program)}, not {' or '.join(programs)}")
        radius, count = samples[f"{name}_radius"], len(samples["key"])
        if not (radius >= 0).all():
            row = int(np.flatnonzero(~(radius >= 0))[0])
            raise DisagreementError(f"samples.parquet row {row} {name}_radius is {radius[row]}")
        correct = samples[f"{name}_prediction"] == samples["label"]
        certified = {
            eps: int(count_greater(radius[correct], ratio)) for eps, ratio in ratios.items()
        }
        derived = {
            "program": program,
            "unit_roundoff": derive.PROGRAMS[program].stored,
            "lipschitz": 1.0 if name == "nominal" else Near(bound),
            "clean": int(correct.sum()) / count,
            "certified": certified,
            "cra": {eps: number / count for eps, number in certified.items()},
            "mean_radius": Near(math.fsum(radius[correct]) / count, 0.0),
            "vacuous": not (radius > 0).any(),
        }
        agree({key: column[key] for key in column if key not in ERRORS}, derived, place)


def count_greater(radius: npt.NDArray[np.float64], ratio: Fraction) -> int:
    """How many radii are greater than an exact ratio."""
    nearest = float(ratio)
    return (radius > nearest if Fraction(nearest) <= ratio else radius >= nearest).sum()


def check_errors(body: Body, largest: dict[str, tuple[float, float]], complete: bool) -> None:
    """Compare `largest_error` and `largest_error_ball`; a part of the samples bounds them."""
    for name, derived in largest.items():
        column = body["columns"][name]
        tolerances = (SAME_BOUND, SAME_SAMPLE[column["program"]])
        for field, value, tolerance in zip(ERRORS, derived, tolerances, strict=True):
            stored = column.get(field, math.nan)
            if not complete and type(stored) in (int, float, type(None)):
                value = max(value, math.inf if stored is None else stored)
            agree(stored, Near(float(value), tolerance), f"columns.{name}.{field}")


# The command


def verify(
    certificate: str, artifact: str, shards: str, sample: int | None = None, seed: int | None = None
) -> str:
    """Re-derive a certificate.

    Args:
        certificate: URL of its folder or of certificate.json.
        artifact: URL of the model artefact.
        shards: URL of the shard set.
        sample: how many samples to evaluate; None for all.
        seed: of the choice among them; None to draw one.

    Returns:
        A short report.

    Raises:
        RefusalError: the first disagreement, or an input that cannot be used.
    """
    head, _, name = certificate.rpartition("/")
    folder = (head or ".") if name == "certificate.json" else certificate
    body = read_certificate(folder)
    samples = read_samples(folder, body)
    network = derive.Network(*read_artifact(artifact, body))
    proof = derive_bounds(network, body)
    images = read_index(shards, network.config["num_classes"], body, samples)
    check_table(body, samples, proof.bound)
    count = len(samples["key"])
    chosen, how = np.arange(count), ""
    if sample is not None and sample < count:
        seed = secrets.randbits(64) if seed is None else seed
        chosen = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False))
        how = f", drawn with seed {seed}"
    largest = check_samples(proof, images, samples, chosen, body)
    check_errors(body, largest, complete=len(chosen) == count)
    return report(body, proof, f"{len(chosen)} of {count} ({len(chosen) / count:.1%}){how}")


def report(body: Body, proof: Proof, share: str) -> str:
    """What was checked, and the table."""
    columns = body["columns"]
    lines = [
        f"OK: certificate {body['digest'][:12]} of model {body['model']['digest'][:12]}",
        f"weights checked: all, {len(proof.matrices)} matrices; network bound {proof.bound:.9f}",
        f"samples checked: {share}",
        "".join(f"{text:>16}" for text in ("eps (l2)", *COLUMNS)),
        "".join(f"{text:>16}" for text in ("", *(columns[name]["program"] for name in COLUMNS))),
    ]
    rows = {"clean": [columns[name]["clean"] for name in COLUMNS]}
    rows |= {eps: [columns[name]["cra"][eps] for name in COLUMNS] for eps in body["eps"]}
    for eps, shares in rows.items():
        lines.append(f"{eps:>16}" + "".join(f"{value:>16.2%}" for value in shares))
    if vacuous := [name for name in COLUMNS if columns[name]["vacuous"]]:
        lines.append(f"vacuous: {', '.join(vacuous)}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="model.verify", description="Re-derive a certificate.")
    parser.add_argument("certificate", help="URL of its folder or of certificate.json")
    parser.add_argument("--artifact", required=True, help="URL of the model artefact")
    parser.add_argument("--shards", required=True, help="URL of the shard set")
    parser.add_argument("--sample", type=_natural, help="evaluate so many samples; default: all")
    parser.add_argument("--seed", type=_natural, help="of the choice of samples; default: drawn")
    options = parser.parse_args(arguments)
    try:
        text = verify(**vars(options))
    except RefusalError as error:
        title = "DISAGREEMENT" if error.status == 1 else "unusable input"
        sys.stderr.write(f"{title}: {error}\n")
        return error.status
    sys.stdout.write(text)
    return 0


def _natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a natural number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
