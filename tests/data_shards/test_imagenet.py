"""ImageNet-1k from archives laid out like the official ones."""

import io
import json
import tarfile

import numpy as np
import pytest
import scipy.io

from data_shards import write
from data_shards.errors import ShardError
from data_shards.format.decode import decode_image
from data_shards.format.shard_index import load_index
from data_shards.sources.imagenet import imagenet
from data_shards.sources.transcode import Recipe
from data_shards.streaming.sample_reader import fetch
from data_shards.verify import verify
from data_shards.writing.writer import write_shard_set
from tests import object_store
from tests.data_shards import imagenet_archive
from tests.data_shards.imagenet_archive import DEVKIT, TRAIN, VAL, make_imagenet
from tests.data_shards.test_archives import upload
from tests.faulty_proxy import Weather

pytestmark = pytest.mark.integration

RECIPE = Recipe(channels=3, size=32)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """1000 classes, 2 train images and one val image of each, odd files among them."""
    return make_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def small(tmp_path):
    return make_imagenet(tmp_path / "small", classes=9, per_class=4, val=18, odd=False)


def test_source(archive):
    classes = []
    source = imagenet(str(archive.folder), RECIPE, advance=classes.append)
    assert len(source.labels) == 3000
    assert source.test.sum() == 1000
    assert sum(classes) == 1000
    assert source.class_names[7] == f"{archive.wnids[7]} thing 7, object 7"
    everything = {**archive.train, **archive.val}
    numbers = list(range(3000))
    for number, data in zip(numbers, source.load(numbers), strict=True):
        name = source.describe(number)
        assert everything[name] == data
        if source.test[number]:
            assert source.labels[number] == archive.val_labels[int(name[15:23]) - 1]
        else:
            assert archive.wnids[source.labels[number]] == name[:9]
    assert source.validation[~source.test].sum() == 400


def test_a_set_of_it(archive, tmp_path):
    source = imagenet(str(archive.folder), RECIPE)
    index = write_shard_set(source, str(tmp_path))
    assert (index.num_classes, index.image_shape, index.train_shape) == (1000, (3, 32, 32), None)
    assert list(verify(index)) == []
    report = json.loads((tmp_path / "report.json").read_bytes())
    left_out = {entry["name"]: entry["cause"] for entry in report["undecodable"]["first"]}
    kinds = {kind: name for name, kind in archive.odd.items() if name in archive.train}
    bad = {"truncated": "decode", "empty": "empty", "text": "format"}
    assert left_out == {kinds[kind]: cause for kind, cause in bad.items()}
    assert report["duplicates"]["count"] == 1
    (pair,) = report["duplicates"]["first"]
    assert {pair["name"], pair["same_as"]} == {kinds["duplicate"], list(archive.train)[9]}
    stored = stored_images(index)
    assert set(stored) == {*archive.train, *archive.val} - set(left_out)
    for name, (extension, data) in stored.items():
        if name in archive.train:
            assert data == archive.train[name]
            assert extension == ("png" if name == kinds["png"] else "jpg")
        else:
            assert extension == "png"
            assert tuple(decode_image(data, "png").shape) == (3, 32, 32)


def stored_images(index):
    """Name in the archive -> (extension, bytes)."""
    wnids = [name.split()[0] for name in index.header.class_names]
    names = [f"{wnid}_{i}.JPEG" for wnid in wnids for i in (1, 8)]
    names += [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(1000)]
    rows = np.arange(len(index.rows))
    encoded = fetch(index, rows)
    return {
        names[int(index.rows.key[row])]: (
            index.rows.extension[row].decode(),
            bytes(encoded[row]),
        )
        for row in rows
    }


def test_train_images_with_a_long_side(small, tmp_path):
    recipe = Recipe(channels=3, size=32, long_side=64)
    index = write_shard_set(imagenet(str(small.folder), recipe), str(tmp_path / "set"))
    encoded = fetch(index, index.select("train"))
    shapes = {tuple(decode_image(bytes(data), "jpg").shape) for data in encoded.values()}
    assert {max(shape) for shape in shapes} == {64}
    assert index.header.generator["train_route"] == {
        "long_side": 64,
        "filter": "bicubic",
        "jpeg": 90,
    }
    assert list(verify(index)) == []


def test_entry_from_another_store_gives_the_same_set(small, tmp_path, capsys):
    arguments = ["imagenet", "--test-size", "32", "--out"]
    write.main([*arguments, str(tmp_path / "a"), "--source", str(small.folder)])
    write.main([*arguments, str(tmp_path / "b"), "--source", upload(small.folder)])
    shown = capsys.readouterr()
    assert "0 undecodable, 0 duplicates kept, 0 other files" in shown.out
    assert "54/54 images" in shown.err
    digests = {load_index(str(tmp_path / name)).digest for name in "ab"}
    assert len(digests) == 1


@pytest.mark.slow
def test_from_s3_to_s3_in_bad_weather_by_two_processes(small, proxy, tmp_path):
    here = write_shard_set(imagenet(str(small.folder), RECIPE), str(tmp_path))
    archives = object_store.upload(small.folder)
    proxy.weather = Weather(unavailable=0.05, reset=0.05, reset_at=700)
    source = imagenet(archives, RECIPE)
    there = write_shard_set(source, f"{archives}/set", workers=2)
    assert there.digest == here.digest
    assert list(verify(there)) == []
    assert there.store.ls() == sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert proxy.seen["unavailable"] > 0
    assert proxy.seen["reset"] > 0


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_a_missing_archive(name, small):
    (small.folder / name).unlink()
    with pytest.raises(ShardError, match=f"has no {name}"):
        imagenet(str(small.folder), RECIPE)


def test_a_cut_or_changed_archive_is_named(small):
    path = small.folder / TRAIN
    data = path.read_bytes()
    for damaged, message in (
        (data[: len(data) // 2], r"declares \d+ bytes|the archive is cut"),
        (data[:8] + b"\xff" + data[9:], r"train\.tar: damaged header at offset 0"),
        (data[:520] + b"\xff" + data[521:], r"n01440764\.tar: damaged header at offset 512"),
        (data.replace(b"n01440764_8.JPEG", b"n01440764_9.JPEG"), r"damaged header at offset \d+"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=message):
            imagenet(str(small.folder), RECIPE)


def test_counts_must_be_those_of_the_devkit(small, tmp_path):
    fewer = make_imagenet(tmp_path / "b", classes=9, per_class=3, val=17, odd=False)
    other = make_imagenet(tmp_path / "c", classes=8, per_class=4, val=18, odd=False)
    for name, folder, message in (
        (TRAIN, fewer.folder, r"n01440764\.tar has 3 images, the devkit states 4"),
        (VAL, fewer.folder, "17 val images, the ground truth has 18 labels"),
        (TRAIN, other.folder, r"8 members, the devkit has 9 classes; differing: n0144"),
    ):
        kept = (small.folder / name).read_bytes()
        (small.folder / name).write_bytes((folder / name).read_bytes())
        with pytest.raises(ShardError, match=message):
            imagenet(str(small.folder), RECIPE)
        (small.folder / name).write_bytes(kept)


def test_archives_of_devkit_and_images_that_do_not_belong_there(small):
    links = io.BytesIO()
    with tarfile.open(fileobj=links, mode="w") as tar:
        for i, (name, data) in enumerate(small.val.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if i == 2:
                link = tarfile.TarInfo("ILSVRC2012_val_00000099.JPEG")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
                extra = tarfile.TarInfo("../../escape.pkl")
                tar.addfile(extra)
    (small.folder / VAL).write_bytes(links.getvalue())
    assert imagenet(str(small.folder), RECIPE).other_files == 2


def rewrite_devkit(path, **files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"kit/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_damaged_devkit(small):
    path = small.folder / DEVKIT
    truth = {"ILSVRC2012_validation_ground_truth.txt": b"1\n2\n"}
    other = io.BytesIO()
    scipy.io.savemat(other, {"synsets": np.array([(1,)], dtype=[("WNID", object)])})
    for files, message in (
        (truth, r"has no data/meta\.mat"),
        ({"meta.mat": b"no matlab file", **truth}, r"data/meta\.mat cannot be read"),
        ({"meta.mat": other.getvalue(), **truth}, "lack ILSVRC2012_ID, num_children"),
    ):
        rewrite_devkit(path, **files)
        with pytest.raises(ShardError, match=message):
            imagenet(str(small.folder), RECIPE)
    path.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ShardError, match=f"cannot read .*{DEVKIT}"):
        imagenet(str(small.folder), RECIPE)


def test_the_helper_covers_every_odd_kind(archive):
    assert set(archive.odd.values()) == {
        "grey", "cmyk", "png", "exif", "truncated", "empty", "text", "duplicate",
    }  # fmt: skip
    assert imagenet_archive.TRAIN == TRAIN
