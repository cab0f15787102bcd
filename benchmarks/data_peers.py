"""Peers of `benchmarks.data`: `python -m benchmarks.data_peers webdataset|mosaicml|write ...`.

Each runs alone in a process, under any interpreter that has torch, Pillow and the peer. Both are
set up as their own introductions say, with two worker processes; images go through Pillow, as
there. Batches are uint8 (B, 3, 224, 224).
"""

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = 224
WORKERS = 2
SHARDS, SHUFFLE = 100, 1000


def crop(image: Image.Image) -> torch.Tensor:
    """Random-resized crop of scale 0.08-1 and ratio 3/4-4/3, mirrored half of the time."""
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if across <= width and down <= height:
            left, top = random.randint(0, width - across), random.randint(0, height - down)
            box = (left, top, left + across, top + down)
            break
    image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def webdataset(urls: str, _: str, batch: int) -> Iterator[Any]:
    """Batches of WebDataset's pipeline, from URLs separated by blanks."""
    import webdataset as wds

    dataset = (
        wds.WebDataset(urls.split(), shardshuffle=SHARDS)
        .shuffle(SHUFFLE)
        .decode("pil")
        .to_tuple("jpg;jpeg", "cls")
        .map_tuple(crop, int)
        .batched(batch)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS))


def mosaicml(remote: str, local: str, batch: int) -> Iterator[Any]:
    """Batches of MosaicML Streaming's dataset in torch's loader."""
    from streaming import StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return crop(sample["image"]), sample["label"]

    dataset = Images(remote=remote, local=local, shuffle=True, batch_size=batch)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=WORKERS))


PEERS = {"webdataset": webdataset, "mosaicml": mosaicml}


def write(source: str, out: str, shard_bytes: str) -> None:
    """Write MosaicML's format from a folder of classes of JPEGs, in shuffled order."""
    from streaming import MDSWriter

    files = sorted(Path(source).glob("*/*"))
    random.Random(0).shuffle(files)
    columns = {"image": "jpeg", "label": "int"}
    with MDSWriter(out=out, columns=columns, size_limit=int(shard_bytes)) as writer:
        for file in files:
            writer.write({"image": Image.open(file), "label": int(file.parent.name)})


def measure(name: str, place: str, local: str, batch: int, steps: int) -> dict[str, float]:
    """Time to a first batch; images per second and processor time of `steps` more."""
    begin = time.perf_counter()
    batches = PEERS[name](place, local, batch)
    next(batches)
    start, cpu = time.perf_counter(), session_cpu_s()
    images = 0
    for _ in range(steps):
        pixels, _ = next(batches)
        if pixels.dtype != torch.uint8 or pixels.shape != (batch, 3, SIZE, SIZE):
            raise ValueError(f"{name} gave {pixels.dtype} of shape {tuple(pixels.shape)}")
        images += batch
    seconds = time.perf_counter() - start
    return {
        "first_s": start - begin,
        "images_per_s": images / seconds,
        "cpu_ms": 1000 * (session_cpu_s() - cpu) / images,
    }


def session_cpu_s() -> float:
    """Return the processor time of all processes of this session, ended children included."""
    return sum(_cpu_s(path) for path in Path("/proc").glob("[0-9]*/stat") if _of_session(path))


def process_cpu_s(pid: int) -> float:
    """Return the processor time of a process and its ended children."""
    return _cpu_s(Path(f"/proc/{pid}/stat"))


def _of_session(stat: Path) -> bool:
    try:
        return os.getsid(int(stat.parent.name)) == os.getsid(0)
    except ProcessLookupError:
        return False


def _cpu_s(stat: Path) -> float:
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main(name: str, *arguments: str) -> None:
    """Run one peer and print its figures, or write its data."""
    torch.set_num_threads(1)
    if name == "write":
        write(*arguments)
        return
    place, local, batch, steps = arguments
    sys.stdout.write(json.dumps(measure(name, place, local, int(batch), int(steps))))


if __name__ == "__main__":
    main(*sys.argv[1:])
