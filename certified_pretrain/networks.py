"""Networks by family, with their initial weights set: plain `torch.nn.Module`s.

A network takes floating point images (B, C, H, W) with pixels in [0, 1] and returns logits (B, K).
"""

from typing import Any

from pydantic import ValidationError

from model.errors import ModelError
from model.networks.base import CertifiedNetwork
from model.networks.registry import FAMILIES, build_network, family

KINDS = tuple(FAMILIES)
"""Names of the families."""


def build(
    kind: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    seed: int = 0,
    **settings: Any,
) -> CertifiedNetwork:
    """A network of any family.

    Args:
        kind: one of `KINDS`.
        input_shape: (C, H, W) of the images.
        num_classes: classes.
        seed: of the initial weights.
        settings: further fields of the configuration of the family (`model/networks/`).

    Raises:
        ModelError: no such family, a setting that it does not have, or some that do not go
            together.
    """
    try:
        config = family(kind).config(
            kind=kind, input_shape=input_shape, num_classes=num_classes, **settings
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        raise ModelError(f"{kind}: {place}{reason}") from None
    network = build_network(config)
    network.initialise(seed)
    return network


def lipnext(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    patch: int,
    width: int = 128,
    depth: int = 4,
    seed: int = 0,
    **settings: Any,
) -> CertifiedNetwork:
    """A LipNeXt (arXiv 2601.18513), 1-Lipschitz in l2.

    Args:
        input_shape: (C, H, W) of the images.
        num_classes: classes.
        patch: side of the square patches; divides H and W, and C * patch^2 is at most the width.
        width: channels of every block.
        depth: blocks, of two orthogonal matrices (width, width) each.
        seed: of the initial weights.
        settings: further fields of `model.networks.lipnext.config.LipNeXtConfig`.

    Raises:
        ModelError: as `build`; of a patch that does not fit, with those that do.
    """
    settings |= {"patch": patch, "width": width, "depth": depth}
    return build("lipnext", input_shape, num_classes, seed=seed, **settings)
