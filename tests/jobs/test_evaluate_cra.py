import hashlib
import io
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import jobs.evaluate_cra
from data_shards.format.decode import decode_image
from data_shards.format.shard_index import load_index
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from jobs.errors import EvaluationError
from jobs.evaluate_cra import evaluate, main
from jobs.evaluation import certify_tasks
from jobs.evaluation.certifier_version import certifier_digest
from jobs.evaluation.certify_tasks import ArtifactTask, matrix_tasks, shard_tasks
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.runner import artifact_info, evaluation_keys
from jobs.evaluation.stored_result import read_result
from jobs.model_registry.certificate_bundle import CertificateBundle
from model.certify import certify
from pipeline.run.evaluation_summary import EvaluationSummary
from tests.fake_ray import gcs
from tests.jobs.conftest import export, plain_fields
from tests.mlflow_database import empty_database

pytestmark = pytest.mark.integration

COLUMNS = ("nominal", "sound", "deployed")


@pytest.fixture(scope="module")
def evaluated(artifact, tmp_path_factory):
    """Folder with the result of `fields`, made once."""
    out = tmp_path_factory.mktemp("evaluated")
    evaluate(plain_fields(artifact, out))
    return out


@pytest.fixture
def first(fields, evaluated):
    """The result of `fields`, which is there already."""
    shutil.copytree(evaluated, fields["out"])
    return evaluate(fields)


def samples_of(fields):
    return pq.read_table(io.BytesIO(Store(fields["out"]).read("samples.parquet")))


def test_the_result_agrees_with_the_network_applied_to_every_test_image(fields, network):
    calls = []
    threads = torch.get_num_threads()
    summary = evaluate(fields, on_progress=calls.append)
    assert torch.get_num_threads() == threads
    # The matrices and four shards.
    assert [(call.done, call.total) for call in calls] == [(i, 5) for i in range(1, 6)]
    assert calls[0].clean is None
    assert calls[-1].samples == summary.samples
    assert calls[-1].cra_sound == summary.columns["sound"].cra
    assert not Store(fields["out"]).exists("progress.json")
    source = synthetic(classes=4, size=8, samples=100, seed=1)
    table = samples_of(fields)
    chosen = np.array([int(key) for key in table["key"].to_pylist()])
    assert sorted(chosen) == list(np.flatnonzero(source.test))
    assert table["label"].to_pylist() == list(source.labels[chosen])

    images = torch.stack([decode_image(source.encode(int(i)), "jpg") for i in chosen])
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images.numpy()]
    assert table["pixels_sha256"].to_pylist() == digests
    labels = torch.as_tensor(np.asarray(source.labels)[chosen]).long()
    with torch.no_grad():
        logits, factors = network.logits_and_margin_factors(images / 255)
        found = certify(logits, factors, labels, lipschitz=1.0)
    for column in COLUMNS:
        assert table[f"{column}_prediction"].to_pylist() == found.prediction.tolist()
        assert summary.columns[column].clean == found.correct.double().mean()
    np.testing.assert_allclose(table["nominal_radius"].to_numpy(), found.radius.numpy(), rtol=1e-3)
    assert summary.samples == len(chosen)
    assert summary.step == 7
    assert summary.orthogonality_residual < 1e-5


def test_a_moved_storage_is_evaluated_where_it_lies(tmp_path, shards):
    """Its shard set is found from the artifact, and a finished evaluation names the new place."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(shards, old / "data/set")
    artifact = "run/artifacts/step-00000007"
    export(old / artifact, shards_url="../../../data/set", step=7)
    fields = {"launcher": "local", "eps": ("1/255",), "record": False}
    first = evaluate({**fields, "artifact": str(old / artifact)})
    assert first.shards_url == f"file://{old}/data/set"
    old.rename(new)
    stored = read_result(Store(first.out_url.replace(str(old), str(new)))).summary
    again = evaluate({**fields, "artifact": str(new / artifact)})
    assert not old.exists()
    for found in (stored, again):
        assert found.eval_key == first.eval_key
        assert found.shards_url == f"file://{new}/data/set"
        assert found.artifact_url == f"file://{new}/{artifact}"
        assert found.out_url == first.out_url.replace(str(old), str(new))


def test_the_three_columns_are_ordered_and_named(fields, first):
    summary = first
    table = samples_of(fields)
    nominal, sound, deployed = (table[f"{name}_radius"].to_numpy() for name in COLUMNS)
    assert (deployed <= sound).all()
    assert (sound <= nominal + 1e-5).all()
    assert (sound > 0).all()
    bound = summary.network_bound
    assert [summary.columns[name].lipschitz for name in COLUMNS] == [1.0, bound, bound]
    assert [summary.columns[name].program for name in COLUMNS] == ["float32", "float64", "float32"]
    assert 0.9 < summary.observed_lipschitz <= bound < 1.0001
    for column in summary.columns.values():
        assert 0 <= column.cra["36/255"] <= column.cra["1/255"] <= column.clean
    names = {f"cra_{name}/l2/{eps}" for name in COLUMNS for eps in ("1_255", "36_255")}
    means = {f"mean_radius_{name}" for name in COLUMNS}
    vacuous = {name for name in names | means if "deployed" in name}
    assert summary.columns["deployed"].vacuous == (deployed.max() == 0)
    gone = vacuous if summary.columns["deployed"].vacuous else set()
    assert set(summary.metrics()) == {"clean"} | names | means - gone


def test_the_serving_program_may_be_vacuous_and_then_says_so(fields):
    summary = evaluate(fields | {"deployed": "bfloat16"})
    column = summary.columns["deployed"]
    assert (column.program, column.vacuous, column.cra["1/255"]) == ("bfloat16", True, 0.0)
    assert column.largest_error > 1
    assert not any("deployed" in name for name in summary.metrics())


def test_the_certificate_states_what_was_computed(fields, artifact, first):
    out = Store(fields["out"])
    body = json.loads(out.read("certificate.json"))
    digest = body.pop("digest")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(text.encode()).hexdigest() == first.certificate_digest
    assert body["samples_sha256"] == hashlib.sha256(out.read("samples.parquet")).hexdigest()
    info = json.loads(Store(artifact).read("artifact.json"))
    assert body["model"]["digest"] == info["digest"]
    assert body["model"]["network"] == info["network"]
    assert body["native_shape"] == body["network_shape"] == [3, 8, 8]
    assert [layer["name"] for layer in body["layers"]] == [
        "stem.weight",
        "blocks.0.R",
        "blocks.0.M",
    ]
    assert body["network_bound"] == first.network_bound
    assert body["columns"]["sound"]["certified"] == first.columns["sound"].certified


def test_a_residual_that_the_artifact_states_is_not_believed(fields, first, tmp_path, artifact):
    """The bound comes from the weights: nothing that artifact.json claims can raise a radius."""
    copy = Store(str(tmp_path / "lying"))
    for name in ("artifact.json", "weights.safetensors"):
        copy.write(name, Store(artifact).read(name))
    text = json.loads(copy.read("artifact.json"))
    text["orthogonality_residuals"] = dict.fromkeys(text["orthogonality_residuals"], 0.0)
    text["largest_residual"] = 0.0
    copy.write("artifact.json", json.dumps(text).encode())
    lying = evaluate(fields | {"artifact": copy.url, "out": str(tmp_path / "other")})
    assert lying.columns == first.columns
    assert lying.network_bound == first.network_bound


def test_an_attack_is_reported_beside_the_certificate(finished):
    summary = finished
    assert summary.attack.inside_radius_flips == 0
    assert summary.attack.inside_radius_samples == summary.samples
    for eps, certified in summary.columns["sound"].cra.items():
        assert certified <= summary.attack.accuracy[eps] <= summary.columns["sound"].clean
    assert summary.metrics()["attack/l2/1_255"] == summary.attack.accuracy["1/255"]


def test_eps_beyond_all_distances_is_refused_with_the_unit(fields):
    with pytest.raises(EvaluationError, match=r"eps 36/1 is larger than 13\.8564.*36/255"):
        evaluate(fields | {"eps": ("36/1",)})


def test_a_bound_of_other_weights_is_refused(fields, artifact):
    config = EvaluationConfig(**fields)
    info = artifact_info(artifact)
    index = load_index(info.context["shards_url"])
    task = ArtifactTask(url=artifact, digest=info.digest, device="cpu")
    (bounds,) = [matrices.run() for matrices in matrix_tasks(task, info)]
    bounds[1] = replace(bounds[1], sha256="0" * 64)
    first, *_ = shard_tasks(
        task, index, "test", config.batch_size, matrices=bounds, deployed="float32"
    )
    with pytest.raises(EvaluationError, match=r"blocks\.0\.R of .* differs from the matrix"):
        first.run()


def test_a_finished_result_is_used_again(fields, first):
    before = os.stat(os.path.join(fields["out"], "samples.parquet")).st_mtime_ns
    assert evaluate(fields) == first
    assert os.stat(os.path.join(fields["out"], "samples.parquet")).st_mtime_ns == before
    other = evaluate(fields | {"eps": ("2/255",)})
    assert other.eval_key != first.eval_key
    assert list(other.columns["sound"].cra) == ["2/255"]
    attacked = evaluation_keys(EvaluationConfig(**fields | {"eps": ("2/255",), "attack": "fast"}))
    assert other.eval_key not in attacked


def put(place, **values):
    """Change values of nested dictionaries and lists in place, by paths joined with two lines."""
    for path, value in values.items():
        *steps, last = path.split("__")
        inner = place
        for step in steps:
            inner = inner[int(step) if step.isdigit() else step]
        inner[int(last) if last.isdigit() else last] = value


FORGERIES = {
    "cra": {"columns__sound__cra__36/255": 1.0},
    "certified": {"columns__sound__certified__36/255": 16},
    "clean": {"columns__deployed__clean": 1.0},
    "mean": {"columns__nominal__mean_radius": 9.0},
    "vacuous": {"columns__sound__vacuous": True},
    "curve": {"columns__sound__curve__3": [0.03, 0.9]},
    "error": {"columns__sound__largest_error_ball": 0.0},
    "bound": {"network_bound": 0.5},
    "observed": {"observed_lipschitz": 0.1},
    "layer": {"layers__0__upper": 0.9},
    "class": {"per_class__0__36/255": 1.0},
    "samples": {"samples": 1_000_000},
    "norm": {"norm": "linf"},
    "dataset": {"dataset": "imagenet-test"},
    "model": {"artifact_digest": "0" * 64},
    "family": {"family": "sll"},
    "attack": {"attack__accuracy__36/255": -0.5},
    "flips": {"attack__inside_radius_flips": 3},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, artifact):
    settings = {"launcher": "local", "eps": ("1/255", "36/255"), "attack": "fast"}
    out = str(tmp_path_factory.mktemp("finished"))
    return evaluate({"artifact": artifact, "out": out, "record": False, **settings})


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_summary_is_not_believed(finished, forgery, tmp_path):
    shutil.copytree(finished.out_url.removeprefix("file://"), tmp_path / "out")
    out = Store(str(tmp_path / "out"))
    assert read_result(out).summary == finished.found_at(out.url)
    body = json.loads(out.read("summary.json"))
    put(body, **FORGERIES[forgery])
    out.write("summary.json", json.dumps(body).encode())
    with pytest.raises(EvaluationError, match=r"of summary\.json|in summary\.json"):
        read_result(out)


def test_samples_and_certificate_of_another_digest_are_not_believed(finished, tmp_path):
    shutil.copytree(finished.out_url.removeprefix("file://"), tmp_path / "out")
    out = Store(str(tmp_path / "out"))
    certificate, samples = out.read("certificate.json"), out.read("samples.parquet")
    body = json.loads(certificate)
    body["network_bound"] = 0.5
    out.write("certificate.json", json.dumps(body).encode())
    with pytest.raises(EvaluationError, match=r"digest in certificate\.json is .*, but"):
        read_result(out)
    out.write("certificate.json", certificate)
    out.write("samples.parquet", samples + b" ")
    with pytest.raises(EvaluationError, match=r"samples\.parquet is not the one of certificate"):
        read_result(out)
    out.remove("samples.parquet")
    with pytest.raises(EvaluationError, match="no finished evaluation at"):
        read_result(out)


def same_rows(table):
    return table


HOSTILE = {
    "more row groups than memory": (
        lambda table: pa.concat_tables([table] * 300), {}, "parquet takes .*, the limit is 1,000,0"
    ),
    "rows that nobody stated": (lambda table: pa.concat_tables([table] * 2), {}, "40 rows for 20"),
    "no rows": (lambda table: table.slice(0, 0), {}, "0 rows for 20 samples"),
    "no radii": (lambda table: table.drop_columns(["sound_radius"]), {}, "sound_radius"),
    "labels of text": (
        lambda table: table.set_column(
            table.column_names.index("label"), "label", table["label"].cast(pa.string())
        ),
        {},
        "cannot be used|does not follow",
    ),
    "lists": (
        lambda table: table.append_column("x", pa.array([[1, 2]] * len(table))), {}, "is damaged"
    ),
    "a long text": (
        lambda table: table.append_column("x", pa.array(["k" * 2000] * len(table))),
        {},
        "has in x a text of 2,000 bytes",
    ),
    "a billion classes": (same_rows, {"model__network__num_classes": 10**9}, "names 4 classes of"),
    "a billion samples": (same_rows, {"shards__samples": 10**9}, "samples of summary"),
    "samples of text": (same_rows, {"shards__samples": "x"}, "cannot be used"),
    "no samples": (same_rows, {"shards": {}}, "cannot be used: 'samples'"),
}  # fmt: skip
"""By what is wrong: rows, fields of the certificate, and what is said; all digests fit."""


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_samples_are_refused_before_they_take_memory(finished, what, tmp_path, monkeypatch):
    change, fields, message = HOSTILE[what]
    shutil.copytree(finished.out_url.removeprefix("file://"), tmp_path / "out")
    out = Store(str(tmp_path / "out"))
    genuine = pq.read_table(io.BytesIO(out.read("samples.parquet")))
    pq.write_table(change(genuine), tmp_path / "out/samples.parquet", row_group_size=64)
    body = json.loads(out.read("certificate.json"))
    del body["digest"]
    put(body, **fields)
    body["samples_sha256"] = hashlib.sha256(out.read("samples.parquet")).hexdigest()
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["digest"] = hashlib.sha256(text.encode()).hexdigest()
    out.write("certificate.json", json.dumps(body).encode())
    summary = json.loads(out.read("summary.json"))
    out.write(
        "summary.json", json.dumps({**summary, "certificate_digest": body["digest"]}).encode()
    )
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_TABLE_BYTES", "1000000")
    with pytest.raises(EvaluationError, match=message):
        read_result(out)
    # The gate reads neither those columns nor the names of the summary.
    if what not in ("lists", "a long text", "a billion classes"):
        with pytest.raises(EvaluationError, match="cannot be read"):
            CertificateBundle.read(out.url)


def test_a_huge_file_of_samples_is_not_read(finished, tmp_path):
    shutil.copytree(finished.out_url.removeprefix("file://"), tmp_path / "out")
    out = Store(str(tmp_path / "out"))
    os.truncate(tmp_path / "out/samples.parquet", 20 << 30)  # sparse: 20 GiB of nothing
    for read in (lambda: read_result(out), lambda: CertificateBundle.read(out.url)):
        with pytest.raises(EvaluationError, match=r"21,474,836,480 bytes; .* rows take at most"):
            read()
    body = json.loads(out.read("certificate.json"))
    put(body, shards__samples=10**9)
    out.write("certificate.json", json.dumps(body).encode())
    for read in (lambda: read_result(out), lambda: CertificateBundle.read(out.url)):
        with pytest.raises(EvaluationError, match="bytes, the limit is 1,073,741,824"):
            read()


def test_a_result_that_was_forged_is_made_again(fields, first, capsys):
    out = Store(fields["out"])
    body = json.loads(out.read("summary.json"))
    sound = body["columns"]["sound"]
    sound["cra"] = dict.fromkeys(sound["cra"], 1.0)
    put(body, columns__sound__clean=1.0, network_bound=0.5)
    out.write("summary.json", json.dumps(body).encode())
    arguments = [
        "--artifact",
        fields["artifact"],
        "--out",
        fields["out"],
        "--cluster.launcher",
        "local",
    ]
    arguments += ["--batch-size", "3", "--no-record", "--eps", *fields["eps"]]
    assert main(arguments) == 0
    assert f"proved <= {first.network_bound:.9f}" in capsys.readouterr().out
    assert EvaluationSummary.from_json(out.read("summary.json")) == first


def test_a_mended_certifier_and_another_device_make_another_result(fields, first, monkeypatch):
    config = EvaluationConfig(**fields)
    cpu, cuda = evaluation_keys(config)
    assert first.eval_key == cpu != cuda
    assert evaluation_keys(replace(config, device="cuda")) == (cuda,)
    monkeypatch.setattr("jobs.evaluation.runner.certifier_digest", lambda: "mended")
    assert not set(evaluation_keys(config)) & {cpu, cuda}
    assert evaluate(fields).eval_key == evaluation_keys(config)[0]


def test_the_certifier_is_the_text_of_what_makes_the_numbers(tmp_path, monkeypatch):
    root = tmp_path / "model"
    (root / "verifier").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    monkeypatch.setattr("model.__file__", str(root / "__init__.py"))

    def digest(path, text):
        (root / path).write_text(text)
        certifier_digest.cache_clear()
        return certifier_digest()

    found = [digest(p, t) for p in ("a.py", "verifier/b.py") for t in ("x = 1", "x = 2")]
    monkeypatch.undo()
    certifier_digest.cache_clear()
    assert found[0] != found[1] == found[2] == found[3] != certifier_digest()


def test_a_summary_of_another_version_is_computed_again(fields, first):
    Store(fields["out"]).write("summary.json", b'{"eval_key": "old"}')
    assert evaluate(fields) == first


def test_the_record_goes_to_the_log_with_ids(fields):
    rows = []
    summary = evaluate(fields, train_run_id="r", step=9, model_id="m", log=rows.append)
    (row,) = rows
    assert (row.train_run_id, row.step, row.model_id) == ("r", 9, "m")
    assert row.metrics == summary.metrics()
    assert row.eval_key == summary.eval_key
    for name in ("cra.png", "radius.png", "bounds.png"):
        assert row.artifacts[name].startswith(b"\x89PNG")
    assert json.loads(row.artifacts["certificate.json"])["digest"] == summary.certificate_digest


@pytest.mark.usefixtures("first")
def test_a_failing_record_does_not_lose_the_result(fields, caplog):
    def log(record):
        raise OSError("store is away")

    summary = evaluate(fields, log=log)
    assert summary.samples > 0
    assert "not recorded: store is away" in caplog.text


def test_the_numbers_are_told_before_a_picture_is_drawn(fields, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(
        jobs.evaluate_cra,
        "draw_missing",
        lambda out, _: told.append((capsys.readouterr().out, set(out.ls()))),
    )
    words = ["--artifact", fields["artifact"], "--cluster.launcher", "local", "--out",
             fields["out"], "--no-record"]  # fmt: skip
    assert main(words) == 0
    ((out, files),) = told
    assert "cra_sound" in out
    assert "summary.json" in files


@pytest.mark.parametrize(("every", "observed"), [(4096, 1), (7, 3)])
def test_derivatives_are_observed_per_evaluation_not_per_shard(
    fields, monkeypatch, every, observed
):
    seen = []
    monkeypatch.setattr(certify_tasks, "_OBSERVED_EVERY", every)

    def observe(network, images):
        seen.append(len(images))
        return 0.5

    monkeypatch.setattr(certify_tasks, "observed_lipschitz", observe)
    summary = evaluate(fields)
    assert summary.samples == 20
    assert summary.observed_lipschitz == 0.5
    assert sum(seen) == observed


def test_batches_are_certified_together_as_one_by_one(fields, first, tmp_path, monkeypatch):
    monkeypatch.setattr(certify_tasks, "_CERTIFIED_ELEMENTS", 1)
    alone = evaluate(fields | {"out": str(tmp_path / "alone")})
    assert Store(alone.out_url).read("samples.parquet") == Store(first.out_url).read(
        "samples.parquet"
    )


def test_summary_json_round_trip(first):
    assert EvaluationSummary.from_json(first.to_json()) == first


def test_the_entry_reports_and_records(fields, tmp_path, capsys):
    store = empty_database(tmp_path, "synthetic").uri
    arguments = [
        "--artifact", fields["artifact"], "--cluster.launcher", "local", "--out", fields["out"],
        "--tracking.uri", store, "--tracking.experiment", "synthetic",
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in (
        "clean",
        "36/255",
        "255/255",
        "cra_sound",
        "cra_deployed",
        "python -m model.verify",
        "cra.png",
        "mlflow ui",
        "workflowType",
    ):
        assert text in out
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("synthetic").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.data.tags["stage"] == "cra-eval"


def bad_shards(tmp_path):
    write_shard_set(synthetic(classes=3, size=8, samples=60, seed=1), str(tmp_path / "three"))
    return ["--data.shards", str(tmp_path / "three")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda tmp_path: ["--artifact", "nowhere"], "no artifact at"),
        (lambda tmp_path: ["--data.shards", "nowhere"], "no shard set at"),
        (lambda tmp_path: ["--split", "half"], "'half' is not one of"),
        (lambda tmp_path: ["--cluster.device", "cuda"], "no GPU that torch can use"),
        (bad_shards, "3 classes, the network takes 3x8x8 in 4 classes"),
    ],
)
def test_the_entry_refuses_bad_input_with_one_line(
    fields, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["--artifact", fields["artifact"], "--cluster.launcher", "local", "--no-record"]
    assert main([*given, *arguments(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


def test_an_artifact_without_context_needs_the_shards_option(fields, bare_artifact):
    with pytest.raises(EvaluationError, match=r"give --data\.shards"):
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


def test_an_open_cluster_is_refused(fields, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with gcs() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert main(["--artifact", fields["artifact"], "--out", fields["out"], "--no-record"]) == 2
    assert f"runs the code of whoever reaches 127.0.0.1:{port}" in capsys.readouterr().err
