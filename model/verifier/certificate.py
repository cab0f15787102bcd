"""certificate.json and samples.parquet: what is stated (sections 7 and 8.1 of the document)."""

import re
from collections.abc import Iterable
from fractions import Fraction

from model.verifier.artifact import PIXEL_UNIT
from model.verifier.errors import DisagreementError, UnusableError, agree, differ, shown, take
from model.verifier.files import (
    LARGEST_JSON,
    LARGEST_TABLE,
    Body,
    Table,
    beside,
    digest_of,
    parse_object,
    read_bytes,
    read_table,
    sha256,
)
from model.verifier.mathematics.radii import SLACK

SCHEMA = "certified-radius/2"
COLUMNS = {"nominal": ("float32",), "sound": ("float64",), "deployed": ("float32", "bfloat16")}
FIELDS = {
    *("schema", "norm", "pixel_unit", "perturbation", "native_shape", "network_shape", "model"),
    *("shards", "eps", "slack", "layers", "parts", "network_bound", "head", "observed_lipschitz"),
    *("columns", "samples_sha256", "code_version", "digest"),
}


def read_certificate(folder: str) -> Body:
    """Read certificate.json; check its digest and what does not depend on anything else."""
    place = beside(folder, "certificate.json")
    body = parse_object(read_bytes(place, LARGEST_JSON), place)
    if missing := sorted(FIELDS - body.keys()):
        raise UnusableError(f"{place} has no field {missing[0]}")
    agree(body["digest"], digest_of(body, place), "digest")
    if unknown := sorted(body.keys() - FIELDS):
        raise DisagreementError(f"the unknown field {shown(unknown[0])} cannot be derived")
    agree(body["schema"], SCHEMA, "schema")
    if take(body, "norm", str, "certificate") not in ("l2", "linf"):
        raise DisagreementError(f"norm is {shown(body['norm'])}, not l2 or linf")
    agree(body["pixel_unit"], PIXEL_UNIT, "pixel_unit")
    agree(body["perturbation"], "exact real norm, any real vector", "perturbation")
    agree(body["network_shape"], take(body, "native_shape", list, "certificate"), "network_shape")
    agree(body["slack"], SLACK, "slack")
    take(body, "code_version", str, "certificate")
    columns = take(body, "columns", dict, "certificate")
    if columns.keys() != COLUMNS.keys():
        differ("columns (names)", sorted(columns), sorted(COLUMNS))
    for name, programs in COLUMNS.items():
        program = take(take(columns, name, dict, "columns"), "program", str, f"columns.{name}")
        if program not in programs:
            allowed = " or ".join(programs)
            raise UnusableError(f"columns.{name}.program is {shown(program)}, not {allowed}")
    return body


def radii_of_table(texts: Iterable[object]) -> dict[str, Fraction]:
    """Radii such as 36/255 as exact ratios."""
    ratios: dict[str, Fraction] = {}
    for text in texts:
        if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,9}(/[1-9][0-9]{0,8})?", text):
            raise UnusableError(f"eps {shown(text)} is not a ratio such as 36/255")
        if text in ratios:
            raise DisagreementError(f"eps {text} occurs twice")
        ratios[text] = Fraction(text)
    return ratios


def read_samples(folder: str, body: Body) -> Table:
    """Read samples.parquet, which must be the file that the certificate names."""
    place = beside(folder, "samples.parquet")
    data = read_bytes(place, LARGEST_TABLE)
    agree(body["samples_sha256"], sha256(data), "samples_sha256")
    kinds = {"shard": "string", "key": "string", "pixels_sha256": "string", "label": "integer"}
    for name in COLUMNS:
        kinds |= {f"{name}_prediction": "integer", f"{name}_rival": "integer"}
        kinds |= {f"{name}_margin": "number", f"{name}_radius": "number"}
    return read_table(data, kinds, place, surplus=False)
