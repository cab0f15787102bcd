import json
import re

import pytest

from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.sources.digits import digits
from data_shards.storage.store import Store
from data_shards.verify import main as verify_main
from data_shards.verify import verify
from data_shards.writing.rebuild_index import repair
from data_shards.writing.writer import write_shard_set
from tests.data_shards.shard_damage import (
    FILE,
    add_huge_member,
    member,
    read_members,
    reindex,
    write_members,
)

pytestmark = pytest.mark.integration


def lose_rows(folder):
    (folder / "index.parquet").unlink()


def cut_rows(folder):
    path = folder / "index.parquet"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("lose", "workers"), [(lose_rows, 1), (cut_rows, 2)])
def test_lost_rows_come_back_to_the_byte(lose, workers, folder, synthetic_set):
    lose(folder)
    result = repair(Store(folder), workers=workers)
    assert result.problems == []
    assert result.index.digest == load_index(str(synthetic_set)).digest
    for name in ("index.json", "index.parquet"):
        assert (folder / name).read_bytes() == (synthetic_set / name).read_bytes()


def test_a_lost_header_is_replaced_by_stated_assumptions(folder, synthetic_set):
    before = load_index(str(synthetic_set))
    (folder / "index.json").unlink()
    result = repair(Store(folder))
    index = result.index
    assert (folder / "index.parquet").read_bytes() == (synthetic_set / "index.parquet").read_bytes()
    assert index.header.splits == before.header.splits
    assert (index.rows.validation == before.rows.validation).all()
    assert (index.rows.label == before.rows.label).all()
    assert (index.image_shape, index.train_shape) == ((3, 16, 16), (3, 16, 16))
    assert index.header.class_names == tuple(f"class {i}" for i in range(4))
    notes = "\n".join(result.notes)
    assert "the old header cannot be used: no shard set at" in notes
    assert "assumed: name 'copy', 4 classes" in notes
    assert list(verify(index)) == []


def test_a_changed_header_is_not_believed(folder):
    fields = json.loads((folder / "index.json").read_text())
    fields["class_names"][0] = "something else"
    (folder / "index.json").write_text(json.dumps(fields))
    result = repair(Store(folder))
    assert result.index.header.class_names[0] == "class 0"
    assert any("was changed" in note for note in result.notes)


def test_a_shard_that_was_removed_is_left_out(folder, synthetic_set):
    before = load_index(str(synthetic_set))
    (folder / FILE).unlink()
    result = repair(Store(folder))
    assert result.notes == [f"/{FILE}: absent; the new index does not have its samples"]
    index = result.index
    assert len(index.rows) == 120 - before.shards[1].samples
    assert index.header.class_names == before.header.class_names
    kept = dict(zip(before.rows.key, before.rows.validation, strict=True))
    assert [kept[key] for key in index.rows.key] == index.rows.validation.tolist()
    assert index.header.generator["repaired"] is True
    assert "plan" not in index.header.generator
    assert list(verify(index)) == []


def test_a_shard_that_was_added_is_taken_in(folder):
    members = read_members(folder / FILE)
    more = [member(f"9{info.name[1:]}", data) for info, data in members[:6]]
    write_members(folder / "train-00005.tar", more)
    result = repair(Store(folder))
    assert "/train-00005.tar: taken in; the old header does not list it" in result.notes
    assert len(result.index.rows) == 123
    assert list(verify(result.index)) == []


def break_body(folder):
    path = folder / FILE
    data = bytearray(path.read_bytes())
    data[1024] ^= 0xFF
    path.write_bytes(data)


def cut(folder):
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:5000])


def swap(folder):
    a, b = folder / FILE, folder / "train-00002.tar"
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


def repeat_key(folder):
    members = read_members(folder / FILE)
    write_members(folder / "train-00009.tar", members[:4])


def truncate_image(folder):
    members = read_members(folder / FILE)
    info, data = members[2]
    members[2] = member(info.name, data[: len(data) // 2])
    write_members(folder / FILE, members)
    reindex(folder, FILE)


def put_in(extra):
    def damage(folder):
        write_members(folder / FILE, [extra, *read_members(folder / FILE)])
        reindex(folder, FILE)

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_body, f"{FILE}: sha256 .*, the old header states"),
        (cut, f"{FILE}: .*(declares|cut)"),
        (swap, f"{FILE}: sha256 .*; these are the bytes of train-00002.tar"),
        (repeat_key, f"train-00009.tar: key '.*' is in {FILE} too"),
        (truncate_image, f"{FILE}: key '.*': damaged JPEG"),
        (lambda folder: add_huge_member(folder / FILE), f"{FILE}: .*declares 10737418240 bytes"),
        (put_in(member("../x.png", b"1")), f"{FILE}: member '../x.png' would leave the folder"),
        (put_in(member("1.pkl", b"1")), f"{FILE}: member '1.pkl' is not KEY.cls"),
        (put_in(member("1.cls", b"-1")), f"{FILE}: key '1': a label that is not behind"),
    ],
)
def test_damaged_shards_are_listed_and_nothing_is_written(damage, named, folder, capsys):
    damage(folder)
    before = {name: (folder / name).read_bytes() for name in ("index.json", "index.parquet")}
    with pytest.raises(SystemExit, match=r"error: \d+ faults in the shards"):
        verify_main([str(folder), "--repair", "--workers", "1"])
    shown = capsys.readouterr().out
    assert any(re.search(named, line) for line in shown.splitlines()), shown
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_labels_outside_the_classes_of_the_header(folder):
    members = read_members(folder / FILE)
    members[1] = member(members[1][0].name, b"4")
    write_members(folder / "train-00009.tar", [member("88888888.jpg", members[0][1]),
                                               member("88888888.cls", b"4")])  # fmt: skip
    result = repair(Store(folder))
    assert result.index is None
    assert result.problems == ["/train-00009.tar: labels that are not in [0, 4)"]


def test_shapes_that_an_index_cannot_state(folder):
    (folder / "index.json").unlink()
    write_members(folder / "test-00009.tar", [member("7.png", digits().encode(0)),
                                              member("7.cls", b"1")])  # fmt: skip
    with pytest.raises(ShardError, match="test images have 2 shapes"):
        repair(Store(folder))
    with pytest.raises(ShardError, match="has no shards"):
        repair(Store(folder / "nowhere"))


def test_entry(folder, capsys, synthetic_set):
    lose_rows(folder)
    verify_main([str(folder), "--repair", "--workers", "1"])
    shown = capsys.readouterr().out
    digest = load_index(str(synthetic_set)).digest
    assert "the old rows cannot be used" in shown
    assert "validation is chosen anew" in shown
    assert shown.endswith(f"in 9 shards, digest {digest}\n")
    verify_main([str(folder), "--workers", "1"])


def test_a_set_of_external_tars_gets_an_index(tmp_path):
    """Pairs of image and .cls under names of another writer."""
    source = digits()
    write_shard_set(source, str(tmp_path / "ours"))
    external = tmp_path / "external"
    external.mkdir()
    for split in ("train", "test"):
        members = read_members(tmp_path / "ours" / f"{split}-00000.tar")
        renamed = [member(f"img_{split}-{info.name}", data) for info, data in members]
        write_members(external / f"{split}-00000.tar", renamed)
    index = repair(Store(external)).index
    assert index.image_shape == (1, 8, 8)
    assert 0.15 < index.header.splits["validation"] / index.header.splits["train"] < 0.25
    assert list(verify(index)) == []


def test_a_label_that_is_no_number_of_a_class_makes_no_names(folder):
    """A name for each class up to it would fill the memory."""
    (folder / "index.json").unlink()
    members = read_members(folder / FILE)
    labels = [(info.name, b"999999999" if info.name.endswith(".cls") else data)
              for info, data in members]  # fmt: skip
    write_members(folder / FILE, [member(name, data) for name, data in labels])
    with pytest.raises(ShardError, match="the largest label is 999999999"):
        repair(Store(folder))
