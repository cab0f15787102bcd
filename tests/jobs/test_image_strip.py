"""Class names, confusions and the picture of the closest images, of one evaluation."""

import dataclasses
import io
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch

from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from data_shards.untrusted.terminal import PlainConsole
from jobs.errors import EvaluationError
from jobs.evaluate_cra import evaluate
from jobs.evaluation import figures
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.image_strip import SHOWN, StripImage, closest_images, strip_png
from jobs.evaluation.runner import compute
from jobs.evaluation.sample_records import (
    ColumnRecords,
    confusions,
)
from jobs.evaluation.stored_result import read_result
from jobs.reporting.per_class import confusion_table, frequent_confusions, worst_classes
from pipeline.run.evaluation_summary import EvaluationSummary, report
from tests.jobs.conftest import plain_fields

pytestmark = pytest.mark.integration

RNG = np.random.default_rng(0)


def column(prediction, radius):
    zero = np.zeros(len(radius))
    return ColumnRecords(
        prediction=np.asarray(prediction), rival=np.asarray(prediction), margin=zero,
        radius=np.asarray(radius), error=zero, error_ball=zero,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, artifact, drawn_figures):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return out, evaluate(plain_fields(artifact, out))


def test_an_evaluation_names_the_classes_and_counts_what_is_taken_for_what(evaluated, shards):
    out, summary = evaluated
    assert summary.class_names == load_index(shards).header.class_names
    wrong = round((1 - summary.columns["sound"].clean) * summary.samples)
    assert sum(count for *_, count in summary.confusions) == wrong > 0
    assert matplotlib.image.imread(out / "closest.png").shape[1] == 1120
    text = io.StringIO()
    report(PlainConsole(file=text, width=200), [summary])
    label, said, count = summary.confusions[0]
    names = summary.class_names
    assert f"{names[label]} as {names[said]} {count}x" in text.getvalue()
    assert "closest.png" in text.getvalue()


def test_pictures_that_are_gone_are_drawn_again_and_no_others(evaluated, artifact, monkeypatch):
    out, _ = evaluated
    before = (out / "closest.png").read_bytes()
    (out / "closest.png").unlink()
    monkeypatch.setattr(figures, "cra_png", lambda _: pytest.fail("that one is there"))
    evaluate(plain_fields(artifact, out))
    assert (out / "closest.png").read_bytes() == before


def test_a_new_result_does_not_keep_the_pictures_of_an_old_one(evaluated, artifact, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "out")
    config = EvaluationConfig(**{**plain_fields(artifact, tmp_path / "out"), "eps": ("2/255",)})
    compute(config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "certificate.json", "samples.parquet", "summary.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"confusions": ((0, 1, 1000),)},
        {"confusions": ((0, 9, 1),)},
        {"confusions": ()},
        {"class_names": ("one",)},
    ],
)
def test_a_summary_with_other_confusions_or_names_is_refused(evaluated, tmp_path, change):
    out, summary = evaluated
    for name in ("certificate.json", "samples.parquet"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    (tmp_path / "summary.json").write_bytes(dataclasses.replace(summary, **change).to_json())
    with pytest.raises(EvaluationError, match=r"confusions|names 1 classes of 4"):
        read_result(Store(str(tmp_path)))


def test_the_strip_holds_the_samples_of_the_smallest_radii(shards):
    index = load_index(shards)
    tests = index.shards_of("test")
    batches = [next(iter(read_shard(index, shard, 100))) for shard in tests]
    labels = [batch.labels.numpy() for batch in batches]
    radii = [RNG.permutation(len(batch.keys)) / 100 for batch in batches]
    radius, label = np.concatenate(radii), np.concatenate(labels)
    images = closest_images(index, "test", column(label, radius), label, ("a", "b", "c", "d"))
    pixels = torch.cat([batch.images for batch in batches])
    order = np.argsort(radius, kind="stable")[:SHOWN]
    assert len(images) == min(SHOWN, len(radius))
    for image, at in zip(images, order, strict=True):
        assert (image.radius, image.label) == (radius[at], "abcd"[label[at]])
        assert torch.equal(image.pixels, pixels[at])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_strip_draws_grey_and_colour_and_any_name(channels):
    pixels = torch.from_numpy(RNG.integers(0, 256, (channels, 9, 9), dtype=np.uint8))
    images = [StripImage(pixels, "$a_{b$", "hot dog " * 9, 0.1)] * 3
    png = strip_png(images, norm="l2", title="photos")
    assert matplotlib.image.imread(io.BytesIO(png)).shape[1] == 1120


def test_confusions_are_counted_the_most_frequent_first():
    label = np.array([0, 0, 0, 1, 2, 2])
    found = confusions(column([1, 1, 0, 1, 0, 2], np.zeros(6)), label)
    assert found == ((0, 1, 2), (2, 0, 1))
    assert confusions(column(label, np.zeros(6)), label) == ()


def named(summary: EvaluationSummary, classes: int) -> EvaluationSummary:
    rows = [
        {"label": i, "samples": 4, "clean": 0.75, "36/255": 0.5 - i / 100} for i in range(classes)
    ]
    return dataclasses.replace(
        summary,
        class_names=tuple(f"name {i}" for i in range(classes)),
        per_class=tuple(rows),
        confusions=tuple((i, (i + 1) % classes, 1) for i in range(classes)),
    )


def test_the_table_of_a_report_has_names_and_adds_up(evaluated):
    summary = named(evaluated[1], 3)
    table = confusion_table(summary)
    assert [row.name for row in table] == ["name 0", "name 1", "name 2"]
    assert [row.counts for row in table] == [(3, 1, 0), (0, 3, 1), (1, 0, 3)]
    assert frequent_confusions(summary)[0] == ("name 0", "name 1", 1)
    assert worst_classes(summary, ["36/255"])[1].shares == (0.75, 0.49)


def test_many_classes_are_listed_and_not_tabled(evaluated):
    summary = named(evaluated[1], 30)
    assert confusion_table(summary) == []
    worst = worst_classes(summary, ["36/255"])
    assert len(worst) == 20
    assert worst[0].name == "name 10"  # those of the lowest share, in the order of the classes
