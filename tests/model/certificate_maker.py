"""Certificates made with the verifier's own mathematics, and forged ones.

docs/explanation/certificate.md says what they hold.
Every function that seals recomputes the digests, as whoever forges a certificate would.
"""

import copy
import functools
import hashlib
import io
import json
import math
import shutil
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.format.tar import add_end, add_member
from data_shards.sources.base import Source, encode_png
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from model.artifact.artifact import write_artifact
from model.networks.lipnext.config import LipNeXtConfig
from model.verifier.certificate import COLUMNS, SCHEMA
from model.verifier.families.lipnext import LipNeXt
from model.verifier.mathematics.radii import SLACK, image_norms, judge, nominal
from model.verifier.mathematics.rounding import PROGRAMS
from model.verify import main
from tests.model.small_networks import trained_like

SAMPLES, TRAIN, CLASSES, SIDE = 24, 8, 3, 4
EPS = ("0", "3/255", "36/255")
CERTIFICATE = "certificate/certificate.json"
CONFIRMED, DISAGREES, UNUSABLE = 0, 1, 2


def run(case: "Case", *options: str) -> int:
    return main([*case.arguments, *options])


def change(body, path, function) -> dict:
    body = copy.deepcopy(body)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = function(inner[path[-1]])
    return body


def digest(body: dict) -> str:
    content = {name: body[name] for name in body if name != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Case:
    """A folder with `model`, `shards` and `certificate`, and its parts as they can be changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.certificate = root / "certificate"
        self.shards = root / "shards"
        self.model = root / "model"

    def copy(self, root: Path) -> "Case":
        shutil.copytree(self.root, root)
        return Case(root)

    @property
    def arguments(self) -> list[str]:
        return [
            str(self.certificate),
            "--artifact",
            str(self.model),
            "--data.shards",
            str(self.shards),
        ]

    def json(self, name: str) -> dict:
        return json.loads((self.root / name).read_text())

    def put(self, name: str, body: dict, seal: bool = True) -> None:
        if seal:
            body["digest"] = digest(body)
        (self.root / name).write_text(json.dumps(body))

    def body(self) -> dict:
        return self.json(CERTIFICATE)

    def seal(self, body: dict) -> None:
        self.put(CERTIFICATE, body)

    def samples(self) -> dict[str, list]:
        return pq.read_table(self.certificate / "samples.parquet").to_pydict()

    def forge(self, columns: dict[str, list], table: bool = True) -> None:
        """Write samples.parquet, its digest, and the table that follows from it."""
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        (self.certificate / "samples.parquet").write_bytes(sink.getvalue())
        body = self.body()
        body["samples_sha256"] = hashlib.sha256(sink.getvalue()).hexdigest()
        if table:
            for name in COLUMNS:
                body["columns"][name] |= table_of(columns, name, body["eps"])
        self.seal(body)

    def seal_shards(self) -> None:
        """Recompute every digest of the shard set, and the certificate's name of it."""
        header = self.json("shards/index.json")
        for shard in header["shards"]:
            data = (self.shards / shard["file"]).read_bytes()
            shard |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        rows = (self.shards / "index.parquet").read_bytes()
        header["rows_sha256"] = hashlib.sha256(rows).hexdigest()
        self.put("shards/index.json", header)
        body = self.body()
        body["shards"]["index_digest"] = header["digest"]
        self.seal(body)

    def rewrite_member(self, shard: str, name: str, change) -> None:
        """Replace the body of one member of a tar by change(body)."""
        with tarfile.open(self.shards / shard) as members:
            bodies = {m.name: members.extractfile(m).read() for m in members}
        bodies[name] = change(bodies[name])
        out = io.BytesIO()
        for member, data in bodies.items():
            add_member(out, member, data)
        add_end(out)
        (self.shards / shard).write_bytes(out.getvalue())

    def rewrite_rows(self, **changes) -> None:
        """Replace columns of index.parquet."""
        table = pq.read_table(self.shards / "index.parquet")
        for name, values in changes.items():
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
        pq.write_table(table, self.shards / "index.parquet")

    def rewrite_weight(self, name: str) -> None:
        """Add 1/64 to the last value of one tensor, with the artifact's digests."""
        path = self.model / "weights.safetensors"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        stop = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][1]
        value = np.frombuffer(data, "<f4", 1, stop - 4) + np.float32(1 / 64)
        data[stop - 4 : stop] = value.tobytes()
        path.write_bytes(data)
        self.seal_model()

    def seal_model(self) -> None:
        """Recompute the artifact's digests, and the certificate's name of the model."""
        info, body = self.json("model/artifact.json"), self.body()
        weights = (self.model / "weights.safetensors").read_bytes()
        info["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        info["digest"] = digest({key: info[key] for key in ("network", "weights_sha256")})
        self.put("model/artifact.json", info, seal=False)
        body["model"] |= {key: info[key] for key in ("digest", "weights_sha256", "network")}
        self.seal(body)


def table_of(columns: dict[str, list], name: str, eps: list[str]) -> dict:
    """What follows from samples.parquet."""
    radii, count = columns[f"{name}_radius"], len(columns["label"])
    hits = zip(radii, columns[f"{name}_prediction"], columns["label"], strict=True)
    correct = [radius for radius, prediction, label in hits if prediction == label]
    finite = [radius for radius in correct if math.isfinite(radius)]
    certified = {text: sum(Fraction(r) > Fraction(text) for r in finite) for text in eps}
    return {
        "clean": len(correct) / count,
        "certified": certified,
        "cra": {text: number / count for text, number in certified.items()},
        "mean_radius": math.fsum(finite) / count,
        "vacuous": not any(radius > 0 for radius in radii),
    }


def make(root: Path, *, deployed: str = "float32", **network: Any) -> Case:
    """An artifact of random weights, a shard set of three test shards and their certificate."""
    case = Case(root)
    config = LipNeXtConfig(
        input_shape=(1, SIDE, SIDE), num_classes=CLASSES,
        **{"patch": 2, "width": 8, "depth": 2, "alpha": 1 / 8, **network},
    )  # fmt: skip
    info = write_artifact(
        Store(str(case.model)).open,
        network_config=config,
        tensors=trained_like(config).named_parameters(),
        context={},
    )
    pixels = np.random.default_rng(5).integers(0, 256, (SAMPLES + TRAIN, SIDE, SIDE), np.uint8)
    test = np.arange(SAMPLES + TRAIN) >= TRAIN
    source = Source(
        name="noise",
        image_shape=(1, SIDE, SIDE),
        class_names=("a", "b", "c"),
        labels=np.arange(SAMPLES + TRAIN) % CLASSES,
        test=test,
        validation=np.arange(SAMPLES + TRAIN) < TRAIN // 2,
        load=functools.partial(_load, pixels),
        parameters={"source": "noise"},
    )
    index = write_shard_set(source, str(case.shards), samples_per_shard=8)
    rows = index.select("test")
    keys = [key.decode() for key in index.rows.key[rows]]
    body, columns = _certify(case, info, deployed, pixels[[int(key) for key in keys]][:, None])
    body["shards"] = {
        "name": "noise", "index_digest": index.digest, "split": "test", "samples": SAMPLES,
    }  # fmt: skip
    labels = index.rows.label[rows].tolist()
    files = [index.shards[number].file for number in index.rows.shard[rows]]
    case.certificate.mkdir()
    case.seal(body)
    case.forge({"shard": files, "key": keys, "label": labels, **columns})
    return case


def _load(pixels, numbers):
    return [encode_png(pixels[i]) for i in numbers]


def _certify(case: Case, info, deployed: str, images: np.ndarray) -> tuple[dict, dict[str, list]]:
    """Everything of sections 3 to 7 but `shards` and the table."""
    stored = case.json("model/artifact.json")
    tensors = _tensors(case.model / "weights.safetensors")
    config = stored["network"]
    names = LipNeXt.bounded(config)
    matrices = {name: LipNeXt.bound_matrix(config, name, tensors[name]) for name in names}
    network = LipNeXt(config, tensors, matrices)
    values, local = network.evaluate(images)
    norms = image_norms(images, "l2")
    columns: dict[str, list] = {
        "pixels_sha256": [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    }
    body_columns = {}
    for name, program in (("nominal", "float32"), ("sound", "float64"), ("deployed", deployed)):
        # A program that is exact up to the last rounding of its logits.
        y = values if name == "sound" else values.astype(np.float32).astype(np.float64)
        c = y.argmax(axis=1)
        if name == "nominal":
            found = nominal(network, y, local, c)
        else:
            found = judge(network, PROGRAMS[program], y, local, norms, c, np.zeros(len(c)))
        rivals = found.radii.argmin(axis=1)
        columns |= {
            f"{name}_prediction": c.tolist(),
            f"{name}_rival": rivals.tolist(),
            f"{name}_margin": found.margins[np.arange(len(c)), rivals].tolist(),
            f"{name}_radius": np.maximum(found.radii.min(axis=1), 0).tolist(),
        }
        body_columns[name] = {
            "program": program,
            "lipschitz": 1.0 if name == "nominal" else network.bound,
            "unit_roundoff": PROGRAMS[program].stored,
            "largest_error": float(found.error.max()),
            "largest_error_ball": float(found.error_ball[1].max()),
        }
    body = {
        "schema": SCHEMA,
        "norm": "l2",
        "pixel_unit": "[0, 1], 0.5 subtracted inside",
        "perturbation": "exact real norm, any real vector",
        "native_shape": [1, SIDE, SIDE],
        "network_shape": [1, SIDE, SIDE],
        "model": {
            "digest": info.digest,
            "weights_sha256": info.weights_sha256,
            "weight_dtype": "float32",
            "network": stored["network"],
        },
        "eps": list(EPS),
        "slack": SLACK,
        "layers": [
            {
                "name": name,
                "shape": list(tensors[name].shape),
                "sha256": hashlib.sha256(tensors[name].tobytes()).hexdigest(),
                **matrices[name].stated(),
            }
            for name in names
        ],
        "parts": network.parts(),
        "network_bound": network.bound,
        "head": {
            "kind": stored["network"]["head"],
            "largest_factor": float(network.head.factors.max()),
        },
        "observed_lipschitz": 0.5,
        "columns": body_columns,
        "code_version": "0.2.0",
    }
    return body, columns


def _tensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: np.frombuffer(data[8 + length :][slice(*entry["data_offsets"])], dtype="<f4").reshape(
            entry["shape"]
        )
        for name, entry in header.items()
    }
