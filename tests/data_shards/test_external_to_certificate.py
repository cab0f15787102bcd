"""Data as people have it, through training to a certificate that the verifier checks."""

import functools
import json
import os

import numpy as np
import pytest
import webdataset
from sklearn.datasets import load_digits

from data_shards.format.shard_index import load_index
from data_shards.sources.base import encode_png
from tests.harness import run_module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = {
    "cluster.launcher": "local",
    "cluster.device": "cpu",
    "train.epochs": "12",
    "model.width": "64",
    "model.depth": "2",
}


run = functools.partial(run_module, timeout=600)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.rint(data.images * 255 / 16).astype(np.uint8)
    return [encode_png(image) for image in images], data.target.tolist()


def by_stock_webdataset(digits, folder):
    """1,400 train images in four shards, 397 test images in one; the index lies elsewhere."""
    folder.mkdir()
    places = {"train": slice(0, 1400), "test": slice(1400, None)}
    for split, part in places.items():
        with webdataset.ShardWriter(
            str(folder / f"{split}-%04d.tar"), maxcount=400, verbose=0
        ) as w:
            for i, (data, label) in enumerate(zip(*(x[part] for x in digits), strict=True)):
                w.write({"__key__": f"{label}/{i}", "png": data, "cls": label, "txt": "a digit"})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    index = folder.parent / "index"
    said = run("data_shards.index", str(folder), "--split", "train=train-{0000..0003}.tar",
               "--split", "test=test-0000.tar", "--out", str(index), "--decode", "--workers",
               "2")  # fmt: skip
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "1400 train" in said
    return index


def by_folders_and_links(digits, folder):
    """Images of some classes in nested folders, one class and one image by a link, odd names."""
    elsewhere = folder.parent / "elsewhere"
    for i, (data, label) in enumerate(zip(*digits, strict=True)):
        place = elsewhere if label == 3 else folder / str(label) / ("a/b" if i % 3 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(data)
    os.symlink("../elsewhere", folder / "3")
    os.symlink("..", folder / "4" / "up")
    first = next((folder / "5").glob("*.png"))
    os.rename(first, os.fsencode(folder / "5") + b"/caf\xe9 #1.png")
    index = folder.parent / "index"
    said = run("data_shards.write", "imagefolder", "--source", str(folder), "--out", str(index),
               "--uniform", "--test-size", "8", "--channels", "1", "--hold-out", "0.2",
               "--follow-links")  # fmt: skip
    assert "1 link to a folder above it" in said
    return index


@pytest.mark.parametrize("make", [by_stock_webdataset, by_folders_and_links])
def test_from_the_data_to_a_certificate(make, digits, tmp_path):
    shards = make(digits, tmp_path / "data")
    assert "agree" in run("data_shards.verify", str(shards))
    index = load_index(str(shards))
    assert (index.image_shape, index.train_shape) == ((1, 8, 8), (1, 8, 8))
    assert index.header.splits["train"] + index.header.splits["test"] == 1797
    settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    said = run("pipeline.pretrain", "digits", *settings, "--storage", str(tmp_path), "--name",
               "run", "--data.shards", str(shards))  # fmt: skip
    summaries = [
        json.loads(path.read_text())
        for path in (tmp_path / "run").glob("artifacts/*/evaluation/test/summary.json")
    ]
    last = max(summaries, key=lambda summary: summary["columns"]["sound"]["clean"])
    assert last["samples"] == index.header.splits["test"]
    assert last["columns"]["sound"]["clean"] > 0.8
    assert last["columns"]["sound"]["cra"]["36/255"] > 0.5
    line = next(line for line in said.splitlines() if line.startswith("check it:"))
    command = line.removeprefix("check it:").split()
    assert "OK" in run(*command[2:])
