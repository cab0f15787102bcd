import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.errors import EvaluationError
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.sample_records import (
    ColumnRecords,
    ShardRecords,
    column_of,
    labels_of,
    merge,
    per_class_scores,
    samples_parquet,
    scores,
)
from model.certification.eps import eps_value


def part(shard, keys, label, prediction, radius):
    zeros = np.zeros(len(keys))
    column = ColumnRecords(
        prediction=np.array(prediction),
        rival=np.array(label),
        margin=zeros + 1,
        radius=np.array(radius, dtype=np.float64),
        error=zeros + 1e-9,
        error_ball=zeros + 2e-9,
    )
    digests = tuple("0" * 64 for _ in keys)
    return ShardRecords(shard, tuple(keys), digests, np.array(label), {"sound": column}, 1.0, 1.4)


A = part("a.tar", ["0", "1"], [0, 1], [0, 1], [0.5, 0.1])
B = part("b.tar", ["2", "3"], [0, 1], [1, 1], [2.0, 1.25])
EXPECTED = {"a.tar": ["0", "1"], "b.tar": ["2", "3"]}


def test_merge_puts_shards_in_index_order():
    assert [found.shard for found in merge([B, A], EXPECTED)] == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([A], "b.tar was not evaluated"),
        ([A, B, A], "a.tar was evaluated twice"),
        ([A, B, part("c.tar", ["4"], [0], [0], [0])], "c.tar"),
        ([A, part("b.tar", ["2"], [0], [0], [0])], "b.tar: 1 samples"),
        ([A, part("b.tar", ["2", "2"], [0, 0], [0, 0], [0, 0])], "1 different"),
        ([A, part("b.tar", ["3", "2"], [0, 0], [0, 0], [0, 0])], "b.tar"),
    ],
)
def test_merge_refuses_anything_but_each_sample_once(parts, message):
    with pytest.raises(EvaluationError, match=message):
        merge(parts, EXPECTED)


def scored(parts, eps=("36/255", "255/255", "1/2")):
    facts = {"program": "float64", "lipschitz": 1.5, "unit_roundoff": 2.0**-53}
    return scores(column_of(parts, "sound"), labels_of(parts), eps, **facts)


def test_scores_by_hand():
    found = scored([A, B])
    assert (found.program, found.lipschitz, found.unit_roundoff) == ("float64", 1.5, 2.0**-53)
    assert found.clean == 0.75
    # 0.5 is not beyond 1/2, and the wrong prediction's radius of 2 never counts.
    assert found.certified == {"36/255": 2, "255/255": 1, "1/2": 1}
    assert found.cra == {"36/255": 0.5, "255/255": 0.25, "1/2": 0.25}
    assert found.mean_radius == (0.5 + 0.1 + 0 + 1.25) / 4
    assert (found.largest_error, found.largest_error_ball) == (1e-9, 2e-9)
    assert not found.vacuous
    curve = dict(found.curve)
    assert (min(curve), max(curve)) == (0.0, 1.5)
    assert [curve[at] for at in (0.0, 0.2, 1.2, 1.3, 1.5)] == [0.75, 0.5, 0.25, 0.0, 0.0]


def test_a_column_without_any_radius_is_vacuous():
    found = scored([part("a.tar", ["0", "1"], [0, 1], [0, 1], [0.0, 0.0])])
    assert found.vacuous
    assert found.cra["36/255"] == 0.0


def test_an_infinite_error_is_none():
    one = part("a.tar", ["0"], [0], [0], [0.0])
    one.columns["sound"].error_ball[0] = np.inf
    assert scored([one]).largest_error_ball is None


def test_per_class_scores_leave_out_empty_classes():
    found = per_class_scores(
        column_of([A, B], "sound"), labels_of([A, B]), ["36/255", "255/255", "1/2"], 3
    )
    assert found == (
        {"label": 0, "samples": 2, "clean": 0.5, "36/255": 0.5, "255/255": 0.0, "1/2": 0.0},
        {"label": 1, "samples": 2, "clean": 1.0, "36/255": 0.5, "255/255": 0.5, "1/2": 0.5},
    )


def test_classes_that_a_certificate_states_and_no_sample_has_cost_nothing():
    column, label = A.columns["sound"], A.label
    few = per_class_scores(column, label, ["36/255"], 2)
    assert [row["label"] for row in few] == [0, 1]
    assert per_class_scores(column, label, ["36/255"], 10**9) == few
    assert per_class_scores(column, label, ["36/255"], 1) == few[:1]


def test_samples_parquet_has_one_row_per_sample():
    table = pq.read_table(io.BytesIO(samples_parquet([A, B])))
    assert table.column_names == [
        "shard", "key", "pixels_sha256", "label",
        "sound_prediction", "sound_rival", "sound_margin", "sound_radius",
    ]  # fmt: skip
    assert table["shard"].to_pylist() == ["a.tar", "a.tar", "b.tar", "b.tar"]
    assert table["key"].to_pylist() == ["0", "1", "2", "3"]
    assert table["sound_radius"].to_pylist() == [0.5, 0.1, 2.0, 1.25]


def test_usual_radii_belong_to_the_norm():
    config = EvaluationConfig(artifact="a")
    assert config.for_norm("l2").eps == ("36/255", "72/255", "108/255", "255/255")
    assert config.for_norm("linf").eps == ("2/255", "8/255", "16/255", "25/255")
    assert EvaluationConfig(artifact="a", eps=("1/9",)).for_norm("linf").eps == ("1/9",)


def test_the_curve_has_a_grid_that_fits_the_norm():
    column = column_of([A], "sound")
    facts = {"program": "float64", "lipschitz": 1.0, "unit_roundoff": 0.0}
    found = scores(column, labels_of([A]), ("1/255",), norm="linf", **facts)
    assert [eps for eps, _ in found.curve[:3]] == [0, 0.5 / 255, 1 / 255]
    assert found.curve[-1][0] == 0.5


def test_eps_value():
    assert eps_value("36/255") == 36 / 255


@pytest.mark.parametrize("eps", [("0.5",), ("0/255",), ("1/0",), ("-1/2",), ("1/2", "1/2")])
def test_config_refuses_eps_that_are_not_different_positive_ratios(eps):
    with pytest.raises(ValueError, match="eps"):
        EvaluationConfig(artifact="a", eps=eps)
