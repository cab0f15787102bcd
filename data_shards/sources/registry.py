"""Where images come from: official archives, folders, scikit-learn's digits, a procedural set.

A new source is one file with a function that returns a `Source`, and one line of `SOURCES`.
"""

import inspect
from collections.abc import Callable

from data_shards.sources.base import Source
from data_shards.sources.cifar import cifar10, cifar100
from data_shards.sources.digits import digits
from data_shards.sources.imagefolder import imagefolder_set
from data_shards.sources.imagenet import imagenet_set
from data_shards.sources.mnist import fashion_mnist, mnist
from data_shards.sources.synthetic import synthetic
from data_shards.sources.tiny_imagenet import tiny_imagenet

SOURCES: dict[str, Callable[..., Source]] = {
    "imagenet": imagenet_set,
    "imagefolder": imagefolder_set,
    "tiny-imagenet": tiny_imagenet,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "digits": digits,
    "synthetic": synthetic,
}
"""By subcommand of `data_shards.write`, whose flags are the function's parameters."""


def generated_sources() -> list[str]:
    """Names of the sources that can be made without a word: all parameters have defaults."""
    return [
        name
        for name, make in SOURCES.items()
        if all(p.default is not p.empty for p in inspect.signature(make).parameters.values())
    ]
