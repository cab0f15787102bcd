"""Decoding and random-resized crop to 224, one thread: `python -m benchmarks.decode`.

Peers that are not installed are reported as not run. All draw and cut the same parts and put uint8
into the same contiguous (3, 224, 224) slot of a batch. The limit is what libjpeg-turbo takes for
the same images whole, by its own `tjbench` (Debian: libjpeg-turbo-progs), and torch for the resize.
"""

import importlib
import io
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.report import write_result
from benchmarks.timing import interleaved
from data_shards.format.crop_box import random_crop_box
from data_shards.format.decode import decode_crop
from data_shards.format.image_pixels import decode_part

SIZE = 224
COUNT = 64
REPEATS = 9
_SHIPPED = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
_FPS = re.compile(r"Frame rate:\s+([\d.]+) fps")
_TJBENCH_S = 0.2  # per image
Words = npt.NDArray[np.uint64]
Sample = tuple[bytes, Words]
Crop = Callable[[bytes, Words], torch.Tensor]
"""(JPEG, random words) -> uint8 (3, 224, 224) in any layout."""


def photographs(count: int, height: int, width: int, *, seed: int = 0) -> list[bytes]:
    """JPEGs of quality 90, 4:2:0, of random images with the spectrum of photographs.

    At 375 x 500 they have 90 kB, as the images of ImageNet do.
    """
    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.sqrt(rows**2 + columns**2)
    frequency[0, 0] = 1

    def plane(exponent: float) -> npt.NDArray[np.float64]:
        noise = generator.standard_normal((*frequency.shape, 2)).view(complex)[..., 0]
        values = np.fft.irfft2(noise / frequency**exponent, s=(height, width))
        return values / values.std()

    images = []
    for _ in range(count):
        grey = plane(1.2)
        colours = np.stack([grey + 0.6 * plane(1.6) for _ in range(3)], axis=-1)
        pixels = np.clip(45 * colours + 120, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


def mixed_photographs(count: int, *, seed: int = 0) -> tuple[list[bytes], str]:
    """JPEGs of crops of real photographs, of mixed sizes and qualities, and where they are from.

    Sources are the photographs that scikit-learn and, where it is installed, scikit-image ship.
    Crops have half to all of each side, short sides of 240 to 640 pixels, qualities of 75 to 95.
    """
    from sklearn.datasets import load_sample_images

    found: list[npt.NDArray[np.uint8]] = list(load_sample_images().images)
    origin = "scikit-learn"
    try:
        shipped = importlib.import_module("skimage.data")
        found += [getattr(shipped, name)() for name in _SHIPPED]
        origin += " and scikit-image"
    except ImportError:
        origin += " alone (scikit-image is not installed)"
    generator = np.random.default_rng(seed)
    images = []
    for number in range(count):
        whole = Image.fromarray(found[number % len(found)])
        share, place = generator.uniform(0.5, 1, 2), generator.uniform(0, 1, 2)
        edge = [round(s * part) for s, part in zip(whole.size, share, strict=True)]
        left, top = (int((s - e) * p) for s, e, p in zip(whole.size, edge, place, strict=True))
        scale = generator.uniform(240, 640) / min(edge)
        size = (round(edge[0] * scale), round(edge[1] * scale))
        box = (left, top, left + edge[0], top + edge[1])
        picture = whole.resize(size, Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(generator.integers(75, 96)))
        images.append(buffer.getvalue())
    return images, origin


def ours(data: bytes, words: Words) -> torch.Tensor:
    """The route of the stream."""
    return decode_crop(data, "jpg", (SIZE, SIZE), words)


def pillow(data: bytes, words: Words) -> torch.Tensor:
    """The route of most training code."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = random_crop_box(image.height, image.width, words)
    part = (box.left, box.top, box.right, box.bottom)
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=part)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def torchvision() -> Crop:
    """decode_jpeg and resized_crop of transforms.v2."""
    module = importlib.import_module("torchvision.io")
    functional = importlib.import_module("torchvision.transforms.v2.functional")

    def crop(data: bytes, words: Words) -> torch.Tensor:
        encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        image = module.decode_jpeg(encoded, mode=module.ImageReadMode.RGB)
        box = random_crop_box(image.shape[1], image.shape[2], words)
        part = (box.top, box.left, box.bottom - box.top, box.right - box.left)
        result: torch.Tensor = functional.resized_crop(image, *part, [SIZE, SIZE], antialias=True)
        return result

    crop(photographs(1, 32, 32)[0], np.zeros(4, np.uint64))
    return crop


def opencv(interpolation: str) -> Crop:
    """Return imdecode and resize of OpenCV."""
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    kind = getattr(cv2, interpolation)

    def crop(data: bytes, words: Words) -> torch.Tensor:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        box = random_crop_box(image.shape[0], image.shape[1], words)
        part = image[box.top : box.bottom, box.left : box.right]
        return torch.from_numpy(cv2.resize(part, (SIZE, SIZE), interpolation=kind)).permute(2, 0, 1)

    return crop


PEERS: dict[str, Callable[[], Crop]] = {
    "Pillow": lambda: pillow,
    "torchvision decode_jpeg, v2.resized_crop": torchvision,
    "OpenCV, INTER_AREA": lambda: opencv("INTER_AREA"),
    "OpenCV, INTER_LINEAR (not antialiased)": lambda: opencv("INTER_LINEAR"),
}


def with_words(images: Sequence[bytes]) -> list[Sample]:
    """Return the images, each with the random words that draw its part."""
    drawn = np.random.Generator(np.random.Philox(1)).integers(0, 2**64, (COUNT, 4), dtype=np.uint64)
    return list(zip(images, drawn, strict=True))


def measure(samples: Sequence[Sample], routes: dict[str, Crop]) -> dict[str, float]:
    """Images per second of every route."""
    slot = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)

    def all_images(route: Crop) -> Callable[[], None]:
        def work() -> None:
            for sample in samples:
                slot.copy_(route(*sample))

        return work

    contestants = {name: all_images(route) for name, route in routes.items()}
    seconds = interleaved(contestants, torch.device("cpu"), repeats=REPEATS)
    return {name: len(samples) / taken for name, taken in seconds.items()}


def library_seconds(images: Sequence[bytes]) -> float:
    """Processor seconds per image of libjpeg-turbo for whole images, by its own benchmark.

    It tells frames per second by the clock; the process has the same share of a core all the time.

    Raises:
        FileNotFoundError: tjbench is not installed.
    """
    program = shutil.which("tjbench")
    if program is None:
        raise FileNotFoundError("tjbench is not installed")
    options = ["-nowrite", "-benchtime", str(_TJBENCH_S), "-warmup", "0.02"]
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image.jpg")
        for data in images:
            file.write_bytes(data)
            before, begin = os.times().children_user, time.perf_counter()
            done = subprocess.run(
                [program, str(file), *options], capture_output=True, text=True, check=True
            )
            seconds = time.perf_counter() - begin
            rate = _FPS.search(done.stdout)
            if rate is None:
                raise RuntimeError(f"tjbench tells no rate: {done.stdout!r}")
            share = (os.times().children_user - before) / seconds
            taken.append(share / float(rate[1]))
    return statistics.mean(taken)


def parts_seconds(samples: Sequence[Sample]) -> dict[str, float]:
    """Processor seconds per image of our decoding alone, and of the resize that follows it."""
    parts = [decode_part(data, "jpg", (SIZE, SIZE), words) for data, words in samples]
    slot = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)

    def decoding() -> None:
        for data, words in samples:
            decode_part(data, "jpg", (SIZE, SIZE), words)

    def resizing() -> None:
        for part in parts:
            batch = torch.from_numpy(part).unsqueeze(0).permute(0, 3, 1, 2)
            scaled = torch.nn.functional.interpolate(
                batch, size=(SIZE, SIZE), mode="bilinear", antialias=True
            )
            slot.copy_(scaled[0])

    contestants = {"decode": decoding, "resize": resizing}
    seconds = interleaved(contestants, torch.device("cpu"), repeats=REPEATS)
    return {name: taken / len(samples) for name, taken in seconds.items()}


def limit_rows(kind: str, samples: Sequence[Sample], rate: float) -> list[dict[str, Any]]:
    """Rows with the limit of the library beside our rate."""
    own = parts_seconds(samples)
    try:
        library = library_seconds([data for data, _ in samples])
    except FileNotFoundError as error:
        return [{"image": kind, "route": "limit", "images/s/core": f"not run: {error}"}]
    limit = 1 / (library + own["resize"])
    left = 1 / rate - own["decode"] - own["resize"]
    return [
        {
            "image": kind,
            "route": "limit: libjpeg-turbo, image whole, and the resize",
            "images/s/core": round(limit, 1),
            "ours / it": round(rate / limit, 2),
            "ms": f"decode {1000 * library:.2f}, resize {1000 * own['resize']:.2f}",
        },
        {
            "image": kind,
            "route": "ours, its parts",
            "images/s/core": round(rate, 1),
            "ours / it": 1,
            "ms": f"decode {1000 * own['decode']:.2f}, resize {1000 * own['resize']:.2f}, "
            f"the rest {1000 * left:.2f}",
        },
    ]


def _installed(make: Callable[[], Crop]) -> Crop | Exception:
    try:
        return make()
    except (ImportError, RuntimeError) as error:
        return error


def sizes_of(images: Sequence[bytes]) -> list[str]:
    """Smallest, middle and largest width x height by area, and the mean kB."""
    sizes = sorted((Image.open(io.BytesIO(data)).size for data in images), key=np.prod)
    chosen = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    kilobytes = sum(map(len, images)) / len(images) / 1000
    return [*(f"{width} x {height}" for width, height in chosen), f"{kilobytes:.0f} kB on average"]


def main() -> None:
    """Measure every route and record the table."""
    torch.set_num_threads(1)
    routes: dict[str, Crop] = {"ours": ours}
    missing = {}
    for name, make in PEERS.items():
        found = _installed(make)
        if isinstance(found, Exception):
            missing[name] = f"not run: {found}"
        else:
            routes[name] = found
    rows: list[dict[str, Any]] = []
    real, origin = mixed_photographs(COUNT)
    sets = {
        "500 x 375": photographs(COUNT, 375, 500),
        "1600 x 1200": photographs(COUNT, 1200, 1600),
        "real, mixed": real,
    }
    before = os.getloadavg()[0]
    for kind, images in sets.items():
        samples = with_words(images)
        rates = measure(samples, routes)
        for name in ("ours", *PEERS):
            row: dict[str, Any] = {"image": kind, "route": name}
            if name in rates:
                row["images/s/core"] = round(rates[name], 1)
                row["ours / it"] = round(rates["ours"] / rates[name], 2)
            else:
                row["images/s/core"] = missing[name]
            rows.append(row)
        rows += limit_rows(kind, samples, rates["ours"])
    write_result(
        "decode",
        rows,
        [
            f"{COUNT} JPEGs, 4:2:0, quality 90 of random images with the spectrum of photographs; "
            f"real, mixed: {', '.join(sizes_of(real))} of {origin}, quality 75 to 95.",
            f"Random-resized crop (scale 0.08-1, ratio 3/4-4/3) to {SIZE} x {SIZE} uint8; "
            f"processor time, median of {REPEATS} turns.",
            "limit: libjpeg-turbo decodes images whole (tjbench, processor time), torch resizes. "
            "Ours stops at the last row of the part and decodes large images at a part of their "
            "size, so it may be over it.",
            f"Load average of the machine before: {before:.1f}, of which nothing is ours.",
            "Targets at 500 x 375: at least 1.6 times Pillow, no slower than the best peer.",
        ],
    )


if __name__ == "__main__":
    main()
