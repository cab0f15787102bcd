"""Archives laid out exactly like the official ones of ImageNet-1k, with small images."""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from scipy.io import savemat

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_FIRST_WNID = 1440764
_SIZES = ((90, 72), (72, 90), (80, 80), (100, 64))  # width, height


@dataclasses.dataclass(frozen=True)
class Archive:
    """What `make_imagenet` made."""

    folder: Path
    wnids: list[str]
    """In sorted order: place = label."""
    train: dict[str, bytes]
    """Name -> bytes of every train image."""
    val: dict[str, bytes]
    val_labels: list[int]
    odd: dict[str, str]
    """Name -> what is odd about it: grey, cmyk, png, exif, truncated, empty, text, duplicate."""


def make_imagenet(
    folder: Path, *, classes: int = 1000, per_class: int = 2, val: int | None = None, odd=True
) -> Archive:
    """Write the three archives; `val` images in all (default: one per class).

    With `odd` some train images are grey, CMYK, a PNG by another name, turned by EXIF, or a
    duplicate, and three cannot be decoded; a grey and a CMYK image are among the val images.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wnids = [f"n{_FIRST_WNID + 1009 * label:08d}" for label in range(classes)]
    train = {
        f"{wnid}_{7 * i + 1}.JPEG": picture(label, i)
        for label, wnid in enumerate(wnids)
        for i in range(per_class)
    }
    count = classes if val is None else val
    val_labels = [(37 * i + 5) % classes for i in range(count)]
    val_images = {
        f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(label, 10_000 + i)
        for i, label in enumerate(val_labels)
    }
    strange = _make_odd(train, val_images) if odd else {}
    _write_train(folder / TRAIN, wnids, train)
    _write_tar(folder / VAL, val_images)
    _write_devkit(folder / DEVKIT, wnids, val_labels, train)
    return Archive(folder, wnids, train, val_images, val_labels, strange)


def picture(label: int, number: int, size: tuple[int, int] | None = None) -> bytes:
    """A JPEG whose colours and stripes belong to the class, with noise of its own."""
    return simplejpeg.encode_jpeg(pixels_of(label, number, size), quality=88)


def pixels_of(label: int, number: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (H, W, 3)."""
    width, height = size or _SIZES[(label + number) % len(_SIZES)]
    own = np.random.default_rng([label, number])
    across, down = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    colour = np.array([label % 10, label // 10 % 10, label // 100 % 10]) * 16 + 50
    stripes = 40 * np.sin(across * (0.1 + 0.05 * (label % 7)) + down * 0.07 * (label % 5))
    noise = own.integers(-20, 21, (height, width, 1))
    return np.clip(colour + stripes + noise + own.integers(-9, 10, 3), 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _make_odd(train: dict[str, bytes], val: dict[str, bytes]) -> dict[str, str]:
    """Replace some images; returns what each of them is."""
    names, val_names = list(train), list(val)
    image = Image.fromarray(pixels_of(3, 77))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    odd = {
        "grey": encode(image.convert("L"), "JPEG"),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "png": encode(image, "PNG"),
        "exif": encode(image, "JPEG", exif=exif.tobytes()),
        "truncated": train[names[4]][:900],
        "empty": b"",
        "text": b"<html>404</html>",
        "duplicate": train[names[9]],
    }
    found = {}
    for place, (kind, data) in enumerate(odd.items()):
        train[names[place]] = data
        found[names[place]] = kind
    for place, (kind, mode) in enumerate((("grey", "L"), ("cmyk", "CMYK"))):
        other = Image.fromarray(pixels_of(5, 78 + place))
        val[val_names[place]] = encode(other.convert(mode), "JPEG")
        found[val_names[place]] = kind
    return found


def _write_train(path: Path, wnids: list[str], train: dict[str, bytes]) -> None:
    by_class: dict[str, dict[str, bytes]] = {wnid: {} for wnid in wnids}
    for name, data in train.items():
        by_class[name.partition("_")[0]][name] = data
    inner = {f"{wnid}.tar": _tar(images) for wnid, images in by_class.items()}
    _write_tar(path, inner)


def _write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(_tar(members))


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _write_devkit(
    path: Path, wnids: list[str], val_labels: list[int], train: dict[str, bytes]
) -> None:
    # Numbers of classes are not in the order of their WordNet ids, and inner nodes follow.
    ids = [(label * 7 + 3) % len(wnids) + 1 if len(wnids) % 7 else label + 1
           for label in range(len(wnids))]  # fmt: skip
    counts = dict.fromkeys(wnids, 0)
    for name in train:
        counts[name.partition("_")[0]] += 1
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object),
             ("num_children", object), ("children", object), ("wordnet_height", object),
             ("num_train_images", object)]  # fmt: skip
    leaves = [
        (ids[label], wnid, f"thing {label}, object {label}", "", 0, np.zeros(0), 0, counts[wnid])
        for label, wnid in enumerate(wnids)
    ]
    inner = (len(wnids) + 1, "n99999999", "entity", "", 2, np.array([1, 2]), 3, 0)
    synsets = np.array([*sorted(leaves, key=lambda leaf: leaf[0]), inner], dtype=kinds)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    truth = "".join(f"{ids[label]}\n" for label in val_labels).encode()
    root = "ILSVRC2012_devkit_t12"
    with tarfile.open(path, "w:gz") as tar:
        files = (
            ("readme.txt", b"kit"),
            ("data/meta.mat", meta.getvalue()),
            ("data/ILSVRC2012_validation_ground_truth.txt", truth),
        )
        for name, data in files:
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
