import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.config import EvaluationConfig, eps_value
from jobs.records import EvaluationError, ShardRecords, merge, samples_parquet, scores


def part(shard, keys, label, prediction, radius):
    zeros = np.zeros(len(keys), dtype=np.float32)
    return ShardRecords(
        shard,
        tuple(keys),
        np.array(label),
        np.array(prediction),
        np.array(label),
        zeros,
        np.array(radius, dtype=np.float32),
    )


A = part("a.tar", ["0", "1"], [0, 1], [0, 1], [0.5, 0.1])
B = part("b.tar", ["2", "3"], [0, 1], [1, 1], [2.0, 1.25])
EXPECTED = {"a.tar": ["0", "1"], "b.tar": ["2", "3"]}


def test_merge_puts_shards_in_index_order():
    assert merge([B, A], EXPECTED) == [A, B]


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


def test_scores_by_hand():
    found = scores([A, B], ["36/255", "255/255", "1/2"], num_classes=3)
    assert found["samples"] == 4
    assert found["clean"] == 0.75
    # 0.5 is not beyond 1/2, and the wrong prediction's radius of 2 never counts.
    assert found["cra"] == {"36/255": 0.5, "255/255": 0.25, "1/2": 0.25}
    assert found["mean_radius"] == pytest.approx((0.5 + 0.1 + 0 + 1.25) / 4)
    curve = dict(found["curve"])
    assert (min(curve), max(curve)) == (0.0, 1.5)
    assert [curve[at] for at in (0.0, 0.2, 1.2, 1.3, 1.5)] == [0.75, 0.5, 0.25, 0.0, 0.0]
    assert found["per_class"] == (
        {"label": 0, "samples": 2, "clean": 0.5, "36/255": 0.5, "255/255": 0.0, "1/2": 0.0},
        {"label": 1, "samples": 2, "clean": 1.0, "36/255": 0.5, "255/255": 0.5, "1/2": 0.5},
    )


def test_samples_parquet_has_one_row_per_sample():
    table = pq.read_table(io.BytesIO(samples_parquet([A, B])))
    assert table.column_names == [
        "shard", "key", "label", "prediction", "rival", "margin", "radius",
    ]  # fmt: skip
    assert table["shard"].to_pylist() == ["a.tar", "a.tar", "b.tar", "b.tar"]
    assert table["key"].to_pylist() == ["0", "1", "2", "3"]
    assert table["radius"].to_pylist() == [0.5, np.float32(0.1), 2.0, 1.25]


def test_eps_value():
    assert eps_value("36/255") == 36 / 255


@pytest.mark.parametrize("eps", [(), ("0.5",), ("0/255",), ("1/0",), ("-1/2",), ("1/2", "1/2")])
def test_config_refuses_eps_that_are_not_different_positive_ratios(eps):
    with pytest.raises(ValueError, match="eps"):
        EvaluationConfig(artifact="a", eps=eps)
