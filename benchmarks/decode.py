"""Decoding and random-resized crop to 224, one thread: `python -m benchmarks.decode`.

Peers that are not installed are reported as not run. All draw and cut the same parts and put uint8
into the same contiguous (3, 224, 224) slot of a batch.
"""

import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.report import write_result
from benchmarks.timing import interleaved
from data_shards.format.crop_box import random_crop_box
from data_shards.format.decode import decode_crop

SIZE = 224
COUNT = 64
REPEATS = 15
Words = npt.NDArray[np.uint64]
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


def measure(height: int, width: int, routes: dict[str, Crop]) -> dict[str, float]:
    """Images per second of every route."""
    images = photographs(COUNT, height, width)
    drawn = np.random.Generator(np.random.Philox(1)).integers(0, 2**64, (COUNT, 4), dtype=np.uint64)
    samples = list(zip(images, drawn, strict=True))
    slot = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)

    def all_images(route: Crop) -> Callable[[], None]:
        def work() -> None:
            for sample in samples:
                slot.copy_(route(*sample))

        return work

    contestants = {name: all_images(route) for name, route in routes.items()}
    seconds = interleaved(contestants, torch.device("cpu"), repeats=REPEATS)
    return {name: COUNT / taken for name, taken in seconds.items()}


def _installed(make: Callable[[], Crop]) -> Crop | Exception:
    try:
        return make()
    except (ImportError, RuntimeError) as error:
        return error


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
    for height, width in ((375, 500), (1200, 1600)):
        rates = measure(height, width, routes)
        for name in ("ours", *PEERS):
            row: dict[str, Any] = {"image": f"{width} x {height}", "route": name}
            if name in rates:
                row["images/s/core"] = round(rates[name], 1)
                row["ours / it"] = round(rates["ours"] / rates[name], 2)
            else:
                row["images/s/core"] = missing[name]
            rows.append(row)
    write_result(
        "decode",
        rows,
        [
            f"{COUNT} JPEGs, quality 90, 4:2:0; random-resized crop (scale 0.08-1, ratio 3/4-4/3) "
            f"to {SIZE} x {SIZE} uint8; processor time, median of {REPEATS} turns.",
            "Targets at 500 x 375: at least 1.6 times Pillow, no slower than the best peer.",
        ],
    )


if __name__ == "__main__":
    main()
