"""One HTML page that derives a certificate again, in the reader's browser.

It carries certificate, weights and test images, and the mathematics of
docs/explanation/certificate.md as readable JavaScript (``templates/verify/``). This module only
packs: what it writes is checked by the page, or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_shards.format.shard_index import ShardIndex, load_index
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import decode, fetch
from data_shards.untrusted.json_input import canonical_json
from data_shards.untrusted.limits import UntrustedError
from data_shards.untrusted.parquet import read_table, require_rows
from data_shards.untrusted.text import shown
from jobs.errors import EvaluationError
from model.artifact.artifact import WEIGHTS, ArtifactInfo, read_info
from pipeline.run.layout import CERTIFICATE, SAMPLES, SUMMARY
from pipeline.run.relative_urls import moved, roots

VERIFY_PAGE = "verify.html"
LARGEST_WEIGHTS = 2 << 20
LARGEST_PAGE = 10 << 20
"""A browser opens a page of this size at once."""
MATHEMATICS = (
    "arithmetic.js", "sha256.js", "matrices.js", "head.js", "lipnext.js", "radii.js",
    "tolerances.js", "table.js", "verify.js", "tamper.js", "worker.js",
)  # fmt: skip
"""What runs in the worker, in this order."""


@dataclass(frozen=True)
class Located:
    """Where the parts of an evaluation lie."""

    evaluation: Store
    artifact: Store
    shards: str


def locate(url: str, artifact: str = "", shards: str = "") -> Located:
    """Find evaluation, artifact and shard set from any of three folders.

    Args:
        url: an evaluation folder (it holds certificate.json); an artifact (its evaluation of the
            test split, or its only one); or a run (its last artifact that has one).
        artifact: URL of the artifact; empty: two folders above the evaluation, or the one that
            summary.json names.
        shards: URL of the shard set; empty: the one that summary.json names.

    Raises:
        EvaluationError: something is not there; the message says what was looked for.
    """
    evaluation = _evaluation_of(url)
    summary = _summary_of(evaluation)
    above = Store("/".join(evaluation.url.split("/")[:-2]))
    if artifact:
        found = Store(artifact)
    elif above.exists("artifact.json"):
        found = above
    else:
        found = Store(_named(summary, "artifact_url", evaluation, "--verify-artifact"))
    shards = shards or _named(summary, "shards_url", evaluation, "--data.shards")
    return Located(evaluation, found, shards)


def page(located: Located, samples: int | None = None) -> str:
    """Return the text of the page.

    Args:
        located: where everything lies.
        samples: images on it, spread evenly over the split; default: all, or as many as fit.

    Raises:
        EvaluationError: another family than LipNeXt, weights or a page that would be too large, or
            files that do not belong together.
        ShardError: the shard set or an image cannot be read.
        ModelError: artifact.json cannot be used.
    """
    info = read_info(located.artifact.open)
    _check_network(located, info)
    certificate = _read_certificate(located.evaluation)
    weights = located.artifact.read(WEIGHTS)
    _belong("weights_sha256", certificate["model"]["weights_sha256"], weights, located.artifact)
    table = _table(located.evaluation, certificate["shards"]["samples"])
    _belong("samples_sha256", certificate["samples_sha256"], table, located.evaluation)
    rows = _rows(table, located.evaluation)
    index = load_index(located.shards)
    chosen = _samples_in(index, certificate["shards"]["split"], rows["key"])
    content = {name: value for name, value in certificate.items() if name != "digest"}
    identity = {"network": certificate["model"]["network"]}
    identity["weights_sha256"] = certificate["model"]["weights_sha256"]
    data = {
        "certificate": {"text": canonical_json(content).decode(), "digest": certificate["digest"]},
        "identity": canonical_json(identity).decode(),
        "weights": base64.b64encode(weights).decode(),
        "rows": rows,
    }
    room = LARGEST_PAGE - len(_render(data, certificate, len(chosen)))
    numbers = _images_that_fit(room, len(chosen), math.prod(info.native_input_shape), samples)
    pixels = _pixels(index, chosen[numbers])
    data["images"] = {"rows": numbers, "pixels": base64.b64encode(pixels).decode()}
    return _render(data, certificate, len(numbers))


def _evaluation_of(url: str) -> Store:
    """The evaluation folder of a run, an artifact, or the folder itself."""
    store = Store(url)
    if store.exists(CERTIFICATE):
        return store
    names = store.ls("artifacts")
    artifacts = [store.child(name) for name in reversed(names)] if names else [store]
    for artifact in artifacts:
        found = {
            name.rpartition("/")[2]: artifact.child(name)
            for name in artifact.ls("evaluation")
            if artifact.exists(f"{name}/{CERTIFICATE}")
        }
        if len(found) == 1:
            return next(iter(found.values()))
        if found and "test" not in found:
            raise EvaluationError(
                f"{artifact} has the evaluations {', '.join(sorted(found))}: name the folder of one"
            )
        if found:
            return found["test"]
    raise EvaluationError(
        f"{store} is no evaluation, artifact or run: there is no {CERTIFICATE}, "
        f"evaluation/*/{CERTIFICATE} or artifacts/*/evaluation/*/{CERTIFICATE} in it"
    )


def _summary_of(evaluation: Store) -> dict[str, Any]:
    """summary.json, which only says where things lie; empty where it cannot be read."""
    try:
        return evaluation.read_object(SUMMARY)
    except (FileNotFoundError, ValueError):
        return {}


def _named(summary: dict[str, Any], field: str, evaluation: Store, option: str) -> str:
    if not isinstance(summary.get(field), str):
        raise EvaluationError(f"{evaluation}/{SUMMARY} names no {field}; give it with {option}")
    # Where it lies after the storage was copied or moved, with the evaluation in it.
    before, now = roots(str(summary.get("out_url") or evaluation.url), evaluation.url)
    return moved(summary[field], before=before, now=now)


def _read_certificate(evaluation: Store) -> dict[str, Any]:
    """certificate.json, of which this module and the frame of the page use a few fields."""
    try:
        body = evaluation.read_object(CERTIFICATE)
        model, shards = body["model"], body["shards"]
        used: tuple[Any, ...] = (
            body["digest"],
            body["norm"],
            body["samples_sha256"],
            shards["name"],
        )
        used += (shards["split"], body["columns"]["deployed"]["program"])
        used += (model["digest"], model["weights_sha256"])
        if not all(isinstance(text, str) for text in used):
            raise TypeError("a text is something else")
        if not isinstance(model["network"], dict) or not isinstance(body["layers"], list):
            raise TypeError("model.network or layers is something else")
        if type(shards["samples"]) is not int:
            raise TypeError("shards.samples is no whole number")
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{evaluation}/{CERTIFICATE} cannot be used: {error!r}") from error
    return body


def _check_network(located: Located, info: ArtifactInfo) -> None:
    if info.network.kind != "lipnext":
        raise EvaluationError(
            f"{located.artifact} is a network of family {info.network.kind!r}: the page derives "
            "certificates of 'lipnext' alone; python -m model.verify knows more families"
        )
    size = located.artifact.size(WEIGHTS)
    if size > LARGEST_WEIGHTS:
        raise EvaluationError(
            f"{located.artifact}/{WEIGHTS} has {size:,} bytes; a page carries up to "
            f"{LARGEST_WEIGHTS:,}: use python -m model.verify"
        )


def _table(evaluation: Store, samples: int) -> bytes:
    try:
        require_rows(evaluation.size(SAMPLES), samples, f"{evaluation}/{SAMPLES}")
        return evaluation.read(SAMPLES, limit="table_bytes")
    except UntrustedError as error:
        raise EvaluationError(str(error)) from error


def _belong(field: str, stated: str, data: bytes, place: Store) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != stated:
        raise EvaluationError(
            f"the certificate states {field} {stated}, but the file in {place} has {found}"
        )


def _samples_in(index: ShardIndex, split: str, keys: list[str]) -> npt.NDArray[np.int64]:
    """Rows of the index that hold the samples of the certificate."""
    chosen = index.select(split)
    if [key.decode() for key in index.rows.key[chosen]] != keys:
        raise EvaluationError(
            f"shard set {index.store} does not hold the {len(keys)} samples of the certificate in "
            "this order; name another one: --data.shards"
        )
    return chosen


def _images_that_fit(room: int, count: int, values: int, wanted: int | None) -> list[int]:
    """Rows of the images of the page: all, or so many at equal distances."""
    each = 4 * values / 3 + 8  # base64, and the number of the row
    fitting = int(room // each)
    number = min(count, fitting if wanted is None else wanted)
    if number > fitting or number < 1:
        raise EvaluationError(
            f"a page of at most {LARGEST_PAGE:,} bytes has room for {max(0, fitting):,} images of "
            f"{values} values beside the weights and {count:,} rows, not for {max(1, number):,}"
        )
    return [count * i // number for i in range(number)]


def _pixels(index: ShardIndex, rows: npt.NDArray[np.int64]) -> bytes:
    """The decoded images, one after the other, channels x height x width each."""
    encoded = fetch(index, rows)
    return b"".join(decode(index, row, encoded[row]).numpy().tobytes() for row in rows.tolist())


def _rows(data: bytes, evaluation: Store) -> dict[str, list[Any]]:
    """samples.parquet by column; infinite numbers as null, as in certificate.json."""
    try:
        columns = read_table(data, SAMPLES).to_pydict()
        rows = {
            name: [None if value == math.inf else value for value in values]
            for name, values in columns.items()
        }
        canonical_json(rows)
        rows["key"][0]
    except (ValueError, TypeError, LookupError, OSError, pa.ArrowException) as error:
        raise EvaluationError(f"{evaluation}/{SAMPLES} cannot be used: {error!r}") from error
    return rows


def _render(data: dict[str, Any], certificate: dict[str, Any], carried: int) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.reporting"),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("jobs.reporting") / "templates" / "verify"
    mathematics = "\n".join((folder / name).read_text() for name in MATHEMATICS)
    script = (folder / "page.js").read_text()
    # No text of the data can end its element or open another one.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return environment.get_template("verify/verify.html.j2").render(
        certificate=certificate,
        carried=carried,
        data=text,
        mathematics=mathematics,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
