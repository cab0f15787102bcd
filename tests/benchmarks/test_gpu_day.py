"""The route of a day on a GPU, with parts that stand in for those that need one."""

import importlib.metadata
import json

import pytest

from benchmarks import gpu_wheels, train
from benchmarks.gpu_day import PARTS, Day, Part
from benchmarks.report import history
from data_shards.config import StreamConfig
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.webdataset_stream import UnindexedStream
from model.artifact.package_version import release
from pipeline.driver.preflight import code_version


def say(text, code=0):
    return ("-c", f"print({text!r}); raise SystemExit({code})")


TABLE = {
    "name": "shift",
    "date": "2026-11-29T12:00:00+00:00",
    "commit": "abc1234",
    "hardware": "one GPU",
    "rows": [{"what": "copy", "seconds": 0.5}],
    "notes": [],
}
WRITES = (
    "-c",
    "import os, pathlib; place = pathlib.Path(os.environ['BENCHMARK_RESULTS'], 'shift');"
    "place.mkdir(); (place / 'a.json').write_text("
    + repr(json.dumps(TABLE)).replace("{", "{{").replace("}", "}}")
    + ")",
)
# A process of its own, which would go on after the part.
HANGS = (
    "-c",
    "import subprocess, sys, time; print('begun', flush=True);"
    "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
)
STANDING_IN = (
    Part("good", 30, say("large"), say("small, {device}, {out}")),
    Part("bad", 30, say("no module", 3)),
    Part("slow", 1, HANGS),
    Part("last", 30, say("at the end")),
    Part("measures", 30, WRITES),
)


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    day = Day(tmp_path_factory.mktemp("day"), "cpu", STANDING_IN)
    day.run(["good", "bad", "slow", "measures"], 60)
    return day


def test_every_part_leaves_what_it_said_and_how_it_ended(day):
    found = day.results()
    assert found["good"]["said"].startswith("small, cpu, /")
    assert found["good"]["ended"] == "done"
    assert (found["bad"]["ended"], found["bad"]["said"]) == ("exit 3", "no module\n")
    assert found["slow"]["ended"] == "ended after 1 s"
    assert found["slow"]["said"] == "begun\n"
    assert found["measures"]["tables"] == [TABLE]
    assert [row["ended"] for row in day.rows()] == [
        "done", "exit 3", "ended after 1 s", "not run", "done",
    ]  # fmt: skip


def test_the_same_command_goes_on_with_what_has_no_result(tmp_path):
    day = Day(tmp_path, "cpu", STANDING_IN)
    day.run(["bad"], 60)
    before = day.results()["bad"]
    day.run([], 60)
    assert day.results()["last"]["said"] == "at the end\n"
    assert day.results()["bad"] == before


def test_no_part_begins_after_the_time_is_over(tmp_path):
    day = Day(tmp_path, "cpu", STANDING_IN)
    day.run([], 0)
    assert day.results() == {}
    with pytest.raises(ValueError, match="no parts x; known: good, bad"):
        day.run(["x"], 1)


def test_the_day_fits_into_its_time_and_its_results_are_one_file(day, tmp_path):
    assert sum(part.limit_s for part in PARTS) <= 480
    assert len({part.name for part in PARTS}) == len(PARTS)
    folder = day._out
    assert [path.name for path in folder.iterdir()] == ["gpu_day.json"]
    assert json.loads((folder / "gpu_day.json").read_text()) == day.results()


def test_what_a_gpu_has_measured_goes_to_the_results(day, tmp_path):
    with pytest.raises(ValueError, match="good, bad, slow, measures ran, and on no GPU"):
        day.take(tmp_path)
    on_gpu = {name: {**result, "device": "cuda"} for name, result in day.results().items()}
    (tmp_path / "day").mkdir()
    (tmp_path / "day/gpu_day.json").write_text(json.dumps(on_gpu))
    Day(tmp_path / "day", "cuda", STANDING_IN).take(tmp_path)
    assert history("shift", folder=tmp_path) == [TABLE]
    (kept,) = history("gpu_day", folder=tmp_path)
    assert kept["rows"] == day.rows()
    assert "| copy | 0.5 |" in (tmp_path / "shift.md").read_text()
    with pytest.raises(ValueError, match="no part ran"):
        Day(tmp_path / "empty", "cuda", STANDING_IN).take(tmp_path)


def test_the_wheels_are_pinned_and_may_not_grow(tmp_path, monkeypatch):
    assert len(gpu_wheels.pinned()) == len(gpu_wheels.WHEELS)
    assert not {"pyarrow", "ray", "mlflow", "torch"} & set(gpu_wheels.WHEELS)
    commands = []

    def pip(command, **_):
        commands.append(command)
        name = f"{len(commands)}.whl"
        (tmp_path / name).write_bytes(b"1" * 7)

    monkeypatch.setattr(gpu_wheels.subprocess, "run", pip)
    assert gpu_wheels.download(tmp_path) == 14
    downloaded, built = commands
    assert {"--no-deps", "3.12"} <= set(downloaded)
    assert {*downloaded, *built} >= set(gpu_wheels.pinned())
    assert [word for word in built if "==" in word] == ["deepspeed==0.19.8"]
    monkeypatch.setattr(gpu_wheels, "LIMIT", 20)
    with pytest.raises(ValueError, match="28 bytes, more than 20"):
        gpu_wheels.download(tmp_path)


def test_random_images_are_read_without_an_index(tmp_path):
    train.write_images(tmp_path / "train-00000.tar", (3, 40, 32), 5, 7)
    stream = UnindexedStream(
        str(tmp_path), StreamConfig(), image_shape=(3, 40, 32), num_classes=5,
        samples_per_epoch=100, global_batch=7, cursor=Cursor(seed=0),
    )  # fmt: skip
    with stream:
        batch = next(stream)
    assert batch.images.shape == (7, 3, 40, 32)
    assert 0 <= int(batch.labels.min()) < int(batch.labels.max()) < 5
    assert not stream.damaged


def test_figures_are_medians_of_the_records_after_the_first(tmp_path):
    rows = [
        {"kind": "metrics", "step": step, "timestamp_ms": 0,
         "values": {"train/loss": 2.0 - step, "train/images_per_s": rate, "perf/mfu": 0.5}}
        for step, rate in ((1, 1.0), (2, 10.0), (3, 30.0), (4, 20.0))
    ]  # fmt: skip
    spool = tmp_path / "spool.jsonl"
    spool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.figures(spool) == {"step": 4, "loss": -2.0, "images/s": 20.0, "MFU": 0.5}


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert release() == "not installed"
    assert code_version()["package"] == "not installed"
