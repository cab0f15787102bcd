import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.sources.base import encode_png
from jobs.errors import EvaluationError
from jobs.predict import FIELDS, PredictConfig, main, predict
from jobs.prediction.image_files import find_pictures, prepare
from jobs.prediction.predictor import CertifiedModel, SoundPredictor, artifact_url
from model.certification.matrix_bounds import matrix_bound
from tests.jobs.conftest import NETWORK, export

pytestmark = pytest.mark.integration

SHAPE = NETWORK.input_shape


def image_of(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image):
    return encode_png(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


@pytest.fixture
def folder(tmp_path):
    """Five images of the network's shape, one below another folder, and a text."""
    for seed in range(5):
        place = tmp_path / "images" / ("deep" if seed == 4 else ".")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{seed}.png").write_bytes(png(image_of(seed)))
    (tmp_path / "images" / "notes.txt").write_text("text")
    return tmp_path / "images"


def rows_of(artifact, *inputs, **options):
    rows = []
    config = PredictConfig(model=artifact, inputs=tuple(map(str, inputs)), **options)
    count = predict(config, rows.append)
    assert count.images == len(rows)
    return rows, count


def test_rows_agree_with_the_network_and_its_certificate(artifact, network, folder):
    rows, count = rows_of(artifact, folder, batch_size=2, eps="1/255")
    assert [row["path"] for row in rows] == [
        str(folder / name) for name in ("0.png", "1.png", "2.png", "3.png", "deep/4.png")
    ]
    assert (count.others, count.failed) == ((str(folder / "notes.txt"),), 0)
    pixels = torch.from_numpy(np.stack([image_of(seed) for seed in range(5)]))
    with torch.no_grad():
        logits = network(pixels / 255)
    assert [row["label"] for row in rows] == logits.argmax(1).tolist()
    sound = SoundPredictor(artifact).predict(pixels).radius.tolist()
    assert [row["radius"] for row in rows] == pytest.approx(sound, rel=1e-9)
    for row in rows:
        assert row["certified"] == (row["radius"] > 1 / 255)
        assert (row["norm"], row["eps"], row["resize"]) == ("l2", "1/255", "none")
    assert count.certified == sum(row["certified"] for row in rows)


def test_no_perturbation_within_the_radius_changes_the_class(artifact, folder):
    predictor = SoundPredictor(artifact)
    pixels = torch.from_numpy(np.stack([image_of(seed) for seed in range(5)]))
    found = predictor.predict(pixels)
    assert (found.radius > 0).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        lengths = noise.flatten(1).norm(dim=1)
        scale = 0.999 * found.radius / lengths
        moved = pixels.double() / 255 + scale[:, None, None, None] * noise
        assert torch.equal(predictor._sound.network(moved).argmax(1), found.prediction)


def test_bounds_of_other_weights_are_refused(artifact):
    other = [matrix_bound(torch.eye(16), "stem.weight")]
    with pytest.raises(EvaluationError, match="is not the matrix bounded"):
        SoundPredictor(artifact, matrices=other)


def test_another_shape_is_refused_unless_resize_is_given_and_then_stated(artifact, tmp_path):
    for name, shape in {"large": (3, 20, 30), "small": (3, 4, 4), "grey": (1, 8, 8)}.items():
        (tmp_path / f"{name}.png").write_bytes(png(image_of(1, shape)))
    rows, count = rows_of(artifact, tmp_path)
    assert count.failed == 3
    for row in rows:
        assert "--resize does it and says so" in row["error"]
        assert row["radius"] is row["certified"] is None
    rows, count = rows_of(artifact, tmp_path, resize=True)
    assert count.failed == 0
    stated = {row["path"].rpartition("/")[2]: row["resize"] for row in rows}
    assert stated["grey.png"] == (
        "8x8x1 to 8x8x3: grey copied to 3 channels; the radius is of its pixels"
    )
    assert "30x20x3 to 8x8x3: resized to short side 9, bilinear" in stated["large.png"]
    assert "4x4x3 to 8x8x3: enlarged to short side 9, bilinear" in stated["small.png"]


def test_the_pixels_of_a_resized_image_are_those_of_a_test_set():
    image = image_of(2, (3, 20, 30))
    found = prepare(png(image), (3, 8, 8), resize=True)
    whole = Image.fromarray(image.transpose(1, 2, 0)).resize((13, 9), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((2, 0, 10, 8))).transpose(2, 0, 1)
    assert torch.equal(found.pixels, torch.from_numpy(expected.copy()))


def test_colour_never_becomes_grey():
    with pytest.raises(EvaluationError, match="in colour; the network takes grey ones only"):
        prepare(png(image_of(0)), (1, 8, 8), resize=True)


def test_three_equal_channels_are_grey_with_resize_and_said(tmp_path):
    grey = image_of(0, (1, 8, 8))
    for mode in ("RGB", "RGBA"):
        file = io.BytesIO()
        Image.fromarray(grey[0]).convert(mode).save(file, "PNG")
        with pytest.raises(EvaluationError, match=r"--resize does it"):
            prepare(file.getvalue(), (1, 8, 8), resize=False)
        found = prepare(file.getvalue(), (1, 8, 8), resize=True)
        assert np.array_equal(found.pixels.numpy(), grey)
        assert found.resize == (
            "8x8x3 to 8x8x1: one of 3 equal channels taken; the radius is of its pixels"
        )


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_other_formats_of_one_image_are_read(artifact, tmp_path, kind):
    image = Image.fromarray(image_of(3).transpose(1, 2, 0)).quantize(200)
    image.convert("RGB").save(tmp_path / "a.png")
    image.save(tmp_path / f"a.{kind.lower()}", kind)
    rows, count = rows_of(artifact, tmp_path)
    assert count.failed == 0
    assert len(rows) == 2
    assert rows[0]["radius"] == rows[1]["radius"]


def test_a_run_is_its_artifact_that_was_evaluated_on_test_else_its_newest(tmp_path, folder):
    run = tmp_path / "run"
    for step in (10, 20, 30):
        export(run / f"artifacts/step-{step:08d}")
    (run / "artifacts/step-00000040.bak").mkdir()
    assert artifact_url(str(run)).endswith("run/artifacts/step-00000030")
    result = run / "artifacts/step-00000020/evaluation/test/summary.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    artifact = artifact_url(str(run))
    assert artifact.endswith("run/artifacts/step-00000020")
    assert artifact_url(artifact) == artifact
    assert len(rows_of(str(run), folder)[0]) == 5


def test_rows_name_the_class(tmp_path, folder):
    names = ("cat", "hot dog", "snow leopard", "fox")
    named = export(tmp_path / "named", class_names=names)
    rows, _ = rows_of(named, folder)
    assert [row["class"] for row in rows] == [names[row["label"]] for row in rows]
    answer = CertifiedModel(
        artifact_url=named, artifact_digest=SoundPredictor(named).info.digest, eps="1/255"
    ).predict(np.stack([image_of(seed) for seed in range(5)]))
    assert answer["class"] == [row["class"] for row in rows]


def test_a_damaged_file_has_a_row_with_its_error(artifact, folder):
    (folder / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    rows, count = rows_of(artifact, folder)
    assert count.failed == 1
    assert [row["error"] is None for row in rows] == [True, True, False, True, True]
    assert "damaged PNG" in rows[2]["error"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [(["nowhere"], "neither a folder of images"), (["no.png"], r"no file no\.png")],
)
def test_inputs_that_are_not_there_are_refused(monkeypatch, tmp_path, inputs, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match=message):
        find_pictures(inputs)


def test_a_store_that_is_not_there_is_refused_and_not_made(folder, tmp_path, capsys):
    store = tmp_path / "mlflow.db"
    words = ["models:/digits@champion", str(folder), "--tracking.uri", f"sqlite:///{store}"]
    assert main(words) == 2
    assert f"there is no MLflow store {store}" in capsys.readouterr().err
    assert not store.exists()


def test_the_entry_writes_json_lines_and_csv(artifact, folder, tmp_path, capsys):
    assert main([artifact, str(folder)]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [tuple(row) for row in rows] == [FIELDS] * 5
    assert "5 images" in captured.err
    assert f"no images by their names: 1, {folder}/notes.txt" in captured.err
    out = tmp_path / "rows.csv"
    assert main([artifact, str(folder), "--out", str(out)]) == 0
    table = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [float(row["radius"]) for row in table] == [row["radius"] for row in rows]
    (folder / "damaged.webp").write_bytes(b"RIFF")
    assert main([artifact, str(folder)]) == 1
    assert main([artifact, "nowhere"]) == 2
    assert main(["nowhere", str(folder)]) == 2
    assert main([artifact, str(folder), "--eps", "0.1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_batches_on_ray_give_the_same_rows(artifact, folder, local_ray):
    rows, _ = rows_of(artifact, folder, batch_size=2)
    assert rows_of(artifact, folder, batch_size=2, launcher="ray")[0] == rows


def test_a_huge_file_costs_its_own_row_alone(artifact, folder, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    with (whole / "huge.png").open("wb") as file:
        file.truncate(20 << 30)  # sparse: 20 GiB of nothing
    os.mkfifo(whole / "pipe.png")
    before, _ = rows_of(artifact, folder)
    rows, _ = rows_of(artifact, whole)
    errors = [row["error"] for row in rows if row["path"].endswith("huge.png")]
    assert len(errors) == 1
    assert "huge.png has 21,474,836,480 bytes, the limit is 268,435,456" in errors[0]
    errors = [row["error"] for row in rows if row["path"].endswith("pipe.png")]
    assert len(errors) == 1
    assert "is a device or a pipe" in errors[0]
    assert [row["radius"] for row in rows if row["error"] is None] == [
        row["radius"] for row in before
    ]


@pytest.mark.parametrize("form", ["rows.csv", "-"])
def test_a_name_that_is_no_text_ends_no_table(artifact, folder, tmp_path, capfd, form):
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"\x89PNG")
    out = form if form == "-" else str(tmp_path / form)
    assert main([artifact, str(folder), "--out", out, "--format", "csv"]) == 1
    said = capfd.readouterr().out
    text = said if form == "-" else (tmp_path / form).read_text()
    assert len(list(csv.DictReader(io.StringIO(text)))) == 6
    assert r"\udcff.png" in text
