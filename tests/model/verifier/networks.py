"""Small networks of all families, with weights that no training would leave behind."""

import random
from typing import Any

import torch
from pydantic import TypeAdapter

from model.networks.base import CertifiedNetwork
from model.networks.config import NetworkConfig
from model.networks.registry import build_network, family

REGIMES = (
    *("initial", "random", "1e-25", "1e-3", "1e3", "1e15", "rank one", "repeated", "zeros"),
    *("zero row", "one big", "spread", "ones"),
)


def parsed(**settings: Any) -> NetworkConfig:
    config: Any = family(settings["kind"]).config
    return TypeAdapter(config).validate_python(settings)


def lipnext(pick: random.Random) -> dict[str, Any]:
    patch, channels = pick.choice([1, 2]), pick.choice([1, 3])
    return {
        "input_shape": [channels, patch * pick.randint(1, 4), patch * pick.randint(1, 5)],
        "patch": patch,
        "width": pick.randint(channels * patch**2 + 4, 24),
        "depth": pick.randint(1, 4),
        "alpha": 0.2,
        "beta": pick.choice([0.0, 0.3, 1.0]),
        "position": pick.random() < 0.5,
        "head": pick.choice(["unit", "linear"]),
        "pool_tau": pick.choice([1e-6, 1e-2]),
    }


def sll(pick: random.Random) -> dict[str, Any]:
    pool, channels = pick.choice([1, 2, 3]), pick.choice([1, 2])
    return {
        "input_shape": [channels, pool * pick.randint(1, 4), pool * pick.randint(1, 3)],
        "scaling": pick.choice(["sll", "cpl"]),
        "channels": channels + pick.randint(0, 2),
        "conv_layers": pick.randint(0, 2),
        "conv_inner": pick.randint(1, 6),
        "pool": pool,
        "dense_layers": pick.randint(1, 2),
        "dense_inner": pick.randint(1, 20),
        "head": pick.choice(["unit", "linear"]),
    }


def aol(pick: random.Random) -> dict[str, Any]:
    patch, kept = pick.choice([2, 3]), pick.choice([2, 4])
    return {
        "input_shape": [pick.choice([1, 3]), 3 * patch, 2 * patch],
        "patch": patch,
        "channels": pick.choice([4, 8]),
        "conv_layers": pick.randint(0, 2),
        "kept_channels": kept,
        "dense_layers": pick.randint(1, 2),
    }


def soc(pick: random.Random) -> dict[str, Any]:
    stages = pick.choice([1, 2])
    return {
        "input_shape": [pick.choice([1, 3]), 4 * pick.randint(1, 2), 4],
        "depth": stages * pick.randint(1, 2),
        "stages": stages,
        "width": 4,
        "activation": pick.choice(["maxmin", "householder"]),
        "pooling": pick.choice(["max", "projection"]),
        "pointwise": pick.choice(["series", "manifold"]),
        "terms": pick.choice([2, 5, 15]),
        "head": pick.choice(["unit", "mlp"]),
        "hidden": pick.randint(1, 12),
    }


def liresnet(pick: random.Random) -> dict[str, Any]:
    return {
        "input_shape": [pick.choice([1, 2]), pick.randint(6, 9), pick.randint(6, 9)],
        "stem_kernel": pick.randint(2, 5),
        "stem_stride": pick.randint(1, 3),
        "stem_padding": pick.randint(0, 3),
        "width": pick.choice([4, 6]),
        "depth": pick.randint(1, 2),
        "neck_patch": 1,
        "dense_width": 4,
        "dense_layers": pick.randint(0, 2),
    }


def bronet(pick: random.Random) -> dict[str, Any]:
    return {
        **liresnet(pick),
        "rank": pick.randint(1, 3),
        "linear_depth": pick.randint(0, 1),
        "grow": pick.random() < 0.3,
        "neck": pick.choice(["cholesky", "reflection", "pool"]),
        "dense_rank": pick.randint(0, 3),
    }


def sortnet(pick: random.Random) -> dict[str, Any]:
    hidden = pick.choice([0, 0, 7])
    return {
        "input_shape": [pick.choice([1, 2]), 6, 6],
        "width": pick.randint(1, 12),
        "depth": pick.randint(2, 3),
        "keep": pick.choice([0.3, 0.7, 1.0]),
        "top": pick.randint(1, 10),
        "input_scale": pick.choice([1.0, 3.0, 0.25]),
        "hidden": hidden,
        "window": pick.choice([0, 2, 4]) if hidden else 0,
        "window_stride": 2,
    }


def groupsort(pick: random.Random) -> dict[str, Any]:
    size = pick.choice([2, 3])
    return {
        "input_shape": [1, pick.randint(2, 5), pick.randint(2, 5)],
        "width": size * pick.randint(1, 5),
        "depth": pick.randint(2, 4),
        "sorted_channels": size,
    }


FAMILIES = {
    "lipnext": lipnext, "sll": sll, "aol": aol, "soc": soc, "liresnet": liresnet,
    "bronet": bronet, "sortnet": sortnet, "groupsort": groupsort,
}  # fmt: skip


def draw(seed: int) -> tuple[NetworkConfig, CertifiedNetwork, str]:
    """A network of some family and how its weights were made; the same for the same seed.

    Raises:
        ModelError, ValueError: such a network cannot be built.
        RuntimeError: what is computed at export fails.
    """
    pick = random.Random(seed)
    kind = list(FAMILIES)[seed % len(FAMILIES)]
    settings = {"kind": kind, "num_classes": pick.choice([2, 3, 5, 12, 70]), **FAMILIES[kind](pick)}
    if kind == "aol":
        settings["num_classes"] = pick.choice([2, 3, 6])
    config = parsed(**settings)
    regime = pick.choice(REGIMES)
    network = build_network(config).float().eval()
    network.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            change(parameter, name, regime, generator)
    network.calibrate([torch.rand(4, *config.input_shape, generator=generator)])
    return config, network.eval().requires_grad_(False), regime


def change(p: torch.Tensor, name: str, regime: str, generator: torch.Generator) -> None:
    r = torch.randn(p.shape, generator=generator)
    if regime == "initial":
        if p.ndim == 1:
            p.add_(0.3 * r)
        return
    if regime == "ones":
        p.fill_(1.0)
        return
    if regime == "zeros" and p.ndim > 1 and "head" not in name:
        p.zero_()
        return
    p.copy_(r * float(regime) if regime[0] == "1" else r)
    if regime == "rank one":
        rows = torch.randn(p.shape[0] if p.ndim else 1, 1, generator=generator)
        columns = torch.randn(1, max(1, p.numel() // len(rows)), generator=generator)
        p.copy_((rows @ columns).view(p.shape))
    elif regime == "repeated" and p.ndim > 1 and len(p) > 1:
        p[1] = p[0]
    elif regime == "zero row" and p.ndim > 1:
        p[0] = 0
    elif regime == "one big":
        p.mul_(1e-2).view(-1)[int(torch.randint(p.numel(), (1,), generator=generator))] = 1e2
    elif regime == "spread":
        p.mul_(torch.exp(3 * torch.randn(p.shape, generator=generator)))
