import json
import os
from pathlib import Path

import pytest

from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from jobs.evaluation.executor import TaskLostError, map_shards

pytestmark = pytest.mark.ray


def files(fields):
    store = Store(fields["out"])
    summary = json.loads(store.read("summary.json"))
    del summary["out_url"]
    return summary, store.read("samples.parquet")


@pytest.fixture
def dies_first():
    """A task function that kills its worker at the first call for an item."""

    def run(item):  # local, so that Ray sends it by value: workers cannot import tests
        folder, number = item
        marker = Path(folder, str(number))
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return number

    return run


def test_the_result_is_the_same_for_every_number_of_tasks(fields, local_ray, tmp_path):
    evaluate(fields)
    expected = files(fields)
    for tasks in (1, 2):
        changes = {"launcher": "ray", "max_in_flight": tasks, "out": str(tmp_path / str(tasks))}
        evaluate(fields | changes)
        assert files(fields | changes) == expected
    assert local_ray.is_initialized()


def test_errors_of_tasks_keep_their_type(fields, local_ray, artifact, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("artifact.json", "weights.safetensors"):
        (changed / name).write_bytes(Store(artifact).read(name))
    with (changed / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(ValueError, match="sha256"):
        evaluate(fields | {"artifact": str(changed), "launcher": "ray"})


def test_results_come_in_order_and_lost_tasks_are_repeated(local_ray, dies_first, tmp_path):
    calls = []
    items = [(str(tmp_path), number) for number in range(3)]
    found = map_shards(dies_first, items, max_in_flight=2, max_retries=1, on_done=calls.append)
    assert found == [0, 1, 2]
    assert sorted(calls) == found


def test_a_task_that_is_lost_too_often_is_an_error(local_ray, dies_first, tmp_path):
    with pytest.raises(TaskLostError, match="task 0 lost its worker 1 times"):
        map_shards(dies_first, [(str(tmp_path), 0)], max_in_flight=2, max_retries=0)
