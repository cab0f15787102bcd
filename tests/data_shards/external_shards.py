"""Shards as other programs write them: WebDataset itself, img2dataset, timm, `tar` of a folder."""

import io
import json
import tarfile

import numpy as np
import webdataset
from PIL import Image

from tests.data_shards.imagenet_archive import pixels_of


def encoded(label, number, size=(16, 16), kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(label, number, size)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def stock(folder, split, count, *, shards=2, classes=3, first=0, pattern="%s-%%04d.tar"):
    """What `webdataset.ShardWriter` writes: its fields in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(folder / (pattern % split))
    with webdataset.ShardWriter(name, maxcount=-(-count // shards), verbose=0) as writer:
        for i in range(first, first + count):
            image = pixels_of(i % classes, i, (16, 16))
            writer.write({"__key__": f"sample{i:06d}", "png": image, "cls": i % classes})


def add(tar, name, body):
    info = tarfile.TarInfo(name)
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))


def img2dataset(path, count, *, first=0, classes=3, size=(16, 16), field="class"):
    """Members KEY.jpg, KEY.txt, KEY.json, the keys numbers of shard and sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            key = f"{int(path.stem):05d}{i:04d}"
            fields = {"caption": f"no {i}", "key": key, "status": "success", "width": size[0],
                      field: i % classes}  # fmt: skip
            add(tar, f"{key}.jpg", encoded(i % classes, i, size, "JPEG"))
            add(tar, f"{key}.txt", f"no {i}".encode())
            add(tar, f"{key}.json", json.dumps(fields).encode())


def timm(path, count, *, first=0, classes=3):
    """Members KEY.cls, KEY.jpg, KEY.json; images of all sizes, and a label that ends in a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.random.default_rng(first).integers(20, 40, (count, 2)).tolist()
    with tarfile.open(path, "w") as tar:
        for i, size in zip(range(first, first + count), sizes, strict=True):
            key = f"n{i % classes:08d}_{i}"
            add(tar, f"{key}.cls", f"{i % classes}\n".encode())
            add(tar, f"{key}.jpg", encoded(i % classes, i, size, "JPEG"))
            add(tar, f"{key}.json", json.dumps({"label": i % classes, "filename": key}).encode())


def folders(path, count, *, first=0, names=("chat", "chien", "éléphant")):
    """What `tar cf` of a tree of folders makes: `./CLASS/NAME.JPEG` and the folders themselves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            folder = tarfile.TarInfo(f"./{name}/")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for i in range(first, first + count):
                if i % len(names) == number:
                    add(tar, f"./{name}/öl {i}.JPEG", encoded(number, i, kind="JPEG"))
