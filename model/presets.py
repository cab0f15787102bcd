"""Named networks."""

import dataclasses
import difflib
from collections.abc import Callable

from model.config import LipNeXtConfig, NetworkConfig
from model.errors import ModelError


def digits() -> LipNeXtConfig:
    """Handwritten digits of scikit-learn, 1x8x8."""
    return LipNeXtConfig(
        input_shape=(1, 8, 8), num_classes=10, patch=2, width=192, depth=4, alpha=1 / 8
    )


def synthetic() -> LipNeXtConfig:
    """Small network for generated images of CIFAR's size."""
    return LipNeXtConfig(input_shape=(3, 32, 32), num_classes=10, patch=4, width=64, depth=4)


def cifar10_l32w1024() -> LipNeXtConfig:
    """64M in the paper."""
    return LipNeXtConfig(input_shape=(3, 32, 32), num_classes=10, patch=2, width=1024, depth=32)


def cifar10_l32w2048() -> LipNeXtConfig:
    """256M in the paper."""
    return dataclasses.replace(cifar10_l32w1024(), width=2048)


def tiny_imagenet_l32w2048() -> LipNeXtConfig:
    """256M in the paper."""
    return dataclasses.replace(
        cifar10_l32w2048(), input_shape=(3, 64, 64), num_classes=200, patch=4
    )


def imagenet_l32w4096() -> LipNeXtConfig:
    """1B in the paper."""
    return LipNeXtConfig(
        input_shape=(3, 224, 224), num_classes=1000, patch=14, width=4096, depth=32
    )


def imagenet_2b() -> LipNeXtConfig:
    """2B in the paper; the depth is inferred from the size."""
    return dataclasses.replace(imagenet_l32w4096(), depth=64)


NETWORK_PRESETS: dict[str, Callable[[], NetworkConfig]] = {
    "digits": digits,
    "synthetic": synthetic,
    "cifar10-L32W1024": cifar10_l32w1024,
    "cifar10-L32W2048": cifar10_l32w2048,
    "tiny-imagenet-L32W2048": tiny_imagenet_l32w2048,
    "imagenet-L32W4096": imagenet_l32w4096,
    "imagenet-2B": imagenet_2b,
}


def network_preset(name: str) -> NetworkConfig:
    """Configuration of a named network.

    Raises:
        ModelError: there is no preset of that name.
    """
    if name not in NETWORK_PRESETS:
        near = difflib.get_close_matches(name, NETWORK_PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ModelError(f"no network preset {name!r}; {hint}known: {', '.join(NETWORK_PRESETS)}")
    return NETWORK_PRESETS[name]()
