import json
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_shards.errors import ShardError
from data_shards.sources.imagefolder import imagefolder
from data_shards.sources.transcode import Recipe
from data_shards.verify import verify
from data_shards.write import main, write_shard_set
from tests.data_shards.imagenet_archive import pixels_of

RECIPE = Recipe(channels=3, size=16, uniform=True)


def picture(path, label, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(label, number, (16, 16))).save(path, "PNG")


@pytest.fixture
def tree(tmp_path):
    """ROOT/CLASS/*: three classes of ten images, some of them in nested folders."""
    root = tmp_path / "tree"
    for label, name in enumerate(("cat", "dog", "eel")):
        for i in range(10):
            picture(root / name / ("deep/er" if i > 6 else "") / f"{i}.png", label, i)
    return root


def files(source):
    return {source.name_of(i): int(label) for i, label in enumerate(source.labels)}


def test_a_tree_without_parts_is_split_by_class(tree):
    source = imagefolder(str(tree), RECIPE, held_out=0.2)
    assert source.class_names == ("cat", "dog", "eel")
    assert np.bincount(source.labels[source.test]).tolist() == [2, 2, 2]
    again = imagefolder(str(tree), RECIPE, held_out=0.2)
    assert np.array_equal(source.test, again.test)
    more = imagefolder(str(tree), RECIPE, held_out=0.4)
    assert np.bincount(more.labels[more.test]).tolist() == [4, 4, 4]
    assert more.parameters["hold_out"] == 0.4


@pytest.mark.parametrize("part", [0.0, 1.0, -0.1, 3.0])
def test_a_part_that_cannot_be_held_out(tree, part):
    with pytest.raises(ShardError, match=rf"a part of {part} cannot be held out"):
        imagefolder(str(tree), RECIPE, held_out=part)


def test_duplicates_stay_on_one_side(tree):
    for i in range(10):
        for copy in range(3):
            (tree / "dog" / f"copy {copy} of {i}.png").write_bytes(
                next(tree.glob(f"cat/**/{i}.png")).read_bytes()
            )
    source = imagefolder(str(tree), RECIPE, held_out=0.5)
    sides = {}
    for number in range(len(source.labels)):
        sides.setdefault(source.encode(number), set()).add(bool(source.test[number]))
    assert len(sides) == 30
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < source.test.sum() < len(source.test)


def test_the_command_says_how_to_split(tree, tmp_path):
    command = ["imagefolder", "--source", str(tree), "--out", str(tmp_path / "set"), "--uniform",
               "--test-size", "16"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"--hold-out 0\.1"):
        main(command)
    main([*command, "--hold-out", "0.2"])
    header = json.loads((tmp_path / "set" / "index.json").read_text())
    assert header["splits"]["test"] == 6
    (tree / "train").mkdir()
    (tree / "val").mkdir()
    with pytest.raises(SystemExit, match="has train/ and val/ already"):
        main([*command, "--hold-out", "0.2"])
    root = tree.parent / "other"
    (root / "train").mkdir(parents=True)
    with pytest.raises(SystemExit, match="give that folder as the source"):
        main([*command[:2], str(root), *command[3:], "--hold-out", "0.2"])


def test_nested_folders_are_walked_here_and_on_an_object_store(tree, memory_store):
    source = imagefolder(str(tree), RECIPE, held_out=0.2, name="tree")
    assert len(source.labels) == 30
    assert files(source)["eel/deep/er/9.png"] == 2
    for path in tree.rglob("*.png"):
        memory_store.write(str(path.relative_to(tree)), path.read_bytes())
    there = imagefolder(memory_store.url, RECIPE, held_out=0.2, name="tree")
    assert files(there) == files(source)
    assert np.array_equal(there.test, source.test)


def test_links_inside_the_source_are_followed(tree):
    os.symlink("eel", tree / "fox")
    os.symlink("../dog/3.png", tree / "cat" / "of a dog.png")
    os.symlink("../dog/deep", tree / "cat" / "dogs")
    source = imagefolder(str(tree), RECIPE, held_out=0.2)
    assert source.class_names == ("cat", "dog", "eel", "fox")
    assert np.bincount(source.labels).tolist() == [14, 10, 10, 10]
    assert files(source)["cat/dogs/er/8.png"] == 0
    assert source.not_taken == ()


def test_a_tree_of_links_alone(tree, tmp_path):
    for name in ("cat", "dog", "eel"):
        (tmp_path / "links" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "links" / "val").mkdir(exist_ok=True)
        os.symlink(tree / name, tmp_path / "links" / "train" / name)
        os.symlink(tree / name / "deep", tmp_path / "links" / "val" / name)
    with pytest.raises(ShardError, match="no folders of classes"):
        imagefolder(str(tmp_path / "links"), RECIPE)
    source = imagefolder(str(tmp_path / "links"), RECIPE, follow_links=True)
    assert np.bincount(source.labels[~source.test]).tolist() == [10, 10, 10]
    assert np.bincount(source.labels[source.test]).tolist() == [3, 3, 3]


def test_cycles_and_links_that_lead_out_end_and_are_named(tree, tmp_path):
    picture(tmp_path / "outside" / "0.png", 7, 7)
    os.symlink("..", tree / "cat" / "up")
    os.symlink(".", tree / "cat" / "self")
    os.symlink("../../dog", tree / "cat" / "deep" / "sideways")
    os.symlink("../cat", tree / "dog" / "back")
    os.symlink("nowhere", tree / "dog" / "gone.png")
    os.symlink("loop.png", tree / "dog" / "loop.png")
    os.symlink(tmp_path / "outside", tree / "eel" / "out")
    os.symlink(tmp_path / "outside" / "0.png", tree / "eel" / "out.png")
    source = imagefolder(str(tree), RECIPE, held_out=0.2)
    named = dict(source.not_taken)
    assert named["cat/up"] == named["cat/self"] == "link to a folder above it"
    assert named["dog/back/deep/sideways"] == "link to a folder above it"
    assert named["dog/gone.png"] == named["dog/loop.png"] == "broken link"
    assert named["eel/out"] == named["eel/out.png"] == "link out of the source"
    assert not any(name.startswith("eel/out") for name in files(source))
    followed = files(imagefolder(str(tree), RECIPE, held_out=0.2, follow_links=True))
    assert {"eel/out/0.png", "eel/out.png"} < set(followed)


def test_every_entry_that_is_not_taken_is_named_by_cause(tree, tmp_path):
    (tree / "README").write_bytes(b"")
    (tree / "cat" / "Thumbs.db").write_bytes(b"x")
    (tree / "cat" / ".hidden.png").write_bytes(b"x")
    (tree / ".git").mkdir()
    os.mkfifo(tree / "dog" / "pipe.png")
    source = imagefolder(str(tree), RECIPE, held_out=0.2)
    assert source.class_names == ("cat", "dog", "eel")
    assert dict(source.not_taken) == {
        "README": "a file beside the folders",
        "cat/Thumbs.db": "not named .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff",
        "cat/.hidden.png": "hidden",
        ".git": "hidden",
        "dog/pipe.png": "not a file or folder",
    }
    write_shard_set(source, str(tmp_path / "set"))
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["other_files"] == 5
    assert report["not_taken"]["causes"]["hidden"] == 2
    assert {"name": ".git", "cause": "hidden"} in report["not_taken"]["first"]


def test_names_that_are_not_utf8(tree, tmp_path, capsys):
    odd = os.fsencode(tree) + b"/caf\xe9"
    os.mkdir(odd)
    for i in range(4):
        picture(tmp_path / "x.png", 9, i)
        os.rename(tmp_path / "x.png", odd + b"/\xff %d \n\xc3\xa9 #?*.png" % i)
    (tree / "dog" / "0.png").write_bytes(b"no image")
    with open(odd + b"/\xfe.png", "wb") as file:
        file.write(b"no image either")
    main(["imagefolder", "--source", str(tree), "--out", str(tmp_path / "set"), "--uniform",
          "--test-size", "16", "--hold-out", "0.2"])  # fmt: skip
    source = imagefolder(str(tree), RECIPE, held_out=0.2)
    assert source.class_names == (r"caf\xe9", "cat", "dog", "eel")
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    left_out = {os.fsencode(entry["name"]) for entry in report["undecodable"]["first"]}
    assert left_out == {b"caf\xe9/\xfe.png", b"dog/0.png"}
    index = write_shard_set(source, str(tmp_path / "set"))
    assert index.header.class_names[0] == r"caf\xe9"
    assert len(index.rows) == 33
    assert list(verify(index)) == []


def test_a_class_of_links_out_of_the_source_says_why_it_is_empty(tree, tmp_path):
    picture(tmp_path / "outside" / "0.png", 7, 7)
    (tree / "fox").mkdir()
    os.symlink(tmp_path / "outside" / "0.png", tree / "fox" / "0.png")
    with pytest.raises(ShardError, match=r"fox has no images .*1 entries: link out of the source"):
        imagefolder(str(tree), RECIPE, held_out=0.2)


# --- the report ------------------------------------------------------------------------------


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write(tree, out, *arguments):
    main(["imagefolder", "--source", str(tree), "--out", str(out), "--uniform", "--test-size",
          "16", "--hold-out", "0.2", *arguments])  # fmt: skip
    return json.loads((out / "report.json").read_text())


def test_the_report_is_the_same_every_time(tree, tmp_path):
    (tree / "dog" / "0.png").write_bytes(b"\xff\xd8\xff no image")
    (tree / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    for name in "ab":
        report = write(tree, tmp_path / name)
        assert report["undecodable"]["count"] == 2
    assert (tmp_path / "a" / "report.json").read_bytes() == (
        tmp_path / "b" / "report.json"
    ).read_bytes()
    assert "0x" not in json.dumps(report)


def test_a_warning_of_pillow_has_the_name_of_the_file(tree, tmp_path, caplog):
    data = (tree / "cat" / "0.png").read_bytes()
    no_frames = chunk(b"acTL", struct.pack(">II", 0, 0))
    (tree / "cat" / "0.png").write_bytes(data[:33] + no_frames + data[33:])
    write(tree, tmp_path / "set")
    assert any(
        record.getMessage().startswith("cat/0.png: Invalid APNG") for record in caplog.records
    )


def test_leaks_are_counted_and_refused(tree, tmp_path, capsys):
    parts = tmp_path / "parts"
    for part in ("train", "val"):
        shutil.copytree(tree, parts / part)
    for i in range(5):  # five images of train stay there alone
        (parts / "val" / "eel" / f"{i}.png").unlink()
    (parts / "train" / "eel" / "again.png").write_bytes((tree / "eel" / "0.png").read_bytes())
    command = ["imagefolder", "--source", str(parts), "--uniform", "--test-size", "16", "--out"]
    with pytest.raises(SystemExit, match=r"25 train images have the bytes of test images.*cat/0"):
        main([*command, str(tmp_path / "a"), "--no-leaks"])
    main([*command, str(tmp_path / "b")])
    assert "26 duplicates kept, of which 25 between train and test" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="does not say that train and test images share no bytes"):
        main([*command, str(tmp_path / "b"), "--no-leaks"])
    main([*command, str(tmp_path / "c"), "--no-leaks", "--drop-duplicates"])
    header = json.loads((tmp_path / "c" / "index.json").read_text())
    assert (header["splits"]["train"], header["splits"]["test"]) == (5, 25)


def test_a_class_that_a_split_lacks_and_an_image_of_two_classes_are_said(tree, tmp_path, capsys):
    (tree / "single").mkdir()
    (tree / "single" / "0.png").write_bytes((tree / "cat" / "0.png").read_bytes())
    command = ["imagefolder", "--source", str(tree), "--hold-out", "0.2", "--uniform"]
    main([*command, "--test-size", "16", "--out", str(tmp_path / "set")])
    out = capsys.readouterr().out
    assert "1 duplicates kept, of which 1 between classes" in out
    assert re.search(r"no (train|test) image in 1 classes: single\n", out)
    assert "test images are stored as 3x16x16\n" in out
