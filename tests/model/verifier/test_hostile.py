"""Inputs of the verifier that an adversary wrote: one clear line, never a traceback."""

import hashlib
import io
import shutil
from typing import Any

import pytest
from PIL import Image

from model.verifier.certificate import FIELDS
from tests.model.certificate_maker import CERTIFICATE, DISAGREES, UNUSABLE, Case, change, run

pytestmark = pytest.mark.integration

HOSTILE = (None, True, -1, 10**400, 1e308, 0.5, "", "x" * 300, [], [[[]]], {}, {"a": None})


def refused(case: Case, capsys) -> str:
    status = run(case)
    printed = capsys.readouterr()
    assert status in (DISAGREES, UNUSABLE)
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 1000
    return printed.err


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", "\x00\xff", '{"schema": NaN}', '{"a": 1, "a": 2}', "1e999",
        '{"a": 1e999}', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"digest": 1}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [CERTIFICATE, "model/artifact.json", "shards/index.json"])
def test_what_is_no_object_is_refused(case, capsys, name, text):
    (case.root / name).write_bytes(text.encode("latin-1"))
    refused(case, capsys)


@pytest.mark.parametrize("field", sorted(FIELDS - {"digest", "code_version", "observed_lipschitz"}))
def test_hostile_values_in_the_certificate_are_refused(case, capsys, field):
    body = case.body()
    inner = body[field] if isinstance(body[field], dict) else {}
    for path in [(field,), *((field, key) for key in inner)]:
        for value in HOSTILE:
            case.seal(change(body, path, lambda _, value=value: value))
            refused(case, capsys)


@pytest.mark.parametrize("name", ["model/artifact.json", "shards/index.json"])
def test_hostile_values_in_other_descriptions_are_refused_or_unused(case, capsys, name):
    stored, certificate = case.json(name), case.body()
    unused = {"context", "orthogonality_residuals", "largest_residual", "weights_bytes"}
    unused |= {"class_names", "generator", "splits", "train_shape", "name"}
    nested: list[tuple[Any, ...]] = [("network", key) for key in stored.get("network", {})]
    if "shards" in stored:
        nested += [("shards", -1), ("shards", -1, "file"), ("shards", -1, "sha256")]
    for path in [(key,) for key in stored if key not in unused] + nested:
        for value in HOSTILE:
            body = change(stored, path, lambda _, value=value: value)
            if body == stored:
                continue
            case.put(name, body, seal=name.startswith("shards") and "digest" not in path)
            if path[0] == "network":
                case.seal_model()
            elif name.startswith("shards"):
                certificate["shards"]["index_digest"] = body["digest"]
                case.seal(certificate)
            refused(case, capsys)


@pytest.mark.parametrize("field", ["kind", "head", "gain"])
def test_other_networks_are_refused_by_name(case, capsys, field):
    info = case.json("model/artifact.json")
    info["network"][field] = "sandwich"
    case.put("model/artifact.json", info, seal=False)
    assert ("gain" if field == "gain" else "sandwich") in refused(case, capsys)
    assert run(case) == UNUSABLE


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:-1], id="cut"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda data: b"\xff" * 8 + data[8:], id="long-header"),
        pytest.param(lambda data: data.replace(b'"F32"', b'"F16"', 1), id="type"),
        pytest.param(lambda data: data.replace(b"[8,8]", b"[9,9]", 1), id="shape"),
        pytest.param(lambda data: data.replace(b"stem.weight", b"stem.heavie", 1), id="name"),
        pytest.param(lambda data: data.replace(b'offsets":[0', b'offsets":[4', 1), id="place"),
        pytest.param(lambda data: data[:-4] + b"\0\0\xc0\x7f", id="nan"),
    ],
)
def test_a_damaged_weights_file_is_refused(case, capsys, damage):
    path = case.model / "weights.safetensors"
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    refused(case, capsys)


@pytest.mark.parametrize("name", ["certificate/samples.parquet", "shards/index.parquet"])
def test_damaged_tables_are_refused(case, capsys, name):
    data = (case.root / name).read_bytes()
    for damaged in (b"", b"PAR1", data[: len(data) // 2], data[:100] + bytes(50) + data[150:]):
        (case.root / name).write_bytes(damaged)
        body = case.body()
        body["samples_sha256"] = hashlib.sha256(damaged).hexdigest()
        case.seal(body)
        if name.startswith("shards"):
            case.seal_shards()
        refused(case, capsys)


@pytest.mark.parametrize(
    "change_body",
    [
        pytest.param(lambda body: b"", id="empty"),
        pytest.param(lambda body: body[:40], id="cut"),
        pytest.param(lambda body: body[:16] + b"\0\1\0\0\0\1\0\0" + body[24:], id="huge"),
        pytest.param(lambda body: b"GIF89a" + body[6:], id="other-format"),
    ],
)
def test_damaged_images_are_refused(case, capsys, change_body):
    columns = case.samples()
    case.rewrite_member(columns["shard"][0], f"{columns['key'][0]}.png", change_body)
    case.seal_shards()
    refused(case, capsys)


def test_an_image_of_another_shape_is_refused(case, capsys):
    columns = case.samples()

    def larger(_: bytes) -> bytes:
        out = io.BytesIO()
        Image.new("L", (9000, 9000)).save(out, format="PNG")
        return out.getvalue()

    case.rewrite_member(columns["shard"][0], f"{columns['key'][0]}.png", larger)
    case.seal_shards()
    assert "9000" in refused(case, capsys)


@pytest.mark.parametrize("label", [b"", b"-1", b"1e3", b"9" * 400, b"0x1", "½".encode()])
def test_a_label_that_is_no_class_is_refused(case, capsys, label):
    columns = case.samples()
    case.rewrite_member(columns["shard"][0], f"{columns['key'][0]}.cls", lambda _: label)
    case.seal_shards()
    refused(case, capsys)


def test_a_damaged_or_ambiguous_tar_is_refused(case, capsys):
    path = case.shards / case.samples()["shard"][0]
    data = path.read_bytes()
    doubled = data[:1024] + data
    for damaged in (b"", data[:700], bytes(len(data)), b"x" * len(data), doubled):
        path.write_bytes(damaged)
        case.seal_shards()
        refused(case, capsys)


@pytest.mark.parametrize("folder", ["certificate", "model", "shards"])
def test_missing_folders_are_named(case, capsys, folder):
    shutil.rmtree(case.root / folder)
    assert folder in refused(case, capsys)


def test_a_shard_outside_of_the_folder_is_not_opened(case, capsys):
    header = case.json("shards/index.json")
    header["shards"][-1]["file"] = "../test-00000.tar"
    case.put("shards/index.json", header)
    body = case.body()
    body["shards"]["index_digest"] = case.json("shards/index.json")["digest"]
    case.seal(body)
    assert "no name of a shard" in refused(case, capsys)
