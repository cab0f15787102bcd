"""The small official archives and the tree of files."""

import dataclasses
import gzip
import io
import itertools
import shutil
import struct
import tarfile
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards.errors import ShardError
from data_shards.format.decode import decode_image
from data_shards.sources import cifar
from data_shards.sources.cifar import cifar10, cifar100
from data_shards.sources.imagefolder import imagefolder
from data_shards.sources.mnist import fashion_mnist, mnist
from data_shards.sources.tiny_imagenet import tiny_imagenet
from data_shards.sources.transcode import Recipe, UndecodableError, image_extension
from data_shards.storage.store import Store
from data_shards.verify import verify
from data_shards.writing.writer import write_shard_set
from tests.data_shards.imagenet_archive import encode, pixels_of

pytestmark = pytest.mark.integration


def pixels(source, number):
    data = source.encode(number)
    return decode_image(data, image_extension(data)).numpy()


def upload(folder):
    """Copy a tree into a store that is no local directory; returns its URL."""
    store = Store(f"memory://archives-{uuid.uuid4().hex}")
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(folder)), path.read_bytes())
    return store.url


# --- CIFAR -----------------------------------------------------------------------------------


def make_cifar(folder, layout, root):
    rng = np.random.default_rng(0)
    classes = layout.classes
    files = {}
    for name in (*layout.train, layout.test):
        count = layout.test_records if name == layout.test else layout.train_records
        labels = np.arange(count, dtype=np.uint8)[:, None] % classes
        coarse = rng.integers(0, 20, (count, layout.label_bytes - 1), dtype=np.uint8)
        body = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        files[name] = np.concatenate([coarse, labels, body], axis=1)
    with tarfile.open(folder / layout.archive, "w:gz") as tar:
        names = "".join(f"class_{i}\n" for i in range(classes)).encode() + b"\n"
        content = {layout.class_names: names, "readme.html": b"<html>"}
        content |= {name: records.tobytes() for name, records in files.items()}
        for name, data in content.items():
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return files


@pytest.fixture(params=["cifar10", "cifar100"])
def small_cifar(request, tmp_path, monkeypatch):
    """(source function, layout, records by file, folder): the official layout, fewer records."""
    function = {"cifar10": cifar10, "cifar100": cifar100}[request.param]
    name = f"_{request.param.upper()}"
    layout = dataclasses.replace(getattr(cifar, name), train_records=120, test_records=110)
    monkeypatch.setattr(cifar, name, layout)
    folder = tmp_path / "archive"
    folder.mkdir()
    return function, layout, make_cifar(folder, layout, "batches-bin"), folder


def test_cifar(small_cifar):
    function, layout, files, folder = small_cifar
    source = function(str(folder))
    records = np.concatenate([files[name] for name in (*layout.train, layout.test)])
    assert source.test.sum() == 110
    assert source.test[-110:].all()
    assert source.image_shape == (3, 32, 32)
    assert source.class_names[:2] == ("class_0", "class_1")
    assert np.array_equal(source.labels, records[:, layout.label_bytes - 1])
    for number in (0, 119, len(records) - 1):
        stored = records[number, layout.label_bytes :].reshape(3, 32, 32)
        assert np.array_equal(pixels(source, number), stored)


def test_cifar_from_any_store_and_by_the_name_of_the_archive(small_cifar, tmp_path):
    function, layout, _, folder = small_cifar
    digests = {
        write_shard_set(function(url), str(tmp_path / str(place))).digest
        for place, url in enumerate([str(folder / layout.archive), upload(folder)])
    }
    assert len(digests) == 1


def test_cifar_damaged(small_cifar):
    function, layout, _, folder = small_cifar
    path = folder / layout.archive
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match=rf"cannot read .*{layout.archive}"):
        function(str(folder))
    path.unlink()
    with pytest.raises(ShardError, match=rf"has no {layout.archive}"):
        function(str(folder))
    make_cifar(folder, dataclasses.replace(layout, test_records=9), "batches-bin")
    with pytest.raises(ShardError, match=r"test.* bytes, expected 110 records of 307"):
        function(str(folder))
    make_cifar(folder, dataclasses.replace(layout, test="other.bin"), "batches-bin")
    with pytest.raises(ShardError, match=rf"has no {layout.test}"):
        function(str(folder))


# --- MNIST -----------------------------------------------------------------------------------


def make_mnist(folder, train=80, test=30):
    rng = np.random.default_rng(1)
    made = {}
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = struct.pack(">4I", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(head + images.tobytes(), 1)
        )
        head = struct.pack(">2I", 0x801, count)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(head + labels.tobytes(), 1)
        )
        made[part] = (images, labels)
    return made


def test_mnist(tmp_path):
    made = make_mnist(tmp_path)
    source = mnist(str(tmp_path))
    assert source.image_shape == (1, 28, 28)
    assert np.array_equal(source.labels, np.concatenate([made["train"][1], made["t10k"][1]]))
    assert source.test.tolist() == [False] * 80 + [True] * 30
    assert np.array_equal(pixels(source, 79)[0], made["train"][0][79])
    assert np.array_equal(pixels(source, 80)[0], made["t10k"][0][0])
    here = write_shard_set(source, str(tmp_path / "set"))
    assert list(verify(here)) == []
    assert write_shard_set(mnist(upload(tmp_path)), str(tmp_path / "b")).digest == here.digest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with"),
        (b"not gzip", "cannot read"),
        (gzip.compress(struct.pack(">4I", 0x0D03, 1, 28, 28)), "begins with 00000d03"),
        (gzip.compress(struct.pack(">4I", 0x803, 5, 28, 28)), "does not hold the 3920 bytes"),
        (gzip.compress(struct.pack(">4I", 0x803, 1, 1, 1) + b"ab"), "does not hold the 1 bytes"),
        (gzip.compress(struct.pack(">4I", 0x803, 2**31, 2**31, 9)), "more than 1073741824"),
        (gzip.compress(struct.pack(">4I", 0x803, 9, 28, 28) + bytes(9 * 784)), "39 images and 110"),
    ],
    ids=itertools.count(),  # compressed bytes hold the time
)
def test_mnist_damaged(data, message, tmp_path):
    make_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(ShardError, match=message):
        mnist(str(tmp_path))


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="needs Debian's package dataset-fashion-mnist",
)
def test_fashion_mnist_of_the_package():
    source = fashion_mnist()
    assert source.image_shape == (1, 28, 28)
    assert np.bincount(source.labels).tolist() == [7000] * 10
    assert (source.test.sum(), source.validation.sum()) == (10_000, 10_000)
    assert pixels(source, 0)[0].sum() == 76_247  # an ankle boot
    assert source.class_names[source.labels[0]] == "Ankle boot"


def test_fashion_mnist_has_the_layout_of_mnist_and_its_own_classes(tmp_path):
    make_mnist(tmp_path)
    source, other = fashion_mnist(str(tmp_path)), mnist(str(tmp_path))
    assert (source.name, source.class_names[9]) == ("fashion-mnist", "Ankle boot")
    assert np.array_equal(source.labels, other.labels)
    assert np.array_equal(pixels(source, 3), pixels(other, 3))
    with pytest.raises(ShardError, match=r"nowhere has no train-images-idx3-ubyte\.gz"):
        fashion_mnist(str(tmp_path / "nowhere"))


def test_mnist_missing(tmp_path):
    with pytest.raises(ShardError, match=r"has no train-images.*t10k-labels-idx1-ubyte\.gz"):
        mnist(str(tmp_path))


# --- Tiny-ImageNet ---------------------------------------------------------------------------


def make_tiny(folder, classes=8, per_class=5, val=20):
    """Returns name in the archive -> bytes."""
    wnids = [f"n{7_000_000 - 31 * i:08d}" for i in range(classes)]
    images = {}
    for label, wnid in enumerate(wnids):
        for i in range(per_class):
            array = Image.fromarray(pixels_of(label, i, (64, 64)))
            mode = "L" if i == 1 else "RGB"
            images[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = encode(array.convert(mode), "JPEG")
    truth = {f"val_{i}.JPEG": wnids[i % classes] for i in range(val)}
    for i, name in enumerate(truth):
        array = Image.fromarray(pixels_of(i % classes, 900 + i, (64, 64)))
        images[f"val/images/{name}"] = encode(array.convert("L" if i == 3 else "RGB"), "JPEG")
    texts = {
        "wnids.txt": "\n".join(wnids),
        "words.txt": "".join(f"{wnid}\tthing {i}, other\n" for i, wnid in enumerate(wnids)),
        "val/val_annotations.txt": "".join(f"{n}\t{w}\t0\t0\t62\t62\n" for n, w in truth.items()),
    }
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        for i, (name, data) in enumerate(
            {**texts, **images, "test/images/test_0.JPEG": b""}.items()
        ):
            kind = zipfile.ZIP_STORED if i % 2 else zipfile.ZIP_DEFLATED
            archive.writestr(f"tiny-imagenet-200/{name}", data, kind)
    return sorted(wnids), images, truth


def test_tiny_imagenet(tmp_path):
    wnids, images, truth = make_tiny(tmp_path)
    source = tiny_imagenet(str(tmp_path))
    assert len(source.labels) == len(images) == 60
    assert source.test.sum() == 20
    assert source.class_names[0] == f"{wnids[0]} thing 7, other"
    for number in range(60):
        name = source.describe(number).removeprefix("tiny-imagenet-200/")
        data, label = images[name], source.labels[number]
        assert wnids[label] == (truth.get(name.rpartition("/")[2]) or name.split("/")[1])
        stored, original = source.encode(number), decode_image(data, "jpg")
        grey = original.shape[0] == 1
        assert image_extension(stored) == ("png" if grey or source.test[number] else "jpg")
        assert (stored == data) == (not grey and not source.test[number])
        expected = original.expand(3, 64, 64).numpy()
        assert np.array_equal(decode_image(stored, image_extension(stored)).numpy(), expected)
    here = write_shard_set(source, str(tmp_path / "set"))
    assert here.train_shape == (3, 64, 64)
    assert list(verify(here)) == []
    there = write_shard_set(tiny_imagenet(upload(tmp_path)), str(tmp_path / "b"))
    assert there.digest == here.digest


def test_tiny_imagenet_damaged(tmp_path):
    make_tiny(tmp_path)
    path = tmp_path / "tiny-imagenet-200.zip"
    data = path.read_bytes()
    source = tiny_imagenet(str(path))
    load: Any = source.load
    start = data.find(b"\xff\xd8\xff", int(load.members.offset[30]))
    path.write_bytes(data[: start + 40] + b"\0\1\2\3" + data[start + 44 :])
    stored = np.flatnonzero(~load.deflated & (load.members.offset <= start))
    hit = stored[np.argmax(load.members.offset[stored])]
    with pytest.raises(ShardError, match=r"at offset \d+: (CRC-32|Error)"):
        source.encode(int(hit))
    path.write_bytes(data[:5000])
    with pytest.raises(ShardError, match=r"cannot read .*tiny-imagenet-200"):
        tiny_imagenet(str(path))
    with pytest.raises(ShardError, match=r"images from|the file changed"):
        source.encode(59)


def test_tiny_imagenet_of_another_layout(tmp_path):
    wnids, *_ = make_tiny(tmp_path, val=19)
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("tiny-imagenet-200/train/n00000009/images/x.JPEG", b"x")
    with pytest.raises(ShardError, match=r"images and wnids\.txt differ: n00000009"):
        tiny_imagenet(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", wnids[0])
    with pytest.raises(ShardError, match=r"cannot read .*words\.txt"):
        tiny_imagenet(str(path))


# --- ImageFolder -----------------------------------------------------------------------------


def make_tree(folder, second="val"):
    for part, count in (("train", 6), (second, 3)):
        for label, name in enumerate(("cat", "dog", "eel")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(pixels_of(label, i + 50 * (part != "train")))
                data = encode(image, ("JPEG", "PNG", "WEBP")[i % 3])
                suffix = ("jpg", "PNG", "webp")[i % 3]
                (folder / part / name / f"{name} {i}.{suffix}").write_bytes(data)
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    return Recipe(channels=3, size=32)


@pytest.mark.parametrize("second", ["val", "test"])
def test_image_folder(second, tmp_path):
    recipe = make_tree(tmp_path / "tree", second)
    source = imagefolder(str(tmp_path / "tree"), recipe)
    assert (source.name, source.class_names, source.other_files) == (
        "tree",
        ("cat", "dog", "eel"),
        1,
    )
    assert np.bincount(source.labels[source.test]).tolist() == [3, 3, 3]
    for number in range(27):
        path = tmp_path / "tree" / source.describe(number)
        assert path.parent.name == source.class_names[source.labels[number]]
        assert path.parts[-3] == (second if source.test[number] else "train")
        assert (source.encode(number) == path.read_bytes()) == (not source.test[number])
    index = write_shard_set(source, str(tmp_path / "set"))
    assert (index.image_shape, index.train_shape) == ((3, 32, 32), None)
    assert list(verify(index)) == []
    other = imagefolder(upload(tmp_path / "tree"), recipe, name="tree")
    assert write_shard_set(other, str(tmp_path / "b")).digest == index.digest


def test_image_folder_of_one_size(tmp_path):
    for part, count in (("train", 8), ("test", 4)):
        for label, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(pixels_of(label, i, (16, 16))).convert("L")
                image.save(tmp_path / part / name / f"{i}.png")
    source = imagefolder(str(tmp_path), Recipe(channels=1, size=16, uniform=True), name="ab")
    index = write_shard_set(source, str(tmp_path / "set"))
    assert index.image_shape == index.train_shape == (1, 16, 16)
    assert list(verify(index)) == []
    other = imagefolder(str(tmp_path), Recipe(channels=1, size=8, uniform=True))
    with pytest.raises(UndecodableError, match="16 x 16 pixels in a set of 8 x 8"):
        other.encode(0)


def test_image_folder_of_another_layout(tmp_path):
    recipe = make_tree(tmp_path)
    (tmp_path / "val" / "fox").mkdir()
    with pytest.raises(ShardError, match="classes of train/ and val/ differ: fox"):
        imagefolder(str(tmp_path), recipe)
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(ShardError, match="train/fox has no images"):
        imagefolder(str(tmp_path), recipe)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(ShardError, match=r"no folders train/ and val/ or test/"):
        imagefolder(str(tmp_path), recipe)


def test_an_image_file_over_its_limit_is_refused_before_it_is_read(tmp_path):
    for part in ("train", "val"):
        folder = tmp_path / part / "a"
        folder.mkdir(parents=True)
        with (folder / "x.png").open("wb") as file:
            file.truncate(20 << 30)  # sparse: 20 GiB of nothing
    with pytest.raises(ShardError, match=r"train/a/x\.png has 21,474,836,480 bytes, the limit is"):
        imagefolder(str(tmp_path), Recipe(channels=1, size=8, uniform=True))
