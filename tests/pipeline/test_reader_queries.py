"""How often an MLflow store is asked: not once more for every run, version or evaluation."""

import pytest

from benchmarks.growth import Records
from pipeline.tracking.checkpoint_query import CheckpointQuery
from pipeline.tracking.reader import Reader
from tests.mlflow_database import empty_database


class Counting:
    """A client that counts its calls."""

    def __init__(self, client):
        self._client, self.calls = client, 0

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls += 1
            return getattr(self._client, name)(*arguments, **options)

        return call


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """A store of three runs, each with a checkpoint, a registered version and an evaluation."""
    tracking = empty_database(tmp_path_factory.mktemp("store"), "growth")
    records = Records(tracking)
    for _ in range(3):
        records.add_run()
    return tracking


def test_a_report_asks_as_often_for_many_runs_as_for_one(tracking):
    calls = []
    reader = Reader(tracking)
    runs = reader.training_runs()
    assert len(runs) == 3
    for asked in (runs[:1], runs):
        client = reader._client = Counting(reader._client)
        evaluations, models = reader.evaluations(asked), reader.models(asked)
        assert [*evaluations] == [*models] == [run.run_id for run in asked]
        for run in asked:
            (evaluation,), (model,) = evaluations[run.run_id], models[run.run_id]
            assert evaluation.tags["train_run_id"] == run.run_id
            assert evaluation.tags["eval_key"] == model.artifact_digest
            assert len(model.registered) == 1
        calls.append(client.calls)
    assert calls == [4, 4]


def test_a_scheduler_asks_as_often_for_many_runs_as_for_one(tracking):
    calls = []
    query = CheckpointQuery(tracking.uri, (tracking.experiment,), ("registered",))
    client = query._client = Counting(query._client)
    checkpoints = query.checkpoints()
    assert client.calls == 5  # experiment by name and by id, models, versions, runs
    recorded = {(c.artifact_digest, c.run_id) for c in checkpoints}
    assert len(recorded) == 3
    for asked in (checkpoints[:1], checkpoints):
        client.calls = 0
        found = query.recorded(c.run_id for c in asked)
        assert found == {(c.artifact_digest, c.run_id) for c in asked}
        calls.append(client.calls)
    assert calls == [2, 2]
    assert query.recorded({""}) == query.recorded(()) == set()
