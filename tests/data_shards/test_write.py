import gc
import multiprocessing
import tarfile

import pytest
import webdataset

from data_shards import write
from data_shards.errors import ShardError
from data_shards.index import load_index
from data_shards.sources import digits, synthetic
from data_shards.verify import main as verify_main
from data_shards.verify import verify
from data_shards.write import write_shard_set


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
    assert len(names) == 10 + 4 + 2
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
        patch.setattr(write, "header_to_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_shard_set(small(), str(tmp_path))
    with pytest.raises(ShardError, match=r"no shard set at .* no index\.json"):
        load_index(str(tmp_path))
    assert list(verify(write_shard_set(small(), str(tmp_path)))) == []


def write_there(path):
    write_shard_set(small(), path, samples_per_shard=5)


def test_two_processes_write_the_same_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_there, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(verify(load_index(str(tmp_path)))) == []


def test_too_few_samples(tmp_path):
    with pytest.raises(ShardError, match="split 'test' of 'synthetic' has 2 samples"):
        write_shard_set(small(samples=6), str(tmp_path))
    with pytest.raises(ShardError, match="samples per shard 0"):
        write_shard_set(small(), str(tmp_path), samples_per_shard=0)


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
    assert line.endswith(f"digest {digest}\n")
    write.main(arguments)
    assert "already there, unchanged" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .* already holds another shard set"):
        write.main([*arguments, "--seed", "1"])


def test_verify_entry(synthetic_set, copy_of, capsys):
    verify_main([str(synthetic_set)])
    assert "120 samples in 9 shards agree" in capsys.readouterr().out
    path = copy_of(synthetic_set)
    (path / "train-00077.tar").write_bytes(b"")
    with pytest.raises(SystemExit, match="error: 1 disagreements"):
        verify_main([str(path)])
    assert "train-00077.tar: not listed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: no shard set at"):
        verify_main([str(path / "nowhere")])


def test_verify_names_what_differs(digits_set, copy_of, damage):
    index = damage(copy_of(digits_set), [5])
    problems = list(verify(index))
    assert len(problems) == 2
    assert "train-00000.tar: sha256" in problems[0]
    assert index.rows.key[5].decode() in problems[1]


def test_verify_finds_a_changed_label(digits_set, copy_of):
    path = copy_of(digits_set)
    file = path / "test-00000.tar"
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        member = tar.getmembers()[1]
    data[member.offset_data] ^= 1
    file.write_bytes(data)
    problems = list(verify(load_index(str(path))))
    assert any("label" in problem for problem in problems)


def test_verify_finds_an_early_end(digits_set, copy_of):
    path = copy_of(digits_set)
    file = path / "test-00000.tar"
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        member = tar.getmembers()[40]
    data[member.offset : member.offset + 512] = bytes(512)  # stock readers stop here silently
    file.write_bytes(data)
    problems = list(verify(load_index(str(path))))
    assert any("40 members, the index states 180" in problem for problem in problems)


def test_digits_digest_does_not_depend_on_the_place(digits_set, memory_store):
    assert write_shard_set(digits(), memory_store.url).digest == load_index(str(digits_set)).digest
