import dataclasses
import gc
import json
import os
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_shards import write
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.sources.digits import digits
from data_shards.sources.synthetic import synthetic
from data_shards.sources.transcode import Recipe
from data_shards.storage.store import Store
from data_shards.verify import verify
from data_shards.write import write_shard_set
from data_shards.writing import index_files
from data_shards.writing.shard_plan import WriteOptions, plan_shards
from tests.data_shards.shard_damage import die
from tests.harness import forking_context
from tests.repetitions import mostly_slow

pytestmark = pytest.mark.integration


def small(**fields):
    return synthetic(**{"samples": 60, "size": 8, "classes": 3, **fields})


def test_digits_layout(digits_set):
    index = load_index(str(digits_set))
    assert index.header.splits == {"train": 1437, "test": 360, "fit": 1149, "validation": 288}
    assert index.image_shape == (1, 8, 8)
    assert index.num_classes == 10
    assert [shard.samples for shard in index.shards_of("test")] == [90] * 4
    with tarfile.open(digits_set / "test-00000.tar") as tar:
        names = tar.getnames()
    assert names[1] == names[0].replace(".png", ".cls")
    assert len(names) == 180


def test_stored_order_is_shuffled_within_splits(digits_set):
    index = load_index(str(digits_set))
    keys = index.rows.key[index.select("train")]
    assert len(set(keys)) == 1437
    assert list(keys) != sorted(keys)
    assert len(set(index.rows.label[:60])) == 10


def test_same_input_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_shard_set(small(), str(tmp_path / name), samples_per_shard=5)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 10 + 4 + 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_same_set_in_memory(memory_store, tmp_path):
    index = write_shard_set(small(), memory_store.url)
    assert index.digest == write_shard_set(small(), str(tmp_path)).digest
    assert list(verify(index)) == []


def test_existing_set(tmp_path):
    first = write_shard_set(small(), str(tmp_path))
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_shard_set(small(), str(tmp_path)).digest == first.digest
    with pytest.raises(ShardError, match=f"already holds another shard set.*{first.digest}"):
        write_shard_set(small(seed=1), str(tmp_path))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_interrupted_write_is_not_a_set(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_files, "header_to_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_shard_set(small(), str(tmp_path))
    with pytest.raises(ShardError, match=r"no shard set at .* no index\.json"):
        load_index(str(tmp_path))
    assert list(verify(write_shard_set(small(), str(tmp_path)))) == []


def write_there(path):
    write_shard_set(small(), path, samples_per_shard=5)


@pytest.mark.integration
def test_two_processes_write_the_same_set(tmp_path):
    context = forking_context()
    processes = [context.Process(target=write_there, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(verify(load_index(str(tmp_path)))) == []


def test_a_process_that_finishes_first_tidies_up_under_another(tmp_path, monkeypatch):
    genuine = Store.write

    def write(store, name, data):
        if name.startswith(".progress") and not (tmp_path / "index.json").exists():
            monkeypatch.setattr(Store, "write", genuine)
            write_shard_set(small(), str(tmp_path), samples_per_shard=5)
            raise FileNotFoundError(name)
        genuine(store, name, data)

    monkeypatch.setattr(Store, "write", write)
    write_shard_set(small(), str(tmp_path), samples_per_shard=5)
    assert list(verify(load_index(str(tmp_path)))) == []


@pytest.mark.parametrize("finished", [False, True])
def test_of_two_different_sets_at_once_one_gives_up(finished, tmp_path, monkeypatch):
    """The other one begins, or is written wholly, just before this one says that it is here."""
    genuine, there = Store.write, Store(tmp_path)

    def write(store, name, data):
        monkeypatch.setattr(Store, "write", genuine)
        if finished:
            write_shard_set(small(seed=1), str(tmp_path), samples_per_shard=5)
        else:
            there.write(".progress/another/claim.json", b"{}")
        store.write(name, data)

    monkeypatch.setattr(Store, "write", write)
    what = "already holds another" if finished else "holds an unfinished set .*another"
    with pytest.raises(ShardError, match=what):
        write_shard_set(small(), str(tmp_path), samples_per_shard=5)
    assert there.exists("index.json") == finished
    if finished:
        assert list(verify(load_index(there))) == []
    assert there.ls(".progress") == ([] if finished else [".progress/another"])


def test_too_few_samples(tmp_path):
    with pytest.raises(ShardError, match="split 'test' of 'synthetic' has 2 samples"):
        write_shard_set(small(samples=6), str(tmp_path))
    with pytest.raises(ShardError, match="samples per shard 0 is not at least 1"):
        write_shard_set(small(), str(tmp_path), samples_per_shard=0)
    with pytest.raises(ShardError, match="shards of 512 bytes are not in"):
        WriteOptions(shard_bytes=512)
    with pytest.raises(ShardError, match="0 workers"):
        write_shard_set(small(), str(tmp_path), workers=0)


def test_number_of_shards_follows_their_size():
    def counts(total, **options):
        """Shards of train and test for `total` images of 64 KiB, a fifth of them test."""
        source = dataclasses.replace(
            small(samples=total), load=lambda numbers: [bytes(1 << 16)] * len(numbers)
        )
        kept = np.ones(total, dtype=bool)
        plans = list(plan_shards(source, WriteOptions(**options), kept))
        assert sorted(np.concatenate([p.members for p in plans]).tolist()) == list(range(total))
        return [sum(p.split == split for p in plans) for split in ("train", "test")]

    assert counts(200) == [4, 4]
    assert counts(1000) == [13, 4]
    assert counts(20_000) == [16, 16]
    assert counts(20_000, shard_bytes=32 << 20) == [32, 16]
    assert counts(20_000, samples_per_shard=1000) == [16, 4]


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_shard_set(small(samples=30), str(folder))
    return folder


# The first ones, one in the middle, and the last ones, which are those of the index.
@pytest.mark.parametrize("number", mostly_slow(range(20), [0, 1, 2, 9, 17, 18, 19]))
@pytest.mark.parametrize("torn", [False, True])
def test_a_stop_at_any_write_changes_nothing(number, torn, whole_folder, tmp_path, monkeypatch):
    source = small(samples=30)
    plain, writes = Store.write, []

    def stopping(self, name, data):
        writes.append(name)
        if len(writes) == number + 1:
            if torn and name.endswith((".tar", ".parquet")):
                plain(self, name, data[: len(data) // 2])  # what stores without renaming leave
            raise KeyboardInterrupt
        plain(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_shard_set(source, str(tmp_path))
    done = sum(name.endswith(".tar.parquet") for name in writes[:-1])
    writes.clear()

    def spied(store, name, data):
        writes.append(name)
        plain(store, name, data)

    monkeypatch.setattr(Store, "write", spied)
    write_shard_set(source, str(tmp_path))
    assert sum(name.endswith(".tar") for name in writes) == 8 - done
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(whole_folder))
    for path in whole_folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_failed_write_leaves_what_is_finished_and_refuses_another_source(tmp_path, monkeypatch):
    def full(self, name, data):
        if name == "test-00001.tar":
            patch.setattr(os, "fsync", no_space)
        plain(self, name, data)

    def no_space(_):
        raise OSError(28, "No space left on device")

    plain = Store.write
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/test-00001.tar'"):
            write_shard_set(small(), str(tmp_path))
    with pytest.raises(ShardError, match="holds an unfinished set"):
        write_shard_set(small(seed=1), str(tmp_path))
    assert list(verify(write_shard_set(small(), str(tmp_path)))) == []


def test_files_of_something_else_are_not_mixed_in(tmp_path):
    (tmp_path / "train-00077.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"1 tar files that are not of this set.*train-00077"):
        write_shard_set(small(), str(tmp_path))


@pytest.mark.slow
def test_two_workers_write_what_one_does(tmp_path):
    one = write_shard_set(small(), str(tmp_path / "one"))
    two = write_shard_set(small(), str(tmp_path / "two"), workers=2)
    assert one.digest == two.digest
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.integration
def test_killed_writers_go_on(tmp_path):
    """kill -9 of the main process; its workers end with it."""
    source = {"samples": "1000", "size": "32", "classes": "5", "samples-per-shard": "50"}
    out = tmp_path / "set"
    words = ["synthetic", "--out", str(out)]
    words += [part for name, value in source.items() for part in (f"--{name}", value)]
    process = forking_context().Process(target=write.main, args=([*words, "--workers", "2"],))
    process.start()
    deadline = time.monotonic() + 120
    while len(list(out.glob(".progress/*/*.parquet"))) < 3:
        assert process.exitcode is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = children_of(process.pid)
    process.kill()
    process.join()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (out / "index.json").exists()
    write.main(words)
    whole = write_shard_set(
        synthetic(samples=1000, size=32, classes=5), str(tmp_path / "whole"), samples_per_shard=50
    )
    assert load_index(str(out)).digest == whole.digest
    assert list(verify(load_index(str(out)))) == []


def children_of(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.integration
def test_a_worker_that_dies_is_an_error(tmp_path):
    source = dataclasses.replace(small(), load=die)
    options = WriteOptions(samples_per_shard=20)
    with pytest.raises(ShardError, match="a worker process died"):
        write_shard_set(source, str(tmp_path), options=options, workers=2)


def damaged_source(bad, **fields):
    """Synthetic images of which some are given as they must not be."""
    source = small(**fields)

    def load(numbers):
        return [bad.get(i, data) for i, data in zip(numbers, source.load(numbers), strict=True)]

    return dataclasses.replace(source, load=load, convert=Recipe(channels=3, size=8, uniform=True))


def test_undecodable_images_are_left_out_and_listed(tmp_path):
    fine = small().encode(5)
    bad = {4: b"", 5: fine[: len(fine) // 2], 21: b"FORMAT", 40: synthetic(size=9).encode(0)}
    index = write_shard_set(damaged_source(bad), str(tmp_path))
    assert sorted(int(key) for key in index.rows.key) == sorted(set(range(60)) - set(bad))
    assert sum(index.header.splits[part] for part in ("train", "test")) == 56
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert (report["images"], report["stored"]) == (60, 56)
    assert report["undecodable"]["causes"] == {"decode": 1, "empty": 1, "format": 1, "shape": 1}
    assert [entry["key"] for entry in report["undecodable"]["first"]] == [
        "00000004", "00000005", "00000021", "00000040",
    ]  # fmt: skip
    assert list(verify(index)) == []


def test_a_source_of_which_little_can_be_decoded_is_refused(tmp_path):
    bad = dict.fromkeys(range(59), b"no image")
    with pytest.raises(ShardError, match=r"images of train-0000\d.tar cannot be stored.*6e6f20"):
        write_shard_set(damaged_source(bad), str(tmp_path), samples_per_shard=60)
    with pytest.raises(ShardError, match="none of 48 images"):
        write_shard_set(damaged_source(dict.fromkeys(range(60), b"")), str(tmp_path / "none"))


@pytest.mark.parametrize("dropped", [False, True])
def test_duplicates(dropped, tmp_path):
    source = small()
    train, test = (np.flatnonzero(source.test == part).tolist() for part in (False, True))
    a, b, c, d = train[0], train[7], train[9], test[2]
    same = {b: source.encode(a), c: source.encode(d), test[3]: source.encode(d)}
    options = WriteOptions(drop_duplicates=dropped)
    index = write_shard_set(damaged_source(same), str(tmp_path), options=options)
    report = json.loads((tmp_path / "report.json").read_bytes())["duplicates"]
    assert (report["count"], report["dropped"]) == (3, dropped)
    pairs = {entry["name"]: entry["same_as"] for entry in report["first"]}
    assert pairs == {str(b): str(a), str(c): str(d), str(test[3]): str(d)}
    assert len(index.rows) == 60 - 3 * dropped
    keys = {int(key) for key in index.rows.key}
    assert keys == set(range(60)) - (set(same) if dropped else set())


def test_progress_shows_rates(tmp_path, capsys):
    write_shard_set(small(), str(tmp_path), progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"60/60 images.*images/s, .* MB/s", shown, re.DOTALL)


# webdataset leaves local shards open until they are collected.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["digits_set", "synthetic_set"])
def test_stock_webdataset_reads_it(name, request, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    path = request.getfixturevalue(name)
    index = load_index(str(path))
    for split in ("train", "test"):
        rows = index.select(split)
        urls = [str(path / shard.file) for shard in index.shards_of(split)]
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        found = {sample["__key__"]: int(sample["cls"]) for sample in dataset}
        keys = [key.decode() for key in index.rows.key[rows]]
        assert found == dict(zip(keys, index.rows.label[rows].tolist(), strict=True))
        del dataset
        gc.collect()


def test_entry(tmp_path, capsys):
    url = f"file://{tmp_path}/set"
    arguments = ["synthetic", "--out", url, "--samples", "60", "--size", "8", "--classes", "3"]
    write.main(arguments)
    digest = load_index(url).digest
    line = capsys.readouterr().out
    assert line.startswith(f"{url}: written: 38 fit, 12 test, 48 train, 10 validation samples")
    assert f"digest {digest}\n" in line
    assert line.endswith("report.json: 0 undecodable, 0 duplicates kept, 0 other files\n")
    write.main(arguments)
    assert "already there, unchanged" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .* already holds another shard set"):
        write.main([*arguments, "--seed", "1"])
    (tmp_path / "file").write_bytes(b"")
    arguments[2] = str(tmp_path / "file" / "below")
    with pytest.raises(SystemExit, match=r"error: .*Not a directory"):
        write.main(arguments)
    with pytest.raises(SystemExit, match=r"error: .* has no ILSVRC2012_img_train\.tar"):
        write.main(["imagenet", "--source", str(tmp_path), "--out", str(tmp_path / "b")])


def test_digits_digest_does_not_depend_on_the_place(digits_set, memory_store):
    assert write_shard_set(digits(), memory_store.url).digest == load_index(str(digits_set)).digest
