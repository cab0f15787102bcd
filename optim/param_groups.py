"""Parameter groups: the matrices of each manifold, and the Euclidean rest."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from optim.config import OptimConfig
from optim.errors import OptimizerError
from optim.manifolds import Manifold, ask_trivialized, manifold_of


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], config: OptimConfig
) -> list[dict[str, Any]]:
    """Split parameters by their declared manifold, and ask for their gradients in one form.

    Args:
        named_parameters: As from `module.named_parameters()`, also under DeepSpeed's zero.Init.
        config: Learning rates, and the form of the gradients of manifold matrices.

    Returns:
        One group per manifold, then one Euclidean group if any such parameter exists. Keys:
        `params`, `names`, `lr`, `manifold` (None in the Euclidean group).

    Raises:
        OptimizerError: A declared parameter is no square matrix.
    """
    split: dict[Manifold | None, list[tuple[str, Tensor]]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        manifold = manifold_of(parameter)
        if manifold is not None:
            try:
                manifold.check_shape(tuple(getattr(parameter, "ds_shape", parameter.shape)))
            except OptimizerError as error:
                raise OptimizerError(f"parameter {name!r}: {error}") from error
            ask_trivialized(parameter, config.gradient == "trivialized")
        split.setdefault(manifold, []).append((name, parameter))
    ordered = sorted(split, key=lambda manifold: manifold is None)
    return [
        {
            "params": [parameter for _, parameter in split[manifold]],
            "names": [name for name, _ in split[manifold]],
            "lr": config.lr * (config.euclidean_lr_factor if manifold is None else 1.0),
            "manifold": manifold,
        }
        for manifold in ordered
    ]
