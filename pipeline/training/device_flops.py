"""What a device can do at most: FLOPs per second of products, by data sheet or by measurement."""

import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of the working weights by `train.precision`."""

_PEAK_TFLOPS = {  # dense, from NVIDIA's data sheets: (part of the name, 16 bit, fp32)
    "B200": (2250.0, 75.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "V100": (125.0, 15.7),
}


_WITHOUT_BF16 = ("V100",)
"""Their tensor cores know fp16 alone; bf16 is emulated, slower than fp32."""

_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LONG_S = 4e-3


def peak_flops(device: str, precision: str) -> float | None:
    """FLOPs per second of one device in the type of the working weights; None: not known.

    Args:
        device: name of the device.
        precision: `fp32` (without TF32), `bf16` or `fp16`.
    """
    for name, (half, single) in _PEAK_TFLOPS.items():
        if name in device:
            return (
                (single if precision == "fp32" else half) * 1e12 if has(name, precision) else None
            )
    return None


def has(device: str, precision: str) -> bool:
    """Whether a device computes products in a precision, rather than emulating it."""
    return precision != "bf16" or not any(name in device for name in _WITHOUT_BF16)


def measured_flops(device: torch.device, precision: str) -> float:
    """FLOPs per second that this rank reaches in square products, in at most some 0.2 s.

    For devices without a data sheet. The size is doubled until a product takes a few milliseconds.

    Args:
        device: where, with the threads that this process has.
        precision: as in `peak_flops`.
    """
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for size in _SIZES:
        shape = (2, size, size)
        left, right = torch.rand(shape, generator=generator, device=device).to(DTYPES[precision])
        torch.mm(left.mT, right)  # the first one of a size chooses and loads its kernel
        # The least of three: other load can only add to a time.
        seconds = min(product_seconds(left, right) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LONG_S:
            break
    return best


def product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """Wall time of one product left^T right, the form of a weight's gradient.

    Of the three forms in a pass it is the one in which emulated bf16 is not hopelessly slow.
    """
    cuda = left.device.type == "cuda"
    if cuda:
        # Kernels are queued: without both waits the time would be that of the queueing.
        torch.cuda.synchronize(left.device)
    begin = time.perf_counter()
    torch.mm(left.mT, right)
    if cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - begin
