"""Class names, confusions and the picture of the closest images, of one evaluation."""

import dataclasses
import io

import matplotlib.image
import numpy as np
import pytest
import torch

from data_shards.format.index import load_index
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from data_shards.untrusted.terminal import PlainConsole
from jobs.evaluate_cra import evaluate
from jobs.evaluation.image_strip import SHOWN, StripImage, closest_images, strip_png
from jobs.evaluation.sample_records import (
    COLUMNS,
    ColumnRecords,
    EvaluationError,
    ShardRecords,
    confusions,
)
from jobs.evaluation.stored_result import read_result
from jobs.reporting.classes import confusion_table, frequent_confusions, worst_classes
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
    records = [
        ShardRecords(
            shard=shard.file, key=tuple(batch.keys), pixels_sha256=(), label=label,
            columns=dict.fromkeys(COLUMNS, column(label, radius)), observed_lipschitz=0,
            largest_factor=1,
        )
        for shard, batch, label, radius in zip(tests, batches, labels, radii, strict=True)
    ]  # fmt: skip
    images = closest_images(index, "test", records, ("a", "b", "c", "d"))
    radius, label = np.concatenate(radii), np.concatenate(labels)
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
