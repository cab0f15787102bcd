import io
import os
from dataclasses import replace

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_shards.decode import decode_image
from data_shards.sources import synthetic
from data_shards.store import Store
from data_shards.write import write_shard_set
from jobs.evaluate_cra import evaluate, main
from jobs.figure import cra_png
from jobs.records import EvaluationError, EvaluationSummary
from model.certificates import certify


def test_the_result_agrees_with_the_network_applied_to_every_test_image(fields, network):
    calls = []
    threads = torch.get_num_threads()
    summary = evaluate(fields, on_progress=lambda *call: calls.append(call))
    assert torch.get_num_threads() == threads
    assert calls == [(i, 5) for i in range(1, 6)]  # four shards and the bound
    source = synthetic(classes=4, size=8, samples=100, seed=1)
    table = pq.read_table(io.BytesIO(Store(fields["out"]).read("samples.parquet")))
    chosen = np.array([int(key) for key in table["key"].to_pylist()])
    assert sorted(chosen) == list(np.flatnonzero(source.test))
    assert table["label"].to_pylist() == list(source.labels[chosen])

    images = torch.stack([decode_image(source.encode(int(i)), source.extension) for i in chosen])
    labels = torch.as_tensor(np.asarray(source.labels)[chosen]).long()
    with torch.no_grad():
        logits, factors = network.logits_and_margin_factors(images / 255)
        found = certify(logits, factors, labels, lipschitz=1.0)
    assert table["prediction"].to_pylist() == found.prediction.tolist()
    np.testing.assert_allclose(table["radius"].to_numpy(), found.radius.numpy(), rtol=1e-3)
    assert summary.samples == len(chosen)
    assert summary.clean == found.correct.double().mean()
    assert 0 <= summary.cra["36/255"] <= summary.cra["1/255"] <= summary.clean
    assert summary.step == 7
    assert 1 <= summary.lipschitz_upper_bound < 1.001
    assert summary.orthogonality_residual < 1e-5
    assert set(summary.metrics()) == {
        "clean", "mean_radius", "cra_nominal/l2/1_255", "cra_nominal/l2/36_255",
    }  # fmt: skip


def test_a_finished_result_is_used_again(fields):
    first = evaluate(fields)
    before = os.stat(os.path.join(fields["out"], "samples.parquet")).st_mtime_ns
    assert evaluate(fields) == first
    assert os.stat(os.path.join(fields["out"], "samples.parquet")).st_mtime_ns == before
    other = evaluate(fields | {"eps": ("2/255",)})
    assert other.eval_key != first.eval_key
    assert list(other.cra) == ["2/255"]


def test_the_record_goes_to_the_log_with_ids(fields):
    rows = []
    summary = evaluate(fields, train_run_id="r", step=9, model_id="m", log=rows.append)
    (row,) = rows
    assert (row.train_run_id, row.step, row.model_id) == ("r", 9, "m")
    assert row.metrics == summary.metrics()
    assert row.eval_key == summary.eval_key
    assert row.artifacts["cra.png"].startswith(b"\x89PNG")


def test_a_failing_record_does_not_lose_the_result(fields, caplog):
    def log(record):
        raise OSError("store is away")

    summary = evaluate(fields, log=log)
    assert summary.samples > 0
    assert "not recorded: store is away" in caplog.text


def test_summary_json_round_trip(fields):
    summary = evaluate(fields)
    assert EvaluationSummary.from_json(summary.to_json()) == summary


def test_the_figure_is_a_png_of_the_stated_size(fields):
    summary = evaluate(fields)
    curve = tuple((eps, 0.9 - eps / 2) for eps, _ in summary.curve)
    plain = cra_png(summary)
    assert matplotlib.image.imread(io.BytesIO(plain)).shape[:2] == (700, 1120)
    assert 10_000 < len(plain) < 200_000
    assert cra_png(replace(summary, curve=curve)) != plain


def test_the_entry_reports_and_records(fields, tmp_path, capsys):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = [
        "--artifact", fields["artifact"], "--launcher", "local", "--out", fields["out"],
        "--tracking.uri", store, "--tracking.experiment", "synthetic",
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("clean", "36/255", "255/255", "cra.png", "mlflow ui", "workflowType"):
        assert text in out
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("synthetic").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.data.tags["stage"] == "cra-eval"


def bad_shards(tmp_path):
    write_shard_set(synthetic(classes=3, size=8, samples=60, seed=1), str(tmp_path / "three"))
    return ["--shards", str(tmp_path / "three")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda tmp_path: ["--artifact", "nowhere"], "no artefact at"),
        (lambda tmp_path: ["--shards", "nowhere"], "no shard set at"),
        (lambda tmp_path: ["--split", "half"], "'half' is not one of"),
        (bad_shards, "3 classes, the network takes 3x8x8 in 4 classes"),
    ],
)
def test_the_entry_refuses_bad_input_with_one_line(
    fields, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    given = ["--artifact", fields["artifact"], "--launcher", "local", "--no-record"]
    assert main([*given, *arguments(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


def test_an_artefact_without_context_needs_the_shards_option(fields, bare_artifact):
    with pytest.raises(EvaluationError, match="give --shards"):
        evaluate(fields | {"artifact": bare_artifact})


def test_the_entry_refuses_a_bad_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--artifact", "a", "--eps", "0.5"])
    assert exit_info.value.code == 2
    assert "'0.5' is not a positive ratio" in capsys.readouterr().err


def test_a_damaged_sample_is_an_error(fields, tmp_path, shards):
    copy = Store(str(tmp_path / "damaged"))
    for name in Store(shards).ls():
        data = Store(shards).read(name)
        if name == "test-00002.tar":
            data = data[:540] + b"?" + data[541:]
        copy.write(name, data)
    with pytest.raises(ValueError, match=r"test-00002.tar: .* the index states"):
        evaluate(fields | {"shards": copy.url})
    assert not Store(fields["out"]).exists("summary.json")
