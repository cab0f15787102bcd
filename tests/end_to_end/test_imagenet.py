"""From the official archives through S3 to a certificate: one epoch of ImageNet at 224x224."""

import json

import pytest

from data_shards.format.shard_index import load_index
from tests.data_shards.imagenet_archive import make_imagenet
from tests.harness import run_module
from tests.object_store import BUCKET, s3_clients, s3_environment, s3_server

pytestmark = pytest.mark.slow

CLASSES, PER_CLASS = 1000, 2
UNDECODABLE = 3
SETTINGS = {
    "cluster.launcher": "local",
    "cluster.device": "cpu",
    "train.precision": "fp32",
    "train.epochs": "1",
    "train.warmup-epochs": "0.2",
    "train.global-batch": "48",
    "train.log-every": "1",
    "optim.lr": "1e-2",
    "loss.scale": "30",
    "model.patch": "8",
    "model.width": "192",
    "model.depth": "1",
    "data.stream.workers": "2",
}


def run(module, *arguments, address):
    return run_module(module, *arguments, timeout=280, **s3_environment(f"http://{address}"))


@pytest.mark.timeout(900)
def test_from_the_official_archives_to_a_certificate(tmp_path):
    archive = make_imagenet(tmp_path / "archives", classes=CLASSES, per_class=PER_CLASS)
    shards, storage = f"s3://{BUCKET}/imagenet", tmp_path / "runs"
    with s3_server() as address:
        source = str(archive.folder)
        run("data_shards.write", "imagenet", "--source", source, "--out", shards, address=address)
        with s3_clients(f"http://{address}"):
            index = load_index(shards)
        settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
        places = ("--storage", str(storage), "--name", "run", "--data.shards", shards)
        cache = ("--data.stream.disk-cache", str(tmp_path / "cache"))
        network = "imagenet-L32W4096"
        run("pipeline.pretrain", network, *settings, *places, *cache, address=address)
    train = CLASSES * PER_CLASS - UNDECODABLE
    assert index.header.splits["train"] == train
    assert index.header.splits["test"] == CLASSES
    assert (index.image_shape, index.train_shape) == ((3, 224, 224), None)
    spool = (storage / "run/tracking/spool.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in spool]
    values = [record["values"] for record in records if record["kind"] == "metrics"]
    metrics = [step for step in values if "train/loss" in step]
    assert len(metrics) == round(train / 48)
    assert metrics[-1]["data/damaged"] == 0
    first, last = (sum(m["train/loss"] for m in part) for part in (metrics[:8], metrics[-8:]))
    assert last < first
    (summary,) = (storage / "run").glob("artifacts/*/evaluation/test/summary.json")
    assert json.loads(summary.read_text())["samples"] == CLASSES
