"""The ImageNet development kit: which synset has which number, and the labels of the val images."""

import dataclasses
import io
import tarfile
import zlib

import numpy as np
import numpy.typing as npt

from data_shards.errors import ShardError
from data_shards.sources.archive import read_small
from data_shards.storage.store import Store

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_ARCHIVE = 64 << 20
_MAX_MEMBER = 4 << 20
_FIELDS = ("ILSVRC2012_ID", "WNID", "words", "num_children", "num_train_images")


@dataclasses.dataclass(frozen=True)
class Devkit:
    """The classes in the sorted order of their WordNet ids, which is that of the labels."""

    wnids: tuple[str, ...]
    words: tuple[str, ...]
    train_images: tuple[int, ...]
    """Images of each class in the train archive."""
    val_labels: npt.NDArray[np.int64]
    """Label of each val image, in the order of their numbers from 1 on."""


def read_devkit(store: Store) -> Devkit:
    """Read `ILSVRC2012_devkit_t12.tar.gz`.

    Raises:
        ShardError: missing, damaged or of another layout.
    """
    where = f"{store}/{DEVKIT}"
    files = _members(store, where)
    synsets = _synsets(files[_META], where)
    try:
        leaves = sorted(
            (str(row["WNID"]), int(row["ILSVRC2012_ID"]), str(row["words"]),
             int(row["num_train_images"]))
            for row in synsets
            if int(row["num_children"]) == 0
        )  # fmt: skip
        ids = np.array(files[_TRUTH].split(), dtype=np.int64)
    except (ValueError, TypeError) as error:
        raise ShardError(f"{where}: {error}") from error
    label_of = {number: label for label, (_, number, _, _) in enumerate(leaves)}
    unknown = sorted(set(ids.tolist()) - set(label_of))
    if unknown or len(label_of) != len(leaves) or not leaves:
        raise ShardError(
            f"{where}: {len(leaves)} classes with {len(label_of)} numbers; the ground truth has "
            f"{len(unknown)} others: {unknown[:5]}"
        )
    return Devkit(
        wnids=tuple(leaf[0] for leaf in leaves),
        words=tuple(leaf[2] for leaf in leaves),
        train_images=tuple(leaf[3] for leaf in leaves),
        val_labels=np.array([label_of[number] for number in ids.tolist()], dtype=np.int64),
    )


def _members(store: Store, where: str) -> dict[str, bytes]:
    data = read_small(store, DEVKIT, _MAX_ARCHIVE)
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            for member in tar:
                name = "/".join(member.name.split("/")[-2:])
                body = tar.extractfile(member) if name in (_META, _TRUTH) else None
                if body is not None and member.size <= _MAX_MEMBER:
                    found[name] = body.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ShardError(f"cannot read {where}: {error}") from error
    missing = [name for name in (_META, _TRUTH) if name not in found]
    if missing:
        raise ShardError(f"{where} has no {' and no '.join(missing)}")
    return found


def _synsets(data: bytes, where: str) -> npt.NDArray[np.void]:
    """Return the one variable needed of a MATLAB file: a record per synset. Runs no code."""
    from scipy.io import loadmat  # slow to import, and needed for writing only

    try:
        synsets = loadmat(
            io.BytesIO(data), variable_names=["synsets"], squeeze_me=True, appendmat=False
        )["synsets"]
        lacking = set(_FIELDS) - set(synsets.dtype.names or ())
    # A damaged MATLAB file fails in many ways, all of which mean the same.
    except Exception as error:
        raise ShardError(f"{where}: {_META} cannot be read: {error!r}") from error
    if lacking:
        raise ShardError(f"{where}: synsets of {_META} lack {', '.join(sorted(lacking))}")
    return np.atleast_1d(synsets)
