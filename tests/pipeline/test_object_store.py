"""Training from a real S3-compatible server behind a proxy that fails in every way it can."""

import json

import pytest

from data_shards.errors import ShardError
from data_shards.sources.digits import digits
from data_shards.storage import retry
from data_shards.writing.writer import write_shard_set
from pipeline.presets import fit_to_data
from pipeline.pretrain import main, parse
from tests.faulty_proxy import FAULTS, FaultyProxy, Weather
from tests.harness import run_command
from tests.mlflow_database import empty_database
from tests.object_store import BUCKET, KEY, SECRET, s3_clients, s3_environment, s3_server, upload

pytestmark = pytest.mark.integration

SETTINGS = (
    ("cluster.launcher", "local"),
    ("train.epochs", "1"),
    ("train.global-batch", "48"),
    ("train.warmup-epochs", "0"),
    ("model.width", "24"),
    ("model.depth", "1"),
    ("data.stream.cache-bytes", "0"),  # read, not remembered
    ("data.stream.read-ahead-bytes", "100000"),
    ("data.stream.workers", "2"),
)


def pretrain(storage, shards, environment, *options):
    """Run the entry as a person would; returns its output and the metrics by step."""
    settings = [part for name, value in SETTINGS for part in (f"--{name}", value)]
    settings += ["--data.shards", shards, "--storage", str(storage), "--name", "run", *options]
    storage.mkdir(exist_ok=True)
    empty_database(storage, "digits")
    done = run_command("pipeline.pretrain", "digits", *settings, timeout=250, **environment)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    spool = (storage / "run/tracking/spool.jsonl").read_text().splitlines()
    metrics: dict[int, dict[str, float]] = {}
    for record in map(json.loads, spool):
        if record["kind"] == "metrics":
            metrics.setdefault(record["step"], {}).update(record["values"])
    return output, metrics


def series(metrics, name):
    """The steps that carry `name`; a checkpoint's figures may come at a step of their own."""
    return {step: values[name] for step, values in metrics.items() if name in values}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    write_shard_set(digits(), str(path))
    return path


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    storage = tmp_path_factory.mktemp("undisturbed")
    return pretrain(storage, str(folder), {}, "--checkpoint.no-evaluate")[1]


WEATHERS = {
    "503, resets and short bodies": Weather(unavailable=0.2, reset=0.15, reset_at=300, short=0.1),
    "stalls and trickles": Weather(stall=0.02, stall_s=30, trickle=0.02, trickle_rate=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEATHERS)
def test_the_same_losses_in_bad_weather(name, folder, undisturbed, tmp_path):
    with s3_server() as address, FaultyProxy(address, seed=1) as proxy:
        with s3_clients(proxy.url):
            shards = upload(folder)
        proxy.weather, requests = WEATHERS[name], proxy.seen["requests"]
        impatient = {"FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 0.5}})}
        environment = s3_environment(proxy.url, **impatient)
        output, metrics = pretrain(tmp_path / "runs", shards, environment)
        assert sum(proxy.seen[fault] for fault in FAULTS) > 5
        asked = proxy.seen["requests"] - requests
        assert asked > 100
    losses = series(metrics, "train/loss")
    assert losses == series(undisturbed, "train/loss")
    assert len(losses) == 24  # an epoch of the 1,149 samples that are not held out
    last = metrics[max(losses)]
    assert 5 < last["data/retries"] < asked
    assert last["data/damaged"] == 0
    assert last["data/wait_s"] >= 0
    assert "cra_nominal" in output  # certified from the same store
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    texts = [output.encode(), *(path.read_bytes() for path in written)]
    assert len(texts) > 5
    for secret in (KEY, SECRET):
        assert not any(secret.encode() in text for text in texts)


def test_a_command_line_does_not_wait_for_a_store_as_long_as_a_run_does(monkeypatch, capfd):
    monkeypatch.setattr(retry, "PATIENCE_S", 3600)
    monkeypatch.setattr(fit_to_data, "_PATIENCE_S", 0.2)
    with s3_clients("http://127.0.0.1:9"):  # nobody listens
        with pytest.raises(ShardError, match="cannot read the index of a shard set"):
            parse(["lipnext-S", "--data.shards", f"s3://{BUCKET}/set"])
        assert parse(["digits", "--data.shards", f"s3://{BUCKET}/set"]).preset == "digits"
    assert capfd.readouterr().err.startswith("reading the index of s3://bucket/set\n")


def test_a_wrong_endpoint_is_refused_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(retry, "PATIENCE_S", 1)
    monkeypatch.setattr(fit_to_data, "_PATIENCE_S", 0.2)
    options = ["--cluster.launcher", "local", "--storage", str(tmp_path)]
    with s3_clients("http://127.0.0.1:9"):  # nobody listens
        assert main(["digits", *options, "--data.shards", f"s3://{BUCKET}/set"]) == 2
    out, err = capfd.readouterr()
    assert out.startswith("refused: ")
    assert out.count("\n") == 1
    assert "cannot read the index of a shard set: s3://bucket/set" in out
    assert SECRET not in out + err
