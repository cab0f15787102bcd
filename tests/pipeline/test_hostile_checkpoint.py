"""A checkpoint that somebody else may have written: nothing is unpickled, no path is left, and
what does not add up is refused by name before any state is touched."""

import hashlib
import json
import pickle

import pytest

from data_shards.storage.store import Store
from pipeline.checkpoint.reader import UnreadableError, load_checkpoint, load_newest
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


HOSTILE = {
    "a pickle": (pickled, "safetensors|header"),
    "another file": (other_file, r"has exp_avg/bias of shape \(\d+,\), committed were"),
    "a path": (parts(outside), "'../../secret', not its file"),
    "a gap": (parts(gap), "then from"),
    "an overlap": (parts(overlap), "then from"),
    "too little": (parts(short), "elements of its shape"),
    "text for a number": (parts(text), "TypeError|then from"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_refused_before_any_state_is_touched(tmp_path, what):
    make, message = HOSTILE[what]
    folder = tmp_path / "step-00000003"
    save(list(ranks_of(2)), Store(folder), 3)
    change = make(folder)
    commit = json.loads((folder / "commit.json").read_text())
    change(commit)
    (folder / "commit.json").write_text(json.dumps(commit))
    (target,) = ranks_of(1)
    before = digests([target])
    with pytest.raises(PipelineError, match=message):
        load_checkpoint(Store(folder), world=target[0], engine=target[1])
    assert digests([target]) == before
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("text", ["[]", "1", '{"schema_version": 2}', '{"schema_version": 1}', "{"])
def test_a_commit_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "commit.json").write_text(text)
    (target,) = ranks_of(1)
    with pytest.raises(PipelineError, match=r"schema_version|KeyError: 'files'|is damaged"):
        load_checkpoint(Store(tmp_path), world=target[0], engine=target[1])


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
