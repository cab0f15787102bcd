"""Every kind of damage as the stream meets it: refused at opening, found by a digest, or harmless.

`verify` finds the harmless ones as well (test_verify.py).
"""

import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.format.shard_index import load_index
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.streaming.corruption_log import CorruptionLog
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
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
from tests.data_shards.test_index import rewrite_rows

STEPS = 12  # two epochs of 96


def stream(url, **fields):
    config = StreamConfig(**{"cache_bytes": 0, "damage_allowance": 1000, **fields})
    index = load_index(str(url))
    return SampleStream(index, config, split="train", global_batch=16, cursor=Cursor(seed=3))


def take(url, **fields):
    """Images, labels and rows of two epochs, and the damage by cause."""
    with stream(url, **fields) as batches:
        taken = [next(batches) for _ in range(STEPS)]
        parts = ("images", "labels", "rows")
        whole = {name: np.concatenate([getattr(b, name) for b in taken]) for name in parts}
        return whole, dict(batches.damaged)


@pytest.fixture(scope="module")
def intact(synthetic_set):
    return take(synthetic_set)[0]


def header_of(folder, number):
    """Offset of the header of a member, two members per sample."""
    return read_members(folder / FILE)[number][0].offset


def cut(folder, size):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:size])


CUTS = {
    "at a member boundary": lambda folder: header_of(folder, 20),
    "between image and label": lambda folder: header_of(folder, 21),
    "inside a header": lambda folder: header_of(folder, 20) + 100,
    "inside a body": lambda folder: header_of(folder, 20) + 600,
}


@pytest.mark.parametrize("place", CUTS)
def test_a_cut_shard_is_refused_at_opening(folder, place):
    size = CUTS[place](folder)
    cut(folder, size)
    with pytest.raises(ShardError, match=rf"{FILE} has {size} bytes, the index states"):
        load_index(str(folder))


def test_a_missing_shard_is_refused_at_opening(folder):
    (folder / FILE).unlink()
    with pytest.raises(ShardError, match=rf"{FILE} is listed in the index and absent"):
        load_index(str(folder))


def test_a_shard_that_goes_while_streaming_stops_the_run(folder):
    with stream(folder, read_ahead_bytes=50_000) as batches:
        next(batches)
        shutil.rmtree(folder)
        with pytest.raises(ShardError, match=r"cannot read file://.*\(train-0000"):
            list(batches)


def test_an_extra_shard_is_named_and_not_read(folder, intact, caplog):
    shutil.copy(folder / FILE, folder / "train-00077.tar")
    assert np.array_equal(take(folder)[0]["images"], intact["images"])
    assert "train-00077.tar not listed in the index, not read" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 240}, r"-0000\d\.tar (has \d+ bytes, the index states|is listed)"),
        # Shards of the same sizes: every image has another digest.
        ({"seed": 9}, r"16 samples in a row are damaged"),
    ],
)
def test_the_index_of_another_set_is_refused(folder, tmp_path, fields, message):
    source = synthetic(**{"samples": 120, "size": 16, "classes": 4, **fields})
    other = tmp_path / "other"
    write_shard_set(source, str(other), samples_per_shard=20)
    shutil.copy(other / "index.parquet", folder)
    with pytest.raises(ShardError, match=r"index\.parquet has sha256 .* the header states"):
        load_index(str(folder))
    shutil.copy(other / "index.json", folder)
    with pytest.raises(ShardError, match=message):
        take(folder)


def test_swapped_shards_are_found_by_digest(digits_set, copy_of):
    folder = copy_of(digits_set)
    shards = load_index(str(folder)).shards_of("train")
    first, second = next((a, b) for a, b in itertools.combinations(shards, 2) if a.size == b.size)
    data = (folder / first.file).read_bytes()
    (folder / first.file).write_bytes((folder / second.file).read_bytes())
    (folder / second.file).write_bytes(data)
    whole, damaged = take(folder)
    index = load_index(str(folder))
    assert set(damaged) == {"digest"}
    assert damaged["digest"] > 30
    assert not np.isin(index.rows.shard[whole["rows"]], [first.number, second.number]).any()
    with pytest.raises(ShardError, match="more than the budget of 10"):
        take(folder, damage_allowance=10, damage_fraction=0.0)


def test_a_flipped_byte_is_found_by_digest_and_quarantined(folder, damage, tmp_path):
    index = damage(folder, [7])
    config = StreamConfig(cache_bytes=0)
    record = CorruptionLog(Store(tmp_path / "record"), "damaged/rank-0.jsonl")
    arguments = {"split": "train", "global_batch": 48, "cursor": Cursor(seed=3)}
    with SampleStream(index, config, corruption_log=record, **arguments) as batches:
        found = [damage for _ in range(4) for damage in next(batches).damaged]
    record.close()
    key, shard = index.rows.key[7].decode(), index.shards[index.rows.shard[7]].file
    assert {(d.cause, d.key, d.shard) for d in found} == {("digest", key, shard)}
    assert {damage.position // 96 for damage in found} == {0, 1}
    lines = (tmp_path / "record/damaged/rank-0.jsonl").read_text().splitlines()
    assert len(lines) == len(found)
    assert all(f'"key": "{key}"' in line and '"cause": "digest"' in line for line in lines)


HARMLESS = {
    "a flipped header byte": lambda data, at: data[: at + 3] + b"\xff" + data[at + 4 :],
    "a header of zeros": lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
    "a wrong label": lambda data, at: data[: at + 512] + b"9" + data[at + 513 :],
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_not_an_image_does_not_matter(folder, intact, what):
    # The index says where an image lies and what it shows; headers and labels are not read.
    place = header_of(folder, 21 if "label" in what else 20)
    data = (folder / FILE).read_bytes()
    changed = HARMLESS[what](data, place)
    assert len(changed) == len(data)
    assert changed != data
    (folder / FILE).write_bytes(changed)
    whole, damaged = take(folder)
    assert damaged == {}
    assert all(np.array_equal(whole[name], intact[name]) for name in intact)


def replace_image(folder, row, content, extension=None):
    """Put other content in the place of an image, digest and size in the index agreeing with it."""
    index = load_index(str(folder))
    file = folder / index.shards[index.rows.shard[row]].file
    offset, size = int(index.rows.offset[row]), int(index.rows.size[row])
    assert len(content) <= size
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    file.write_bytes(data)

    def change(value):
        return lambda values: [value if i == row else old for i, old in enumerate(values)]

    columns = {"size": change(len(content)), "xxh3_64": change(xxhash.xxh3_64_intdigest(content))}
    if extension is not None:
        columns["extension"] = change(extension)
    rewrite_rows(folder, **columns)


def image_of(folder, row):
    index = load_index(str(folder))
    file = folder / index.shards[index.rows.shard[row]].file
    offset = int(index.rows.offset[row])
    return file.read_bytes()[offset : offset + int(index.rows.size[row])]


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda folder: (image_of(folder, 60)[:400], None), "decode"),
        (lambda folder: (b"not an image", None), "decode"),
        (lambda folder: (b"", None), "decode"),
        (lambda folder: (pickle.dumps(Bomb(folder / "canary")), None), "decode"),
        (lambda folder: (pickle.dumps(Bomb(folder / "canary")), "png"), "decode"),
        (lambda folder: (png((9, 9)), "png"), "shape"),
    ],
    ids=["truncated", "text", "empty", "pickle", "pickle as png", "another shape"],
)
def test_an_image_that_was_bad_when_written(folder, make, cause, intact):
    content, extension = make(folder)
    row = 60
    replace_image(folder, row, content, extension)
    whole, damaged = take(folder)
    assert damaged == {cause: 2}
    assert row not in whole["rows"]
    others = intact["rows"] != row
    assert np.array_equal(whole["images"][others], intact["images"][others])
    assert not (folder / "canary").exists()


def test_an_extension_outside_the_list_is_refused_at_opening(folder):
    replace_image(folder, 60, pickle.dumps(Bomb(folder / "canary")), "pkl")
    with pytest.raises(ShardError, match=r"extension b'pkl', which is not one of png"):
        load_index(str(folder))
    assert not (folder / "canary").exists()


def test_a_repeated_key_is_refused_at_opening(folder):
    key = load_index(str(folder)).rows.key[3].decode()
    rewrite_rows(folder, key=lambda keys: [*keys[:50], key, *keys[51:]])
    with pytest.raises(ShardError, match=f"has the key '{key}' more than once"):
        load_index(str(folder))


def test_overlapping_samples_are_refused_at_opening(folder):
    rewrite_rows(folder, offset=lambda offsets: [offsets[0], offsets[0] + 8, *offsets[2:]])
    with pytest.raises(ShardError, match="which is not behind the sample before it"):
        load_index(str(folder))


def test_a_size_of_10_gb_is_refused_at_opening(folder):
    rewrite_rows(folder, size=lambda sizes: [10 << 30, *sizes[1:]])
    with pytest.raises(ShardError, match="size 10737418240, which is not inside its shard"):
        load_index(str(folder))


def test_strange_members_are_not_touched(folder, tmp_path, intact):
    link = member("link.png")
    link[0].type, link[0].linkname = tarfile.SYMTYPE, "/etc/passwd"
    strange = [
        member("../outside.png", b"x"),
        member("/absolute.png", b"x"),
        link,
        member("00000000.pyd", pickle.dumps(Bomb(tmp_path / "canary"))),
    ]
    write_members(folder / FILE, [*strange, *read_members(folder / FILE)])
    with pytest.raises(ShardError, match=f"{FILE} has .* bytes, the index states"):
        load_index(str(folder))
    reindex(folder, FILE)  # somebody makes the index agree
    before = sorted(tmp_path.rglob("*"))
    whole, damaged = take(folder)
    assert damaged == {}
    assert np.array_equal(whole["images"], intact["images"])
    assert sorted(tmp_path.rglob("*")) == before


def test_members_out_of_order(folder):
    write_members(folder / FILE, read_members(folder / FILE)[::-1])
    index = load_index(str(folder))  # of the same size
    whole, damaged = take(folder)
    assert set(damaged) == {"digest"}
    assert not (index.rows.shard[whole["rows"]] == 1).any()
    reindex(folder, FILE)
    with pytest.raises(ShardError, match=r"offset .* not behind the sample before it"):
        load_index(str(folder))


def test_a_member_of_10_gb_is_refused_at_opening(folder):
    add_huge_member(folder / FILE)
    with pytest.raises(ShardError, match=f"{FILE} has .* bytes, the index states"):
        load_index(str(folder))


@pytest.mark.integration
def test_no_url_starts_a_shell(tmp_path):
    urls = ["pipe:touch canary", "pipe://touch canary", "file://x::pipe:touch"]
    code = (
        "import sys\n"
        "from data_shards.format.shard_index import load_index\n"
        "from data_shards.errors import ShardError\n"
        "for url in sys.argv[1:]:\n"
        "    try:\n        load_index(url)\n"
        "    except ShardError as error:\n        print('refused', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *urls],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.count("refused") == len(urls), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_in_an_index_never_become_paths(folder, tmp_path, memory_store):
    rewrite_rows(folder, key=lambda keys: [f"../../{key}" for key in keys])
    for path in folder.iterdir():
        memory_store.write(path.name, path.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    _, damaged = take(memory_store.url, disk_cache=str(tmp_path / "cache"))
    assert damaged == {}
    written = [path for path in tmp_path.rglob("*") if path not in before]
    assert written
    assert all(path == tmp_path / "cache" or tmp_path / "cache" in path.parents for path in written)
