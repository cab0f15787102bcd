"""The verifier confirms honest certificates and finds every change of a forged one."""

import io
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_shards.sources.digits import digits
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from jobs.evaluate_cra import main as evaluate
from model.artifact.artifact import write_artifact
from model.networks.lipnext.config import LipNeXtConfig
from model.verifier import artifact
from model.verifier.certificate import COLUMNS, FIELDS
from model.verifier.errors import DisagreementError
from model.verifier.families.lipnext import LipNeXt
from model.verifier.progress import Progress
from model.verifier.samples import ERRORS, count_greater
from model.verify import main
from tests.model.certificate_maker import (
    CERTIFICATE,
    CONFIRMED,
    DISAGREES,
    SAMPLES,
    UNUSABLE,
    Case,
    change,
    make,
    run,
)
from tests.model.small_networks import trained_like

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]


def leaves(body, path=()):
    """Paths of all leaves of a JSON value."""
    if not isinstance(body, dict | list) or not body:
        yield path
        return
    for key in body if isinstance(body, dict) else range(len(body)):
        yield from leaves(body[key], (*path, key))


def another(value, share=1e-6):
    """A leaf that differs, by little where it is a number."""
    if value is None:
        return 1.0
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value[:-1] + ("1" if value[-1] == "0" else "0")
    return value + 1 if isinstance(value, int) else value * (1 + share) + 1e-13


# What is honest is confirmed.


@pytest.mark.parametrize("head", ["unit", "linear"])
@pytest.mark.parametrize("deployed", ["float32", "bfloat16"])
def test_an_honest_certificate_is_confirmed(tmp_path, capsys, head, deployed):
    assert run(make(tmp_path, head=head, deployed=deployed)) == CONFIRMED
    printed = capsys.readouterr().out
    assert printed.startswith("OK")
    assert f"{SAMPLES} of {SAMPLES} (100.0%)" in printed
    assert deployed in printed
    assert ("vacuous: deployed" in printed) == (deployed == "bfloat16")


def test_the_certificate_may_be_named_by_its_file(case):
    certificate, *others = case.arguments
    assert main([f"{certificate}/certificate.json", *others]) == CONFIRMED


def test_every_input_may_lie_in_an_object_store(case):
    memory = fsspec.filesystem("memory")
    urls = []
    for folder in (case.certificate, case.model, case.shards):
        urls.append(f"memory://verifier/{folder.name}")
        memory.put(f"{folder}/", f"{urls[-1]}/", recursive=True)
    certificate, model, shards = urls
    try:
        assert main([certificate, "--artifact", model, "--data.shards", shards]) == CONFIRMED
    finally:
        memory.rm("memory://verifier", recursive=True)


NETWORKS = {
    "digits": (
        digits,
        {"input_shape": (1, 8, 8), "num_classes": 10, "patch": 2, "width": 64, "depth": 3},
    ),
    "depth-32": (
        lambda: synthetic(classes=5, size=8, samples=200, seed=2),
        {"input_shape": (3, 8, 8), "num_classes": 5, "patch": 2, "width": 32, "depth": 32},
    ),
    "linear": (
        lambda: synthetic(classes=4, size=8, samples=100, seed=1),
        {
            **{"input_shape": (3, 8, 8), "num_classes": 4, "patch": 2, "width": 16, "depth": 2},
            **{"head": "linear", "position": False, "alpha": 0.25, "beta": 1.0},
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "deployed"),
    [
        ("digits", "float32"),
        pytest.param("depth-32", "bfloat16", marks=pytest.mark.slow),
        ("linear", "float32"),
        pytest.param("digits", "bfloat16", marks=pytest.mark.slow),
        pytest.param("depth-32", "float32", marks=pytest.mark.slow),
        pytest.param("linear", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_evaluation_is_confirmed(tmp_path, capsys, name, deployed):
    source, settings = NETWORKS[name]
    write_shard_set(source(), str(tmp_path / "shards"))
    config = LipNeXtConfig(**settings)
    write_artifact(
        Store(str(tmp_path / "model")).open,
        network_config=config,
        tensors=trained_like(config).named_parameters(),
        context={},
    )
    case = Case(tmp_path)
    options = ["--cluster.launcher", "local", "--no-record", "--deployed", deployed]
    evaluate([*case.arguments[1:], "--out", str(case.certificate), *options])
    capsys.readouterr()
    status = run(case)
    assert (status, capsys.readouterr().err) == (CONFIRMED, "")


def test_some_samples_can_be_drawn(case, capsys):
    assert run(case, "--sample", "6", "--seed", "1") == CONFIRMED
    assert "6 of 24 (25.0%), drawn with seed 1" in capsys.readouterr().out
    assert run(case, "--sample", "6") == CONFIRMED
    assert "drawn with seed" in capsys.readouterr().out
    assert run(case, "--sample", "1000") == CONFIRMED
    assert "24 of 24 (100.0%)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_draw_finds_a_forged_sample_with_its_share(case):
    columns = case.samples()
    columns["sound_radius"][7] += 1e-6
    case.forge(columns)
    statuses = [run(case, "--sample", "6", "--seed", str(seed)) for seed in range(60)]
    assert 5 <= statuses.count(DISAGREES) <= 27  # 15 expected, standard deviation 3.4
    assert statuses.count(DISAGREES) + statuses.count(CONFIRMED) == 60
    assert run(case) == DISAGREES


@pytest.mark.parametrize("processes", ["1", "2"])
def test_large_weights_are_read_matrix_by_matrix(case, monkeypatch, processes):
    monkeypatch.setattr(artifact, "KEPT", 0)
    assert run(case, "--processes", processes) == CONFIRMED


def test_weights_that_change_while_they_are_read_are_found(case, monkeypatch):
    monkeypatch.setattr(artifact, "KEPT", 0)
    path = case.model / "weights.safetensors"
    weights, _ = artifact.read_tensors(str(path), LipNeXt.shapes(case.body()["model"]["network"]))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DisagreementError, match="read again"):
        weights[max(weights, key=lambda name: weights._entries[name].start)]


# certificate.json


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_changed_certificate_is_found_by_its_digest(case, capsys, field):
    body = case.body()
    for path in leaves(body[field], (field,)):
        case.put(CERTIFICATE, change(body, path, another), seal=False)
        assert run(case) == DISAGREES, path
        assert "digest" in capsys.readouterr().err


@pytest.mark.parametrize("field", sorted(FIELDS - {"digest", "code_version"}))
def test_a_changed_certificate_is_found_by_its_content(case, capsys, field):
    body = case.body()
    if field == "observed_lipschitz":
        body[field] = body["network_bound"]  # anything below the bound is possible
    for path in leaves(body[field], (field,)):
        # Errors are stated to be read; radii are proved with the verifier's own.
        share = 1e-2 if path[-1] in ERRORS else 1e-6
        case.seal(change(body, path, lambda value, share=share: another(value, share)))
        assert run(case) in (DISAGREES, UNUSABLE), path
        assert capsys.readouterr().err


def test_the_list_of_eps_is_what_the_table_is_about(case):
    body = case.body()
    for eps in ([], ["0"], ["0", "3/255"], [*body["eps"], "4/255"], [*body["eps"], "0"], ["1/0"]):
        case.seal({**body, "eps": eps})
        assert run(case) in (DISAGREES, UNUSABLE), eps


def test_unknown_and_missing_fields_are_refused(case):
    body = case.body()
    case.seal({**body, "remark": "certified twice"})
    assert run(case) == DISAGREES
    for path in [("layers", 0), ("columns", "sound"), ("columns", "nominal", "cra"), ("model",)]:
        case.seal(change(body, path, lambda part: {**part, "remark": 1}))
        assert run(case) == DISAGREES
        case.seal(change(body, path, lambda part: dict(list(part.items())[1:])))
        assert run(case) in (DISAGREES, UNUSABLE)
    case.seal({**body, "layers": body["layers"][1:]})
    assert run(case) == DISAGREES


# samples.parquet

FORGED = {
    "shard": lambda value: "test-00001.tar" if value == "test-00000.tar" else "test-00000.tar",
    "key": another,
    "pixels_sha256": another,
    "label": lambda value: (value + 1) % 3,
    **{f"{name}_prediction": lambda value: (value + 1) % 3 for name in COLUMNS},
    **{f"{name}_rival": lambda value: (value + 1) % 3 for name in COLUMNS},
    **{f"{name}_margin": lambda value: value + 1e-2 for name in COLUMNS},
    **{f"{name}_radius": lambda value: value + 1e-2 for name in COLUMNS},
    "sound_margin": lambda value: value + 1e-6,
    "sound_radius": lambda value: value + 1e-6,
}


@pytest.mark.parametrize("column", FORGED)
def test_a_forged_column_is_found(case, capsys, column):
    columns = case.samples()
    assert set(columns) == set(FORGED)
    columns[column][11] = FORGED[column](columns[column][11])
    case.forge(columns)
    assert run(case) == DISAGREES
    assert column in capsys.readouterr().err


@pytest.mark.parametrize("radius", [float("nan"), float("inf"), -1e-9, 1e300])
def test_a_radius_that_is_none_is_found(case, radius):
    columns = case.samples()
    columns["sound_radius"][3] = radius
    case.forge(columns)
    assert run(case) == DISAGREES


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), float("-inf")])
def test_a_margin_that_is_none_is_found(case, margin):
    columns = case.samples()
    columns["sound_margin"][3] = margin
    case.forge(columns)
    assert run(case) == DISAGREES


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(list(range(SAMPLES - 1)), id="dropped"),
        pytest.param([*range(SAMPLES), 5], id="added"),
        pytest.param([0, 0, *range(2, SAMPLES)], id="doubled"),
        pytest.param([1, 0, *range(2, SAMPLES)], id="swapped"),
        pytest.param([], id="none"),
    ],
)
def test_other_rows_are_found(case, rows):
    columns = case.samples()
    forged = {name: [values[i] for i in rows] for name, values in columns.items()}
    case.forge(forged, table=bool(rows))
    body = case.body()
    body["shards"]["samples"] = len(rows)
    case.seal(body)
    assert run(case) in (DISAGREES, UNUSABLE)


def test_a_table_that_does_not_follow_from_the_samples_is_found(case, capsys):
    columns = case.samples()
    row = next(i for i in range(SAMPLES) if columns["label"][i] == columns["sound_prediction"][i])
    columns["sound_radius"][row] += 1e-3
    case.forge(columns, table=False)
    assert run(case) == DISAGREES
    assert "columns.sound" in capsys.readouterr().err


def test_other_columns_and_types_are_refused(case, capsys):
    columns = case.samples()
    case.forge({name: columns[name] for name in columns if name != "sound_rival"})
    assert run(case) == UNUSABLE
    assert "sound_rival" in capsys.readouterr().err
    for name, values in (
        ("sound_radius", [str(value) for value in columns["sound_radius"]]),
        ("sound_rival", [float(value) for value in columns["sound_rival"]]),
        ("sound_margin", [None, *columns["sound_margin"][1:]]),
        ("key", list(range(SAMPLES))),
    ):
        case.forge({**columns, name: values}, table=False)
        assert run(case) == UNUSABLE
        assert name in capsys.readouterr().err


# Weights, images and labels


@pytest.mark.parametrize("name", ["stem.weight", "blocks.1.M", "blocks.0.b", "blocks.1.p"])
def test_a_changed_weight_is_found(case, capsys, name):
    path = case.model / "weights.safetensors"
    data = path.read_bytes()
    case.rewrite_weight(name)  # with every digest: now it is another model
    assert run(case) == DISAGREES
    constrained = name in ("stem.weight", "blocks.1.M")
    assert ("layers" if constrained else "samples.parquet row") in capsys.readouterr().err
    path.write_bytes(data)
    assert run(case) == DISAGREES
    assert "weights_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["head.weight", "head.bias"])
def test_a_changed_head_is_found(case, name):
    case.rewrite_weight(name)
    assert run(case) == DISAGREES


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_bit_of_the_weights_file_is_found(case, place):
    path = case.model / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert run(case) in (DISAGREES, UNUSABLE)
    case.seal_model()
    assert run(case) in (DISAGREES, UNUSABLE)


def brighter(data: bytes) -> bytes:
    pixels = np.array(Image.open(io.BytesIO(data)))
    pixels[0, 0] ^= 16
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def test_a_changed_image_is_found(case, capsys):
    row = 12
    columns = case.samples()
    shard, key = columns["shard"][row], columns["key"][row]
    case.rewrite_member(shard, f"{key}.png", brighter)
    assert run(case) == DISAGREES
    assert "sha256" in capsys.readouterr().err
    case.seal_shards()
    assert run(case) == DISAGREES
    printed = capsys.readouterr().err
    assert "pixels_sha256" in printed
    columns["pixels_sha256"][row] = printed.split("derived '")[1].split("'")[0]
    case.forge(columns)
    assert run(case) == DISAGREES
    assert f"samples.parquet row {row}" in capsys.readouterr().err


def test_a_changed_label_is_found_on_either_side(case, capsys):
    row = 12
    columns = case.samples()
    shard, key = columns["shard"][row], columns["key"][row]
    table = pq.read_table(case.shards / "index.parquet")
    labels = table["label"].to_pylist()
    place = table["key"].to_pylist().index(key)
    labels[place] = columns["label"][row] = (labels[place] + 1) % 3
    case.rewrite_rows(label=labels)
    assert run(case) == DISAGREES
    case.seal_shards()
    assert run(case) == DISAGREES
    case.forge(columns)
    capsys.readouterr()
    assert run(case) == DISAGREES  # by the .cls member
    assert f"row {row}" in capsys.readouterr().err
    case.rewrite_member(shard, f"{key}.cls", lambda _: b"%d" % columns["label"][row])
    case.seal_shards()
    assert run(case) == CONFIRMED  # consistent everywhere: another data set, with another digest


def test_a_label_in_the_tar_alone_is_found(case, capsys):
    columns = case.samples()
    shard, key = columns["shard"][0], columns["key"][0]
    case.rewrite_member(shard, f"{key}.cls", lambda body: b"%d" % ((int(body) + 1) % 3))
    case.seal_shards()
    assert run(case) == DISAGREES
    assert "label" in capsys.readouterr().err


def test_another_index_or_split_is_found(case):
    body = case.body()
    for split in ("train", "fit", "validation"):
        case.seal(change(body, ("shards", "split"), lambda _, split=split: split))
        assert run(case) == DISAGREES
    case.seal(body)
    keys = pq.read_table(case.shards / "index.parquet")["key"].to_pylist()
    case.rewrite_rows(key=[keys[-2] if key == keys[-1] else key for key in keys])
    case.seal_shards()
    assert run(case) == DISAGREES
    case.rewrite_rows(key=keys, shard=[99] * len(keys))
    case.seal_shards()
    assert run(case) in (DISAGREES, UNUSABLE)


# Independence


def test_the_verifier_imports_nothing_of_the_project_and_no_torch():
    packages = (
        "pipeline",
        "model",
        "optim",
        "data_shards",
        "jobs",
        "torch",
        "pydantic",
        "tyro",
    )
    code = (
        "import sys, json, model.verify\n"
        f"loaded = [m for m in sys.modules if m.split('.')[0] in {packages}]\n"
        "print(json.dumps(sorted(loaded)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    outside = {name for name in loaded if not name.startswith("model.verifier")}
    assert outside == {"model", "model.verify"}


def test_the_command_runs(case):
    done = subprocess.run(
        [sys.executable, "-m", "model.verify", *case.arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (CONFIRMED, "")
    assert done.stdout.startswith("OK")


def test_the_ratio_of_eps_is_exact():
    eps = Fraction(36, 255)
    nearest = float(eps)
    above, below = np.nextafter(nearest, 1), np.nextafter(nearest, 0)
    radii = np.array([below, nearest, above])
    assert count_greater(radii, eps) == sum(Fraction(radius) > eps for radius in radii)


def test_a_long_verification_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress("samples", 100)
    progress.add(5)
    now[0] = 20.0
    progress.add(20)
    progress.add(75)
    assert capsys.readouterr().err == "samples: 25 of 100, left 1:00\n"
