import os
import pickle
import tarfile

import numpy as np
import pytest

from data_shards.config import StreamConfig
from data_shards.errors import ShardError
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.webdataset_stream import UnindexedStream
from tests.data_shards.shard_damage import Bomb, member, read_members, write_members

pytestmark = [
    # webdataset leaves shards to the collector.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


@pytest.fixture
def folder(synthetic_set, copy_of):
    path = copy_of(synthetic_set)
    (path / "index.json").unlink()
    (path / "index.parquet").unlink()
    for shard in path.glob("test-*.tar"):
        shard.unlink()
    return path


def stream(folder, rank=0, world_size=1, config=None, **fields):
    arguments = {"image_shape": (3, 16, 16), "num_classes": 4, "samples_per_epoch": 96, **fields}
    return UnindexedStream(
        str(folder),
        config or StreamConfig(),
        global_batch=16,
        cursor=fields.pop("cursor", Cursor(seed=1)),
        rank=rank,
        world_size=world_size,
        **arguments,
    )


def take(folder, count=20, **fields):
    with stream(folder, **fields) as batches:
        return [next(batches) for _ in range(count)], dict(batches.damaged)


def test_labelled_images_without_end_and_a_warning(folder, caplog):
    batches, damaged = take(folder)
    assert "is read without an index: samples repeat" in caplog.text
    assert damaged == {}
    assert batches[0].images.shape == (16, 3, 16, 16)
    images = np.concatenate([batch.images.numpy() for batch in batches])
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    pictures = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert 60 < len(pictures) <= 96
    assert set(labels) == {0, 1, 2, 3}
    # One picture, one label.
    assert all(pictures[i.tobytes()] == n for i, n in zip(images, labels, strict=True))
    assert batches[-1].cursor_after == Cursor(seed=1).advance(320, 96)


def test_ranks_draw_different_samples(folder):
    first, second = (take(folder, 3, rank=rank, world_size=2)[0] for rank in (0, 1))
    assert first[0].images.shape == (8, 3, 16, 16)
    assert not np.array_equal(first[0].images, second[0].images)


def test_on_s3(proxy, folder):
    from tests.object_store import upload

    assert len(take(upload(folder), 5)[0]) == 5


def test_nothing_is_unpickled_and_no_name_becomes_a_path(folder, tmp_path):
    canary = tmp_path / "canary"
    link = member("link.jpg")
    link[0].type, link[0].linkname = tarfile.SYMTYPE, "/etc/passwd"
    for shard in folder.iterdir():
        if shard.suffix == ".tar":
            key = read_members(shard)[0][0].name.split(".")[0]
            extra = [member(f"{key}.{kind}", pickle.dumps(Bomb(canary))) for kind in ("pyd", "pth")]
            outside = [member("../x.jpg", b"x"), link]
            write_members(shard, [*extra, *read_members(shard), *outside])
    before = sorted(tmp_path.rglob("*"))
    config = StreamConfig(damage_allowance=1000)
    _, damaged = take(folder, config=config)
    assert damaged["sample"] > 0  # the image outside has no label
    assert not canary.exists()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fields", [{"num_classes": 2}, {"image_shape": (3, 8, 8)}])
def test_too_much_damage_stops(folder, fields):
    with pytest.raises(ShardError, match=r"samples of file://.* are damaged, more than the budget"):
        take(folder, **fields)


def test_a_cut_shard_is_an_error(folder):
    for shard in folder.glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:900])
    with pytest.raises(ShardError, match="cannot read file://"):
        take(folder)


def test_no_shards(tmp_path):
    with pytest.raises(ShardError, match=r"no shards \(\*\.tar\) at file://"):
        stream(tmp_path)
    with pytest.raises(ShardError, match="not divisible by the world size 3"):
        stream(tmp_path, world_size=3)


def test_shards_of_several_splits_need_a_pattern(synthetic_set, copy_of):
    folder = copy_of(synthetic_set)
    with pytest.raises(ShardError, match=r"more than one split \(\d+ test, \d+ train\).*/train-\*"):
        take(folder)
    labels = {int(label) for batch in take(folder / "train-*.tar", 3)[0] for label in batch.labels}
    assert labels <= {0, 1, 2, 3}
    with pytest.raises(ShardError, match=r"no shards \(fit-\*\.tar\)"):
        take(folder / "fit-*.tar")
    (folder / "imagenet-validation-000.tar").write_bytes(b"")
    for shard in folder.glob("test-*.tar"):
        shard.unlink()
    with pytest.raises(ShardError, match=r"\(\d+ train, 1 val\)"):
        take(folder)


def test_a_set_without_one_sample_ends(folder):
    for shard in folder.glob("*.tar"):
        write_members(shard, [member("a.txt", b"x"), member("a.json", b"{}")])
    with pytest.raises(ShardError, match=r"none of 5 shards has an image .* 5 \.txt, 5 \.json"):
        take(folder)


def test_the_settings_of_webdataset_in_this_process_stay(folder, monkeypatch):
    monkeypatch.delenv("WDS_SECURE", raising=False)
    take(folder, 1)
    import webdataset

    assert "WDS_SECURE" not in os.environ
    assert not webdataset.utils.enforce_security
