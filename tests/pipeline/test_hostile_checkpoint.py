"""A checkpoint that somebody else may have written: nothing is unpickled, no path is left, and
what does not add up is refused by name before any state is touched."""

import hashlib
import json
import os
import pickle
import re
import shutil

import pytest

from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError
from pipeline.checkpoint.commit_schema import commit_bytes
from pipeline.checkpoint.reader import UnreadableError, load_checkpoint, load_newest
from pipeline.checkpoint.retention import retain
from pipeline.config import CheckpointConfig
from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext
from tests.data_shards.test_damage import Bomb
from tests.pipeline.test_elastic_checkpoint import digests, ranks_of, save

FILE = "rank-00000-of-00002.safetensors"


def replaced(folder, data):
    """Other bytes for a file, with a commit that agrees."""
    (folder / FILE).write_bytes(data)
    digest = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}

    def change(commit):
        commit["files"][0] |= digest

    return change


def pickled(folder):
    bomb = pickle.dumps(Bomb(folder / "canary"))
    return replaced(folder, bomb)


def other_file(folder):
    """A sound safetensors file of the wrong lengths."""
    return replaced(folder, (folder / "rank-00001-of-00002.safetensors").read_bytes())


def parts(change):
    """Change where the parts of one matrix lie."""

    def changing(folder):
        return lambda commit: change(commit["tensors"]["master/matrix1"]["parts"])

    return changing


def outside(rows):
    rows[0][0] = "../../secret"


def gap(rows):
    rows[1][1] += 1


def overlap(rows):
    rows[1][1] -= 1


def short(rows):
    del rows[1]


def text(rows):
    rows[0][1] = "0"


def edit(folder, change):
    """Change a commit as somebody would who knows that it has a digest."""
    commit = json.loads((folder / "commit.json").read_text())
    del commit["digest"]
    change(commit)
    (folder / "commit.json").write_bytes(commit_bytes(commit))


def int64(folder):
    """A sound safetensors file of the right lengths whose numbers are integers."""
    data = (folder / FILE).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    for entry in header.values():
        entry["dtype"] = "I32"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return replaced(folder, len(text).to_bytes(8, "little") + text + data[length:])


HOSTILE = {
    "a pickle": (pickled, "safetensors|header"),
    "another file": (other_file, r"has exp_avg/bias of shape \(\d+,\), committed were"),
    "a path": (parts(outside), "'../../secret', not its file"),
    "a gap": (parts(gap), "then from"),
    "an overlap": (parts(overlap), "then from"),
    "too little": (parts(short), "elements of its shape"),
    "text for a number": (parts(text), "valid integer"),
    "integers": (int64, "of torch.int32; the state of an optimizer is float32"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_refused_before_any_state_is_touched(tmp_path, what):
    make, message = HOSTILE[what]
    folder = tmp_path / "step-00000003"
    save(list(ranks_of(2)), Store(folder), 3)
    change = make(folder)
    edit(folder, change)
    (target,) = ranks_of(1)
    before = digests([target])
    with pytest.raises(PipelineError, match=message):
        load_checkpoint(Store(folder), world=target[0], engine=target[1])
    assert digests([target]) == before
    assert not (folder / "canary").exists()


def changed(part, **values):
    return lambda commit: (commit[part] if part else commit).update(values)


FORGED = {
    "step as text": (changed("", step="200"), "step: .*valid integer"),
    "another step": (changed("", step=10**9), "of step 1000000000, not of the folder's 3"),
    "step below 0": (changed("", step=-7), "step: .*greater than or equal to 0"),
    "no step": (lambda commit: commit.pop("step"), "step: Field required"),
    "no cursor": (lambda commit: commit.pop("cursor"), "cursor: Field required"),
    "half a cursor": (lambda commit: commit["cursor"].pop("seed"), "cursor of .'epoch', 'lanes"),
    "cursor below 0": (changed("cursor", position=-5), "cursor position -5"),
    "cursor of text": (changed("cursor", epoch="x"), "cursor.epoch: .*valid integer"),
    "cursor of more": (changed("cursor", foo=1), "cursor of .*'foo'"),
    "no scalars": (lambda commit: commit.pop("scalars"), "scalars: Field required"),
    "empty scalars": (changed("", scalars={}), "lacks the scalars mu_product"),
    "half a step": (changed("scalars", step=1.5), "scalar step=1.5"),
    "a record of text": (changed("", records=[{"step": "x"}]), "records.0"),
    "an unknown field": (changed("", extra=1), "extra: Unexpected keyword"),
    "a long name": (
        lambda commit: commit["tensors"].update({"k" * 2000: {"shape": [0], "parts": []}}),
        "has a name of 2,000 bytes, the limit is 1,024",
    ),
    "a shape below 0": (
        lambda commit: commit["tensors"]["master/matrix1"].update(shape=[-1, -289]),
        r"has shape \[-1, -289\]",
    ),
}
"""By what is wrong with the newest commit: how it is changed, and what is said of it."""


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "NUL": (lambda path: path.write_bytes(bytes(5000)), "is damaged"),
    "a list": (lambda path: path.write_bytes(b"[]"), "is damaged: list"),
    "deep": (lambda path: path.write_bytes(b"[" * 100_000), "is damaged: maximum recursion"),
    "65 levels": (
        lambda path: path.write_bytes(b'{"x":' * 65 + b"1" + b"}" * 65),
        "at least 65 levels, the limit is 64",
    ),
    "no UTF-8": (lambda path: path.write_bytes(b'{"x": "\xff\xfe"}'), "is damaged"),
    "large": (lambda path: os.truncate(path, (16 << 20) + 1), "16,777,217 bytes, the limit is"),
    "another version": (lambda path: path.write_bytes(b'{"schema_version": 9}'), "version=9, not"),
    "a number that is none": (
        lambda path: path.write_bytes(
            re.sub(rb'("mu_product":)[^,}]+', rb"\1NaN", path.read_bytes())
        ),
        "is damaged: Out of range float",
    ),
    "an edited number": (
        lambda path: path.write_bytes(path.read_bytes().replace(b'"epoch":1', b'"epoch":2')),
        "states digest",
    ),
    "another seed": (
        lambda path: path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":9')),
        "states digest",
    ),
}


@pytest.mark.parametrize("what", [*FORGED, *BROKEN])
def test_a_commit_that_cannot_be_believed_is_passed_over_whole(tmp_path, monkeypatch, what):
    for step in (2, 3):
        save(list(ranks_of(2)), Store(tmp_path / f"checkpoints/step-{step:08d}/writer-0001"), step)
    newest = tmp_path / "checkpoints/step-00000003/writer-0001"
    if what in FORGED:
        change, message = FORGED[what]
        edit(newest, change)
    else:
        change, message = BROKEN[what]
        before = (newest / "commit.json").read_bytes()
        change(newest / "commit.json")
        assert (newest / "commit.json").read_bytes() != before
    monkeypatch.setattr(DistributedContext, "share", lambda world, value: value)
    (target,) = ranks_of(1)
    progress, damaged = load_newest(Store(tmp_path), world=target[0], engine=target[1])
    assert progress.step == 2
    assert len(damaged) == 1
    assert re.search(message, damaged[0])
    assert "step-00000003/writer-0001/commit.json" in damaged[0] or what == "empty scalars"
    assert len(damaged[0]) < 1000


def test_names_that_are_no_checkpoints_are_ignored_and_named_once(tmp_path, monkeypatch, caplog):
    save(list(ranks_of(2)), Store(tmp_path / "checkpoints/step-00000002/writer-0001"), 2)
    for stray in ("step-backup", "step-00000009.bak"):
        shutil.copytree(tmp_path / "checkpoints/step-00000002", tmp_path / f"checkpoints/{stray}")
    (tmp_path / "checkpoints/.DS_Store").write_text("x")
    monkeypatch.setattr(DistributedContext, "share", lambda world, value: value)
    (target,) = ranks_of(1)
    progress, damaged = load_newest(Store(tmp_path), world=target[0], engine=target[1])
    assert (progress.step, damaged) == (2, [])
    for _ in range(2):
        assert retain(Store(tmp_path), CheckpointConfig(), {}) == []
    (said,) = [record.getMessage() for record in caplog.records]
    assert all(name in said for name in ("step-backup", "step-00000009.bak", ".DS_Store"))


def test_a_commit_that_no_reader_would_take_is_not_written(monkeypatch):
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_JSON_BYTES", "100")
    with pytest.raises(UntrustedError, match=r"commit\.json would have .* raises it"):
        commit_bytes({"config": "x" * 100})


def test_a_store_that_is_away_makes_no_checkpoint_a_damaged_one(tmp_path, monkeypatch):
    for step in (2, 3):
        save(list(ranks_of(2)), Store(tmp_path / f"checkpoints/step-{step:08d}/writer-0001"), step)
    (target,) = ranks_of(1)
    before = digests([target])
    genuine = Store.read_range
    monkeypatch.setattr(DistributedContext, "share", lambda world, value: value)

    def away(store, name, start, stop):
        raise OSError("503: slow down")

    monkeypatch.setattr(Store, "read_range", away)
    with pytest.raises(UnreadableError, match=r"step-00000003/writer-0001 cannot be read.*503"):
        load_newest(Store(tmp_path), world=target[0], engine=target[1])
    assert digests([target]) == before
    monkeypatch.setattr(Store, "read_range", genuine)
    progress, damaged = load_newest(Store(tmp_path), world=target[0], engine=target[1])
    assert (progress.step, damaged) == (3, [])
