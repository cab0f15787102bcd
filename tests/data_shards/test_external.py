import gzip
import json
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format import external_scan
from data_shards.format.shard_index import load_index
from data_shards.index import main
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from data_shards.verify import main as verify_main
from data_shards.verify import verify
from data_shards.writing import external_set, shard_patterns
from data_shards.writing.write_report import refuse_reported_leaks
from tests.data_shards.external_shards import add, encoded, folders, img2dataset, stock, timm
from tests.harness import forking_context
from tests.object_store import upload

pytestmark = pytest.mark.integration

PLAIN = ["--split", "train=train-{0000..0001}.tar", "--split", "test=test-000[01].tar"]


@pytest.fixture
def plain(tmp_path):
    """24 train and 12 test images by stock WebDataset."""
    stock(tmp_path / "wds", "train", 24)
    stock(tmp_path / "wds", "test", 12, first=100)
    return tmp_path / "wds"


def make(folder, *arguments, out=None):
    target = folder.parent / "index" if out is None else out
    main([str(folder), "--out", str(target), *arguments])
    return load_index(str(target))


def contents(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def trained_on(index, **fields):
    """Labels by key of one epoch of the train split."""
    found = {}
    count = len(index.select("train"))
    config = StreamConfig(**fields)
    with SampleStream(index, config, split="train", global_batch=count, cursor=Cursor(seed=1)) as s:
        batch = next(s)
    assert not s.damaged
    for row, label, image in zip(batch.rows, batch.labels, batch.images, strict=True):
        key = index.rows.key[row].decode()
        assert key not in found
        found[key] = int(label), image
    return found


def test_a_set_of_stock_webdataset(plain):
    before = contents(plain)
    index = make(plain, *PLAIN, "--decode")
    assert contents(plain) == before
    assert index.header.splits["train"] == 24
    assert (index.image_shape, index.train_shape, index.num_classes) == ((3, 16, 16),) * 2 + (3,)
    assert list(verify(index)) == []
    found = trained_on(index)
    assert len(found) == 24
    assert found["train-00001/sample000013"][0] == 13 % 3
    batches = [b for shard in index.shards_of("test") for b in read_shard(index, shard, 64)]
    assert sum(len(batch.labels) for batch in batches) == 12
    assert all(re.fullmatch("test-0000[0-3].tar", shard.file) for shard in index.shards_of("test"))


def test_the_index_beside_the_shards(tmp_path):
    stock(tmp_path / "wds", "train", 24, pattern="%s-%%05d.tar")
    stock(tmp_path / "wds" / "val", "x", 12, first=100)
    command = [str(tmp_path / "wds"), "--split", "train=train-*.tar", "--split", "test=val/x-*.tar"]
    main(command)
    index = load_index(str(tmp_path / "wds"))
    assert [shard.source for shard in index.shards][:3] == ["train-00000.tar", "train-00001.tar",
                                                            None]  # fmt: skip
    assert list(verify(index)) == []
    (tmp_path / "wds").rename(tmp_path / "moved")
    moved = load_index(str(tmp_path / "moved"))
    assert list(verify(moved)) == []
    assert len(trained_on(moved)) == 24
    with pytest.raises(SystemExit, match="shards of another program"):
        verify_main([str(tmp_path / "moved"), "--repair"])


def test_what_is_looked_at_grows_with_the_samples_and_not_with_samples_times_shards(
    tmp_path, monkeypatch
):
    looked_at = []

    def counting(function):
        def counted(table, *more):
            looked_at.append(len(table))
            return function(table, *more)

        return counted

    monkeypatch.setattr(np, "flatnonzero", counting(np.flatnonzero))
    monkeypatch.setattr(external_set, "_rows", counting(external_set._rows))
    counts = []
    for shards in (6, 24):
        folder = tmp_path / f"of-{shards}"
        stock(folder, "train", 2 * shards, shards=shards)
        looked_at.clear()
        index = make(folder, "--split", "train=train-*.tar", out=tmp_path / f"index-{shards}")
        assert len(index.shards) == shards
        counts.append(sum(looked_at))
    assert counts[1] <= 4 * counts[0]


def test_test_shards_are_never_written_over(plain):
    with pytest.raises(SystemExit, match=r"holds test-0000\.tar already: give --out"):
        main([str(plain), *PLAIN])


def test_img2dataset(tmp_path):
    for number in range(2):
        img2dataset(tmp_path / "set" / "train" / f"{number:05d}.tar", 12)
    img2dataset(tmp_path / "set" / "val" / "00000.tar", 12, first=50)
    index = make(tmp_path / "set", "--split", "train=train/{00000..00001}.tar", "--split",
                 "test=val/*.tar", "--label", "json:class")  # fmt: skip
    assert index.header.splits["train"] == 24
    assert list(verify(index)) == []
    assert {key: label for key, (label, _) in trained_on(index).items()} == {
        f"train-{shard:05d}/{shard:05d}{i:04d}": i % 3 for shard in range(2) for i in range(12)
    }


def test_timm(tmp_path):
    for number in range(2):
        timm(tmp_path / "set" / f"imagenet1k-train-{number:04d}.tar", 12, first=12 * number)
    timm(tmp_path / "set" / "imagenet1k-validation-00.tar", 12, first=50)
    splits = ["--split", "train=imagenet1k-train-{0000..0001}.tar", "--split",
              "test=imagenet1k-validation-00.tar"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"sizes .*, not one square: --test-size"):
        make(tmp_path / "set", *splits)
    index = make(tmp_path / "set", *splits, "--test-size", "16", out=tmp_path / "b")
    assert (index.image_shape, index.train_shape) == ((3, 16, 16), None)
    assert list(verify(index)) == []
    assert len(trained_on(index, crop="random-resized")) == 24
    by_field = make(tmp_path / "set", *splits, "--test-size", "16", "--label", "json:label",
                    out=tmp_path / "c")  # fmt: skip
    assert np.array_equal(by_field.rows.label, index.rows.label)


def test_folders_in_a_tar(tmp_path):
    folders(tmp_path / "set" / "a.tar", 24)
    folders(tmp_path / "set" / "b.tar", 12, first=50)
    index = make(tmp_path / "set", "--split", "train=a.tar", "--split", "test=b.tar", "--label",
                 "folder")  # fmt: skip
    assert index.header.class_names == ("chat", "chien", "éléphant")
    assert list(verify(index)) == []
    found = trained_on(index)
    assert found["train-00000/éléphant/öl 5"][0] == 2


def test_grey_images_in_a_colour_set(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(12):
            add(tar, f"{i}.png", encoded(0, i, mode="L" if i % 2 else "RGB"))
            add(tar, f"{i}.cls", b"cat" if i % 3 else b"dog")
    index = make(tmp_path, "--split", "train=a.tar", "--hold-out", "0.4", out=tmp_path / "index")
    assert index.header.class_names == ("cat", "dog")
    assert (index.image_shape, index.train_shape) == ((3, 16, 16), None)
    assert list(verify(index)) == []


def test_a_part_of_the_train_shards_is_held_out(tmp_path):
    stock(tmp_path / "wds", "train", 40)
    index = make(tmp_path / "wds", "--split", "train=train-*.tar", "--hold-out", "0.2")
    assert (index.header.splits["train"], index.header.splits["test"]) == (32, 8)
    assert list(verify(index)) == []
    assert len(trained_on(index)) == 32


def test_what_cannot_be_used_is_named(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            add(tar, f"d/{i}.PNG", encoded(i % 3, i))
            add(tar, f"d/{i}.cls", str(i % 3).encode())
        add(tar, "no label.png", encoded(0, 90))
        add(tar, "negative.png", encoded(0, 91))
        add(tar, "negative.cls", b"-1")
        add(tar, "empty.png", b"")
        add(tar, "empty.cls", b"1")
        add(tar, "rotten.png", b"\x89PNG\r\n\x1a\nrotten")
        add(tar, "rotten.cls", b"1")
        add(tar, "text.txt", b"x")
        add(tar, "text.cls", b"1")
        add(tar, "two.a.png", encoded(0, 92))
        add(tar, "two.b.png", encoded(0, 93))
        add(tar, "two.cls", b"1")
        add(tar, "d/3.png", encoded(0, 94))
        add(tar, "d/3.cls", b"1")
        add(tar, "nodot", b"x")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = make(tmp_path, "--split", "train=a.tar", "--hold-out", "0.2", out=tmp_path / "index")
    assert sum(index.header.splits[split] for split in ("train", "test")) == 30
    report = json.loads((tmp_path / "index" / "report.json").read_text())
    assert {entry["name"]: entry["cause"] for entry in report["not_taken"]["first"]} == {
        "a.tar/no label.png": "no .cls",
        "a.tar/negative.png": ".cls holds a negative number",
        "a.tar/empty.png": "an empty image",
        "a.tar/rotten.png": "an image that cannot be decoded",
        "a.tar/text.txt": "no image among .cls, .txt",
        "a.tar/two.a.png": "more than one image; --image says which",
        "a.tar/d/3.png": "a key that came before: members of a sample must follow each other "
        "(tar --sort=name)",
        "a.tar/nodot": "a name without key and extension",
        "a.tar/link.png": "a symbolic link",
    }
    assert "1 no .cls" in capsys.readouterr().out
    assert list(verify(index)) == []


def test_what_no_reader_would_take_is_left_out(tmp_path, monkeypatch):
    """Else an index is written, after hours, that cannot be opened."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(12):
            add(tar, f"{i}.png", encoded(i % 3, i))
            add(tar, f"{i}.cls", f"class {i % 3}".encode())
        add(tar, "k" * 1010 + ".png", encoded(0, 90))
        add(tar, "k" * 1010 + ".cls", b"class 0")
        add(tar, "label.png", encoded(0, 91))
        add(tar, "label.cls", b"l" * 2000)
        for i in range(300):
            add(tar, f"other{i}.kind{i}", b"x")
    command = ["--split", "train=a.tar", "--hold-out", "0.4"]
    index = make(tmp_path, *command, out=tmp_path / "x")
    assert len(index.rows) == 12
    assert index.header.class_names == ("class 0", "class 1", "class 2")
    causes = json.loads((tmp_path / "x/report.json").read_text())["not_taken"]["causes"]
    assert causes["a key of about 1024 bytes or more"] == 1
    assert causes[".cls holds a label of more than 1024 bytes"] == 1
    assert len(causes) == 101
    assert sum(causes.values()) == 302
    # Header or report as a whole: said before anything is written.
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_JSON_BYTES", "20000")
    with pytest.raises(SystemExit, match=r"report\.json would have .*JSON_BYTES raises it"):
        make(tmp_path, *command, out=tmp_path / "y")
    assert not (tmp_path / "y/index.parquet").exists()


def test_the_image_of_several(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(12):
            add(tar, f"{i}.rgb.png", encoded(i % 3, i))
            add(tar, f"{i}.depth.png", encoded(i % 3, 50, mode="L"))
            add(tar, f"{i}.cls", str(i % 3).encode())
    command = ["--split", "train=a.tar", "--hold-out", "0.4"]
    with pytest.raises(SystemExit, match="12 x more than one image; --image says which"):
        make(tmp_path, *command, out=tmp_path / "x")
    index = make(tmp_path, *command, "--image", "rgb.png", out=tmp_path / "y")
    assert index.image_shape == (3, 16, 16)
    assert list(verify(index)) == []


def test_members_that_are_not_sorted_are_said_to_be_so(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(8):
            add(tar, f"{i}.png", encoded(0, i))
        for i in range(8):
            add(tar, f"{i}.cls", b"1")
    with pytest.raises(
        SystemExit, match=r"8 x no \.cls; 8 x a key that came before: .*--sort=name"
    ):
        make(tmp_path, "--split", "train=a.tar", out=tmp_path / "index")


@settings(max_examples=300)
@given(st.text(alphabet="ab./é ", min_size=1, max_size=12))
def test_a_name_is_split_as_webdataset_does(name):
    """But hidden files have no key; there they would be samples called like their folder."""
    key, extension = base_plus_ext(name)
    match = external_scan._NAME.fullmatch(name)
    if key and extension and not key.endswith("/"):
        assert match is not None
        assert match.groups() == (key, extension)
    else:
        assert match is None


def test_names_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(12):
            add(tar, f"caf\udce9/{i}.png", encoded(i % 3, i))
            add(tar, f"caf\udce9/{i}.cls", str(i % 3).encode())
        add(tar, "\udcff.png", b"")
    index = make(tmp_path, "--split", "train=a.tar", "--hold-out", "0.4", out=tmp_path / "index")
    assert list(verify(index)) == []
    assert any(key.startswith(rb"train-00000/caf\xe9/") for key in index.rows.key)
    report = json.loads((tmp_path / "index" / "report.json").read_text())
    assert report["not_taken"]["first"] == [{"name": "a.tar/\udcff.png", "cause": "no .cls"}]


def test_train_shards_alone(plain):
    index = make(plain, *PLAIN[:2])
    assert list(verify(index)) == []
    assert len(trained_on(index)) == 24
    with pytest.raises(ShardError, match=r"split 'test' of shard set .* has no samples"):
        index.select("test")


@pytest.mark.parametrize(
    ("label", "message"),
    [("json:label", "24 x no .json"), ("json:a.b", "no .json"), ("folder", "a folder holds no")],
)
def test_a_label_that_is_not_there(plain, label, message):
    with pytest.raises(SystemExit, match=message):
        make(plain, *PLAIN, "--label", label)


def test_a_label_of_another_kind(plain):
    with pytest.raises(SystemExit, match="label 'text' is not cls, json:FIELD or folder"):
        make(plain, *PLAIN, "--label", "text")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["test=test-*.tar"], "no train shards"),
        (["train=train-{0000..0004}.tar"], "3 shards of .* are absent: train-0002.tar"),
        (["train=nothing-*.tar"], "1 shards of .* are absent"),
        (["train=*.tar", "test=test-*.tar"], "test-0000.tar is of train and of test"),
        (["val=test-*.tar"], "'val=test-.*' is not train=PATTERN"),
        (["train=../x.tar"], "would leave the store"),
        (["train=train-{0..99999999999..3}.tar"], "means more than 1000000 shards"),
    ],
)
def test_patterns(plain, splits, message):
    with pytest.raises(SystemExit, match=message):
        make(plain, *(part for split in splits for part in ("--split", split)))


def test_braces_beside_each_other_count_together(plain, monkeypatch):
    monkeypatch.setattr(shard_patterns, "_MAX_SHARDS", 1000)
    with pytest.raises(SystemExit, match="means more than 1000 shards"):
        make(plain, "--split", "train=train-{0..999}{0..999}.tar")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ""])
def test_compressed_shards_are_refused_by_name(plain, suffix):
    first = plain / "train-0000.tar"
    packed = gzip.compress(first.read_bytes())
    first.unlink()
    (plain / f"train-0000.tar{suffix}").write_bytes(packed)
    with pytest.raises(SystemExit, match=r"train-0000\.tar.* is (compressed|gzip).*Unpack"):
        make(plain, "--split", "train=train-*", "--split", "test=test-*.tar")


def test_a_set_sorted_by_class_is_warned_of(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            add(tar, f"{i:02d}.png", encoded(i // 10, i))
            add(tar, f"{i:02d}.cls", str(i // 10).encode())
    make(tmp_path, "--split", "train=a.tar", "--hold-out", "0.2", out=tmp_path / "index")
    assert "train shards are sorted by class" in capsys.readouterr().out


def test_a_shuffled_set_is_not_warned_of(plain, capsys):
    make(plain, *PLAIN)
    assert "sorted by class" not in capsys.readouterr().out


def test_images_that_train_and_test_share(tmp_path, capsys):
    stock(tmp_path / "wds", "train", 24)
    stock(tmp_path / "wds", "test", 12, first=18)
    make(tmp_path / "wds", *PLAIN)
    report = json.loads((tmp_path / "index" / "report.json").read_text())
    assert (report["duplicates"]["count"], report["duplicates"]["between_splits"]) == (6, 6)
    assert "6 duplicates kept, of which 6 between train and test" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"6 train images have the bytes of test images"):
        make(tmp_path / "wds", *PLAIN, "--no-leaks", out=tmp_path / "b")
    index = make(tmp_path / "wds", *PLAIN, "--drop-duplicates", out=tmp_path / "c")
    assert (index.header.splits["train"], index.header.splits["test"]) == (18, 12)
    assert list(verify(index)) == []


def test_a_run_that_was_stopped_goes_on(plain, monkeypatch):
    scan, read = external_set._scan_shard, []

    def stopped(root, options, shard, advance):
        if len(read) == 2:
            raise ShardError("stopped")
        read.append(shard.name)
        return scan(root, options, shard, advance)

    monkeypatch.setattr(external_set, "_scan_shard", stopped)
    with pytest.raises(SystemExit, match="stopped"):
        make(plain, *PLAIN)
    with pytest.raises(SystemExit, match="holds an unfinished set"):
        make(plain, *PLAIN, "--decode")
    first, read[:] = list(read), []

    def counted(*arguments):
        read.append(arguments[2].name)
        return scan(*arguments)

    monkeypatch.setattr(external_set, "_scan_shard", counted)
    index = make(plain, *PLAIN)
    assert sorted(first + read) == [f"{s}-000{n}.tar" for s in ("test", "train") for n in (0, 1)]
    whole = make(plain, *PLAIN, out=plain.parent / "b")
    assert index.header.rows_sha256 == whole.header.rows_sha256
    assert index.shards == whole.shards


def index_there(folder, target, killed):
    """Index a folder in a process of its own; `killed`: it dies in its second shard of four."""
    if killed:
        scan, read = external_set._scan_shard, []

        def dying(*arguments):
            read.append(1)
            if len(read) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return scan(*arguments)

        external_set._scan_shard = dying
    make(Path(folder), *PLAIN, out=target)


@pytest.mark.integration
def test_two_processes_at_once_and_one_that_was_killed(plain, tmp_path):
    context, target = forking_context(), str(tmp_path / "index")
    for killed in (True, False):
        processes = [
            context.Process(target=index_there, args=(str(plain), target, killed)) for _ in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [-signal.SIGKILL if killed else 0] * 2
        assert (tmp_path / "index" / "index.json").exists() != killed
    assert list(verify(load_index(target))) == []
    whole = make(plain, *PLAIN, out=tmp_path / "whole")
    assert load_index(target).header.rows_sha256 == whole.header.rows_sha256


def test_the_same_command_again_and_another_one(plain, capsys):
    digest = make(plain, *PLAIN).digest
    assert make(plain, *PLAIN).digest == digest
    assert "already there, unchanged" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already holds another shard set"):
        make(plain, *PLAIN, "--name", "other")


def test_damage_behind_the_index_is_found(plain, damage):
    index = make(plain, *PLAIN)
    path = plain / "train-0001.tar"
    data = bytearray(path.read_bytes())
    row = index.select("train")[-1]
    data[index.rows.offset[row] + 60] ^= 0xFF
    path.write_bytes(data)
    problems = list(verify(index))
    assert f"{Store(str(plain))}/train-0001.tar: sha256" in problems[0]
    assert any("xxh3_64" in problem and "sample000023" in problem for problem in problems)
    path.write_bytes(data[:-10240])
    with pytest.raises(ShardError, match=r"train-0001\.tar has \d+ bytes, the index states"):
        load_index(str(plain.parent / "index"))
    path.unlink()
    with pytest.raises(ShardError, match=r"train-0001\.tar is listed in the index and absent"):
        load_index(str(plain.parent / "index"))


def test_a_cut_shard_is_named_before_anything_is_written(plain):
    path = plain / "train-0001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SystemExit, match=r"train-0001\.tar"):
        make(plain, *PLAIN)
    assert not (plain.parent / "index" / "index.json").exists()


def test_shards_and_index_on_different_stores(plain, proxy, tmp_path):
    here = make(plain, *PLAIN)
    elsewhere = make(plain, *PLAIN, "--name", "index", out=f"s3://bucket/{tmp_path.name}")
    assert elsewhere.header.shards[0].source == f"file://{plain}/train-0000.tar"
    assert list(verify(elsewhere)) == []
    assert trained_on(elsewhere).keys() == trained_on(here).keys()
    url = upload(plain)
    main([url, "--out", str(tmp_path / "there"), *PLAIN, "--name", "index"])
    there = load_index(str(tmp_path / "there"))
    assert there.header.shards[0].source == f"{url}/train-0000.tar"
    assert np.array_equal(there.rows.xxh3_64, here.rows.xxh3_64)
    assert list(verify(there)) == []
    cached = trained_on(there, disk_cache=str(tmp_path / "cache"), cache_bytes=0)
    assert cached.keys() == trained_on(here).keys()
    assert any((tmp_path / "cache").rglob("*-*"))


@pytest.mark.parametrize("report", [b"", b"{}", b'{"duplicates": 1}', b"[]", None])
def test_a_set_without_a_report_is_the_same_set(plain, capsys, report):
    index = make(plain, *PLAIN)
    path = plain.parent / "index/report.json"
    path.unlink()
    if report is not None:
        path.write_bytes(report)
    assert make(plain, *PLAIN).digest == index.digest
    assert "report.json: cannot be used: " in capsys.readouterr().out
    with pytest.raises(ShardError, match="does not say that train and test images share no bytes"):
        refuse_reported_leaks(Store(path.parent))
