import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from jobs.errors import EvaluationError
from jobs.gate import NOT_PROMOTED, main
from jobs.model_registry import promotion
from jobs.model_registry.certificate_bundle import CertificateBundle
from model.verifier.families.registry import FAMILIES
from pipeline.tracking.client import TrackingConfig
from pipeline.tracking.model_registry import Registry, RegistryError
from tests.jobs.gated import Gated

pytestmark = pytest.mark.integration

_numbers = itertools.count()


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """Models, shards, evaluations and MLflow store of this file: made once, they take seconds."""
    made = Gated(tmp_path_factory.mktemp("gated"))
    made.of_sharp = made.evaluation(made.sharp, "of-sharp")
    made.of_steady = made.evaluation(made.steady, "of-steady")
    verify, confirmed = CertificateBundle.verify, {}

    def verified_once(bundle, count, seed):
        """The same bytes at the same place are confirmed once, whatever the seed."""
        place = bundle.summary.artifact_url, bundle.summary.shards_url
        asked = (*bundle.files.values(), *place, count)
        if asked not in confirmed:
            confirmed[asked] = verify(bundle, count, seed)
        return confirmed[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CertificateBundle, "verify", verified_once)
        yield made


@pytest.fixture
def name(gated):
    """A registered model of its own."""
    name = f"model-{next(_numbers)}"
    promotion.set_rule(gated.registry, name, gated.rule)
    return name


def champion(gated, name):
    version = gated.registry.aliased(name, "champion")
    return version and version.number


def judge(gated, name, evaluation, **options):
    promotion.register(gated.registry, name, evaluation)
    return promotion.promote(gated.registry, name, **options)


def decision_of(gated, decision):
    from mlflow import MlflowClient
    from mlflow.artifacts import load_dict

    run = MlflowClient(gated.tracking.uri).get_run(decision.run.run_id)
    return run, load_dict(f"{run.info.artifact_uri}/decision.json")


def test_cra_sound_decides_and_clean_accuracy_does_not(gated, name):
    first = judge(gated, name, gated.of_steady)
    assert first.promoted
    assert "first champion" in first.reason
    worse = judge(gated, name, gated.of_sharp)
    clean = [
        json.loads(Store(url).read("summary.json"))["columns"]["sound"]["clean"]
        for url in (gated.of_sharp, gated.of_steady)
    ]
    assert clean[0] > clean[1] + 0.2
    assert worse.comparison.candidate_cra < worse.comparison.champion_cra - 0.2
    assert not worse.promoted
    assert champion(gated, name) == 1
    run, evidence = decision_of(gated, worse)
    assert run.data.tags["stage"] == "gate"
    assert run.data.tags["gate.decision"] == "rejected"
    assert evidence["verification"] == {}
    assert gated.registry.version(name, 2).tags["gate.decision"] == "rejected"


def test_a_better_model_is_promoted_with_its_evidence_and_rolled_back(gated, name):
    judge(gated, name, gated.of_sharp)
    better = judge(gated, name, gated.of_steady)
    assert better.promoted
    assert champion(gated, name) == 2
    assert better.comparison.p_value < 1e-3
    run, evidence = decision_of(gated, better)
    found = evidence["comparison"]
    assert found["level"] == 0.05 / (found["judged"] * (found["judged"] + 1))
    assert found["spent"] == pytest.approx(0.05 - 0.05 / (found["judged"] + 1))
    assert found["spending"] == "alpha / (k (k + 1)) for the k-th comparison on a test set"
    assert run.data.metrics["gate/gain"] == pytest.approx(better.comparison.gain)
    assert run.data.metrics[gated.rule.metric] == better.comparison.candidate_cra
    for number in (1, 2):
        assert evidence["verification"][f"version {number}"].startswith("OK: certificate")
    assert 0 < evidence["verification"]["sample"] <= better.comparison.samples
    assert gated.registry.aliased(name, "candidate") is None

    assert promotion.rollback(gated.registry, name, reason="too slow").number == 1
    assert champion(gated, name) == 1
    with pytest.raises(RegistryError, match="no earlier champion"):
        promotion.rollback(gated.registry, name)
    assert promotion.rollback(gated.registry, name, to=2).number == 2
    assert champion(gated, name) == 2


def test_comparisons_on_a_test_set_are_counted_once_whatever_the_name(gated, name):
    def placed(registered, *evaluations):
        return [judge(gated, registered, each).comparison for each in evaluations][-1]

    digest = json.loads(Store(gated.of_sharp).read("certificate.json"))["shards"]["index_digest"]
    better = placed(name, gated.of_sharp, gated.of_steady)
    count = len(gated.registry.comparisons(digest))
    assert 1 <= better.judged <= count
    other = f"{name}-again"
    promotion.set_rule(gated.registry, other, gated.rule)
    assert placed(other, gated.of_sharp, gated.of_steady) == better  # the same test: no new level
    assert len(gated.registry.comparisons(digest)) == count
    worse = placed(name, gated.of_sharp)
    assert worse.judged != better.judged


def test_a_comparison_that_another_one_overtook_is_judged_again(gated, name, monkeypatch):
    judge(gated, name, gated.of_sharp)
    promotion.register(gated.registry, name, gated.of_steady)
    known = type(gated.registry).comparisons
    read = iter([[], ["another"]])
    monkeypatch.setattr(type(gated.registry), "comparisons", lambda *_: next(read))
    with pytest.raises(RegistryError, match=r"another comparison .* promote again"):
        promotion.promote(gated.registry, name)
    assert champion(gated, name) == 1
    monkeypatch.setattr(type(gated.registry), "comparisons", known)
    assert promotion.promote(gated.registry, name).promoted


def test_rolling_back_to_what_was_never_champion_is_refused(gated, name):
    judge(gated, name, gated.of_steady)
    judge(gated, name, gated.of_sharp)
    with pytest.raises(RegistryError, match="version 2 never was champion"):
        promotion.rollback(gated.registry, name, to=2)
    assert champion(gated, name) == 1


def test_a_copied_storage_is_judged_where_it_lies(gated, name, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(gated.folder, copy)
    before = {path: path.read_bytes() for path in gated.folder.rglob("*") if path.is_file()}
    registry = Registry(TrackingConfig(uri=f"sqlite:///{copy}/mlflow.db", experiment="gated"))
    digest = json.loads(Store(gated.of_steady).read("certificate.json"))["digest"]
    promotion.register(registry, name, registry.evaluation_with(digest))
    assert promotion.promote(registry, name).promoted
    tags = registry.aliased(name, "champion").tags
    assert tags["artifact_url"] == (copy / "steady").as_uri()
    now = {path: path.read_bytes() for path in gated.folder.rglob("*") if path.is_file()}
    assert now == before


def test_a_forged_metric_changes_nothing(gated, name):
    from mlflow import MlflowClient

    judge(gated, name, gated.of_steady)
    client = MlflowClient(gated.tracking.uri)
    digest = json.loads(Store(gated.of_sharp).read("certificate.json"))["digest"]
    run_id = gated.registry.evaluation_with(digest)
    client.log_metric(run_id, gated.rule.metric, 1.0)
    decision = judge(gated, name, run_id)
    assert not decision.promoted
    assert decision.comparison.candidate_cra < 0.5
    assert champion(gated, name) == 1


def test_a_certificate_that_does_not_verify_is_not_promoted(gated, name):
    """Its digests fit, and if it were believed it would win."""
    judge(gated, name, gated.of_steady)
    decision = judge(gated, name, gated.forged(gated.of_sharp, "forged"))
    assert decision.comparison.passes
    assert not decision.promoted
    assert "does not verify: DISAGREEMENT: samples.parquet row" in decision.reason
    assert champion(gated, name) == 1
    run, _ = decision_of(gated, decision)
    assert run.data.tags["gate.decision"] == "rejected"


def test_a_forged_first_champion_is_refused_too(gated, name):
    assert not judge(gated, name, gated.forged(gated.of_sharp, "first")).promoted
    assert champion(gated, name) is None


def test_a_summary_without_its_certificate_is_not_registered(gated, name, tmp_path):
    copy = Store(str(tmp_path))
    for file in ("summary.json", "samples.parquet"):
        copy.write(file, Store(gated.of_sharp).read(file))
    with pytest.raises(EvaluationError, match="no finished evaluation"):
        promotion.register(gated.registry, name, copy.url)
    body = json.loads(Store(gated.of_sharp).read("certificate.json"))
    body["columns"]["sound"]["cra"] = {gated.eps: 1.0}
    copy.write("certificate.json", json.dumps(body).encode())
    with pytest.raises(EvaluationError, match=r"digest of certificate\.json is"):
        promotion.register(gated.registry, name, copy.url)


def test_a_certificate_of_another_artifact_is_not_registered(gated, name, tmp_path):
    copy = Store(str(tmp_path))
    for file in ("summary.json", "samples.parquet", "certificate.json"):
        copy.write(file, Store(gated.of_sharp).read(file))
    summary = json.loads(copy.read("summary.json"))
    summary["artifact_url"] = gated.steady
    copy.write("summary.json", json.dumps(summary).encode())
    with pytest.raises(EvaluationError, match=r"is of model .* has digest"):
        promotion.register(gated.registry, name, copy.url)


def test_a_family_that_the_verifier_does_not_know_is_not_registered(gated, name, monkeypatch):
    monkeypatch.delitem(FAMILIES, "lipnext")
    with pytest.raises(EvaluationError, match="lipnext networks are not supported by the gate"):
        promotion.register(gated.registry, name, gated.of_steady)
    assert gated.registry.aliased(name, "candidate") is None


def test_evidence_that_was_changed_in_the_registry_is_refused(gated, name):
    version = promotion.register(gated.registry, name, gated.of_steady)
    digest = version.tags["certificate_digest"]
    location = next(gated.folder.glob(f"mlartifacts/**/evidence/{digest}"))
    original = (location / "samples.parquet").read_bytes()
    try:
        (location / "samples.parquet").write_bytes(original + b"?")
        with pytest.raises(EvaluationError, match=r"sha256 of samples\.parquet"):
            promotion.promote(gated.registry, name)
    finally:
        (location / "samples.parquet").write_bytes(original)
    assert champion(gated, name) is None


def test_other_samples_are_not_compared(gated, name):
    judge(gated, name, gated.of_steady)
    other = gated.evaluation(gated.sharp, "validation", split="validation")
    with pytest.raises(EvaluationError, match="not certified on the same test samples"):
        judge(gated, name, other)
    same = gated.evaluation(gated.steady, "steady-validation", split="validation")
    assert not promotion.promote(gated.registry, name, against=same).promoted


def test_another_eps_than_the_rule_states_is_refused(gated, name):
    other = gated.evaluation(gated.sharp, "other-eps", eps=("1/255",), record=False)
    with pytest.raises(EvaluationError, match=f"the rule compares {gated.rule.metric}"):
        promotion.register(gated.registry, name, other)


@pytest.mark.parametrize(
    ("field", "value"),
    [("eps", ""), ("eps", "1/0"), ("eps", "nan"), ("alpha", "nan"), ("alpha", "2"),
     ("min_gain", "-1"), ("min_samples", "0"), ("norm", "l1")],
)  # fmt: skip
def test_a_damaged_rule_judges_nothing(gated, name, field, value):
    gated.registry.set_model_tags(name, {f"gate.{field}": value})
    for act in (lambda: promotion.register(gated.registry, name, gated.of_steady),
                lambda: promotion.promote(gated.registry, name)):  # fmt: skip
        with pytest.raises(RegistryError, match=f"the rule of .* is damaged: (.|\n)*{field}"):
            act()
    assert champion(gated, name) is None


def test_a_registered_model_predicts_with_its_certified_radius(gated, name, monkeypatch):
    import mlflow

    judge(gated, name, gated.of_steady)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated.tracking.uri)
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    index = load_index(gated.shards)
    images = np.concatenate(
        [
            batch.images.numpy()
            for shard in index.shards_of("test")
            for batch in read_shard(index, shard, 300)
        ]
    )
    found = model.predict(images)
    stored = pq.read_table(f"{gated.of_steady}/samples.parquet")
    assert found["label"].tolist() == stored["sound_prediction"].to_pylist()
    np.testing.assert_allclose(found["radius"], stored["sound_radius"].to_numpy(), rtol=1e-9)
    limit = int(gated.eps.split("/")[0]) / 255
    assert found["certified"].tolist() == (stored["sound_radius"].to_numpy() > limit).tolist()
    assert set(found["eps"]) == {gated.eps}
    assert not model.predict(images[:3], params={"eps": "2000/255"})["certified"].any()
    for wrong in (images.astype(np.float32) / 255, images[:, :1]):
        with pytest.raises(mlflow.exceptions.MlflowException, match="Failed to enforce schema"):
            model.predict(wrong)


def test_a_registered_model_refuses_other_weights(gated, name, tmp_path, monkeypatch):
    from jobs.prediction.predictor import CertifiedModel

    with pytest.raises(EvaluationError, match="has digest"):
        CertifiedModel(artifact_url=gated.sharp, artifact_digest="0" * 64, eps="1/255")


def test_the_entry_runs_the_acts_and_tells_the_outcome_by_its_status(gated, capsys):
    store = ["--tracking.uri", gated.tracking.uri, "--tracking.experiment", "gated"]
    assert main(["candidate", "entry", gated.of_sharp, *store]) == 2
    assert "has no rule: set one with `python -m jobs.gate rule entry" in capsys.readouterr().err
    assert main(["rule", "entry", "--rule.eps", gated.eps, *store]) == 0
    assert main(["promote", "entry", *store]) == 2
    assert main(["candidate", "entry", gated.of_steady, *store]) == 0
    assert main(["promote", "entry", *store]) == NOT_PROMOTED
    assert "needed: 1 of at least 200 samples, rule.min_samples" in capsys.readouterr().out
    few = ["--rule.eps", gated.eps, "--rule.min-samples", "80"]
    assert main(["rule", "entry", *few, *store]) == 0
    assert main(["promote", "entry", "--sample", "10", *store]) == 0
    assert main(["candidate", "entry", gated.of_sharp, *store]) == 0
    assert main(["promote", "entry", *store]) == NOT_PROMOTED
    assert "NOT promoted" in capsys.readouterr().out
    assert main(["status", "entry", *store]) == 0
    shown = capsys.readouterr().out
    assert "champion" in shown
    assert " to " in shown  # the interval
    assert main(["rollback", "entry", *store]) == 2
    assert "no earlier champion" in capsys.readouterr().err
