"""Where images come from: official archives, folders, scikit-learn's digits, a procedural set."""

from data_shards.sources.base import Source
from data_shards.sources.cifar import cifar10, cifar100
from data_shards.sources.digits import digits
from data_shards.sources.imagefolder import imagefolder
from data_shards.sources.imagenet import imagenet
from data_shards.sources.mnist import mnist
from data_shards.sources.synthetic import synthetic
from data_shards.sources.tiny_imagenet import tiny_imagenet

__all__ = [
    "Source",
    "cifar10",
    "cifar100",
    "digits",
    "imagefolder",
    "imagenet",
    "mnist",
    "synthetic",
    "tiny_imagenet",
]
