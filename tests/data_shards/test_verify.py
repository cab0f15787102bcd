import pickle
import resource
import tarfile
import tracemalloc

import numpy as np
import pytest

from data_shards.errors import ShardError
from data_shards.format import shard_index as index_module
from data_shards.format import shard_scan
from data_shards.format.shard_index import load_index
from data_shards.format.shard_scan import HashedFile
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.verify import main as verify_main
from data_shards.verify import verify
from data_shards.writing.writer import write_shard_set
from tests.data_shards.shard_damage import (
    FILE,
    Bomb,
    add_huge_member,
    member,
    read_members,
    reindex,
    write_members,
)

pytestmark = pytest.mark.integration


def problems_of(folder, **options):
    return list(verify(load_index(str(folder), check_files=False), **options))


def test_an_intact_set(synthetic_set, capsys):
    assert problems_of(synthetic_set) == []
    assert problems_of(synthetic_set, workers=2, decode=False) == []
    verify_main([str(synthetic_set)])
    shown = capsys.readouterr()
    assert "120 samples in 9 shards agree" in shown.out
    assert "120/120 images" in shown.err


def test_work_grows_with_the_shards_and_not_with_their_square(synthetic_set, monkeypatch):
    """12,500 shards took minutes: every one of them was located again for each of them."""
    made, original = [], index_module.shard_files

    def spy(*arguments):
        made.append(1)
        return original(*arguments)

    index = load_index(str(synthetic_set))
    monkeypatch.setattr(index_module, "shard_files", spy)
    assert list(verify(index, decode=False)) == []
    assert len(made) <= 2 < len(index.shards)


def test_entry_lists_what_is_wrong(folder, capsys):
    (folder / "train-00077.tar").write_bytes(b"")
    (folder / "test-00001.tar").unlink()
    with pytest.raises(SystemExit, match="error: 2 disagreements"):
        verify_main([str(folder), "--workers", "1"])
    shown = capsys.readouterr().out
    assert "train-00077.tar: not listed in the index" in shown
    assert "test-00001.tar: listed in the index and absent" in shown
    with pytest.raises(SystemExit, match="error: no shard set at"):
        verify_main([str(folder / "nowhere")])


def test_a_changed_byte_is_named_by_shard_and_key(synthetic_set, folder, damage):
    index = damage(folder, [5])
    first, second = verify(index)
    assert "train-00000.tar: sha256" in first
    assert f"key {index.rows.key[5].decode()!r}: xxh3_64" in second


def test_every_single_byte_matters(folder):
    """One bit anywhere in a shard: header, body, padding or end marker."""
    path = folder / FILE
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 40).tolist():
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert any(f"{FILE}: sha256" in problem for problem in problems_of(folder))


@pytest.mark.parametrize("where", ["boundary", "between", "header", "body", "nothing"])
def test_a_shard_that_was_cut(where, folder):
    """The table of damages that stock readers do not notice."""
    path = folder / FILE
    with tarfile.open(path) as tar:
        image, label = tar.getmembers()[10:12]
    stops = {
        "boundary": image.offset,
        "between": label.offset,
        "header": image.offset + 100,
        "body": image.offset_data + 5,
        "nothing": 0,
    }
    path.write_bytes(path.read_bytes()[: stops[where]])
    problems = problems_of(folder)
    assert any(f"{FILE}: {stops[where]} bytes, the index states" in text for text in problems)
    assert any("cut" in text or "declares" in text for text in problems)
    assert any("samples of the index are not there" in text for text in problems)


def test_a_zeroed_header(folder):
    path = folder / FILE
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        found = tar.getmembers()[10]
    data[found.offset : found.offset + 512] = bytes(512)  # stock readers stop here silently
    path.write_bytes(data)
    problems = problems_of(folder)
    assert any("data behind the end marker" in problem for problem in problems)
    assert any("samples of the index are not there" in problem for problem in problems)


def test_swapped_shards(folder):
    a, b = folder / FILE, folder / "train-00002.tar"
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)
    problems = problems_of(folder)
    assert any(f"{FILE}: these are the bytes of train-00002.tar" in text for text in problems)
    assert any(f"train-00002.tar: these are the bytes of {FILE}" in text for text in problems)


def test_the_index_of_another_set(folder, tmp_path, capsys):
    other = tmp_path / "other"
    write_shard_set(synthetic(samples=120, size=16, classes=4, seed=9), str(other),
                    samples_per_shard=20)  # fmt: skip
    (folder / "index.parquet").write_bytes((other / "index.parquet").read_bytes())
    with pytest.raises(SystemExit, match=r"index\.parquet has sha256"):
        verify_main([str(folder)])
    (folder / "index.json").write_bytes((other / "index.json").read_bytes())
    problems = problems_of(folder)
    for file in load_index(str(other)).shards:
        assert any(f"{file.file}: sha256" in problem for problem in problems)


def test_a_changed_label(folder):
    members = read_members(folder / FILE)
    key = members[0][0].name.partition(".")[0]
    label = int(members[1][1])
    members[1] = member(f"{key}.cls", str((label + 1) % 4).encode())
    write_members(folder / FILE, members)
    reindex(folder, FILE)
    (problem,) = problems_of(folder)
    assert problem.endswith(
        f"{FILE}: key {key!r}: label {(label + 1) % 4} in the shard, {label} in the index"
    )


def test_a_truncated_image_that_the_index_agrees_with(folder):
    members = read_members(folder / FILE)
    info, data = members[2]
    members[2] = member(info.name, data[: len(data) // 2])
    write_members(folder / FILE, members)
    reindex(folder, FILE)
    (problem,) = problems_of(folder)
    assert f"{FILE}: key {info.name[:8]!r}: damaged JPEG" in problem
    assert problems_of(folder, decode=False) == []


def test_an_image_of_another_shape(folder):
    members = read_members(folder / FILE)
    name = members[2][0].name
    members[2] = member(name, synthetic(size=17).encode(0))
    write_members(folder / FILE, members)
    reindex(folder, FILE)
    (problem,) = problems_of(folder)
    assert f"key {name[:8]!r}: shape (3, 17, 17), the set has (3, 16, 16)" in problem


def test_members_out_of_order(folder):
    members = read_members(folder / FILE)
    members[0], members[2] = members[2], members[0]
    write_members(folder / FILE, members)
    problems = problems_of(folder)
    assert sum("a label that is not behind its image" in text for text in problems) == 2
    reindex(folder, FILE)
    with pytest.raises(ShardError, match=rf"{FILE} has offset 512, which is not behind"):
        problems_of(folder)


def test_a_duplicated_key(folder):
    members = read_members(folder / FILE)
    write_members(folder / FILE, [*members, *members[:2]])
    problems = problems_of(folder)
    key = members[0][0].name.partition(".")[0]
    assert any(f"{FILE}: key {key!r} occurs more than once" in text for text in problems)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (member("../../escape.png", b"x"), "'../../escape.png' would leave the folder"),
        (member("/etc/cron.d/x.cls", b"1"), "'/etc/cron.d/x.cls' would leave the folder"),
        (member("a/b.png", b"x"), "'a/b.png' is not KEY.cls or KEY with one of"),
        (member("evil.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
         "'evil.png' is a symbolic link"),
        (member("evil.cls", type=tarfile.LNKTYPE, linkname="../x"), "'evil.cls' is a hard link"),
        (member("dev.png", type=tarfile.BLKTYPE), "'dev.png' is a block device"),
        (member("d.png", type=tarfile.DIRTYPE), "'d.png' is a directory"),
        (member("0.json", b"{}"), "'0.json' is not KEY.cls or KEY with one of"),
        (member("00.cls", b"1" * 17), "'00.cls' has 17 bytes, more than 16"),
        (member("single.png", b"x"), "key 'single': no label behind the image"),
        (member("alone.cls", b"1"), "key 'alone': a label that is not behind its image"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_members_that_do_not_belong_there(extra, named, last, folder):
    before = sorted(folder.parent.rglob("*"))
    members = read_members(folder / FILE)
    members.insert(len(members) if last else 4, extra)
    write_members(folder / FILE, members)
    reindex(folder, FILE)
    problems = problems_of(folder)
    assert any(named in problem for problem in problems), problems
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "pt"])
def test_a_pickle_is_named_and_not_opened(extension, folder, tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    pickle.loads(bomb)
    canary.rmdir()  # it works
    members = read_members(folder / FILE)
    key = members[0][0].name.partition(".")[0]
    write_members(folder / FILE, [member(f"{key}.{extension}", bomb), *members])
    reindex(folder, FILE)
    (problem,) = problems_of(folder)
    assert f"member '{key}.{extension}' is not KEY.cls or KEY with one of" in problem
    assert not canary.exists()


def test_a_member_that_declares_ten_gigabytes(folder):
    add_huge_member(folder / FILE)
    reindex(folder, FILE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = problems_of(folder)
    assert any("'99999999.png' at offset 0 declares 10737418240 bytes" in p for p in problems)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_an_image_over_the_limit_is_not_read(folder, monkeypatch):
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_IMAGE_BYTES", "2000")
    members = read_members(folder / FILE)
    write_members(folder / FILE, [member("big.png", bytes(3000)), *members])
    reindex(folder, FILE)
    (problem,) = problems_of(folder)
    assert "member 'big.png' has 3000 bytes, more than 2000; it was not read" in problem


def test_many_faults_of_a_shard_are_counted(folder):
    members = read_members(folder / FILE)
    write_members(folder / FILE, [member(f"x/{i}", b"") for i in range(50)] + members)
    reindex(folder, FILE)
    problems = problems_of(folder)
    assert len(problems) == 21
    assert problems[-1].endswith(f"{FILE}: and 30 more")


def test_shards_are_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_scan, "_BLOCK", 1 << 16)
    size = 32 << 20
    with (tmp_path / "x.tar").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    HashedFile(Store(tmp_path), "x.tar", size).hexdigest()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_hashed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_scan, "_BLOCK", 7)
    data = bytes(range(100))
    (tmp_path / "x").write_bytes(data)
    file = HashedFile(Store(tmp_path), "x", 100)
    for offset, size in ((0, 3), (3, 20), (3, 5), (40, 1), (90, 99)):
        file.seek(offset)
        assert file.read(size) == data[offset : offset + size]
    with pytest.raises(ShardError, match="offset 3 has passed"):
        file.seek(3)
    short = HashedFile(Store(tmp_path), "x", 101)
    with pytest.raises(ShardError, match="ends at 100 of 101 bytes"):
        short.hexdigest()
