"""The bounds of a certificate: every number that no sample enters (section 8.3)."""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from model.verifier.artifact import Weights
from model.verifier.errors import (
    DisagreementError,
    Near,
    UnusableError,
    Within,
    agree,
    take,
)
from model.verifier.families.base import Family
from model.verifier.families.registry import FAMILIES
from model.verifier.files import Body
from model.verifier.mathematics.matrix_bounds import MatrixBounds
from model.verifier.mathematics.rounding import ROUND_UP
from model.verifier.network_config import Config
from model.verifier.progress import Progress

SAME_CONDITION = 1e-5
"""It follows from a least eigenvalue, which two programs do not find alike."""
_Task = tuple[Config, str, Weights]


def bound_matrices(config: Config, weights: Weights, processes: int) -> dict[str, MatrixBounds]:
    """Bound all matrices of `layers`, one at a time in each process."""
    names = FAMILIES[config["kind"]].bounded(config)
    tasks = [(config, name, weights.alone(name)) for name in names]
    if processes < 2:
        return _counted(names, map(_bound, tasks))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return _counted(names, pool.map(_bound, tasks))


def _counted(names: Sequence[str], bounds: Iterable[MatrixBounds]) -> dict[str, MatrixBounds]:
    progress, found = Progress("matrices", len(names)), {}
    for name, bound in zip(names, bounds, strict=True):
        found[name] = bound
        progress.add()
    return found


def _bound(task: _Task) -> MatrixBounds:
    config, name, weights = task
    with np.errstate(all="ignore"):
        return FAMILIES[config["kind"]].bound_matrix(config, name, weights[name])


def check_bounds(network: Family, weights: Weights, body: Body) -> None:
    """Compare `layers`, `parts`, `network_bound`, `head` and `observed_lipschitz`.

    They are stated to be read; every radius is proved with the verifier's own.
    """
    stated = take(body, "layers", list, "certificate")
    agree(stated, list(_layers(network, weights)), "layers")
    same = network.same_bound
    parts = {name: Near(value, same) for name, value in network.parts().items()}
    agree(body["parts"], parts, "parts")
    agree(body["network_bound"], Near(network.bound, same), "network_bound")
    if reason := network.refuted():
        raise DisagreementError(reason)
    if not 0 < network.bound < float("inf"):
        raise UnusableError(f"the network bound {network.bound} certifies nothing")
    factor = float(network.head.factors.max())
    agree(body["head"], {"kind": network.head.rule, "largest_factor": Near(factor)}, "head")
    observed = take(body, "observed_lipschitz", float, "certificate")
    # It was computed in float64, and may be reached.
    if not 0 < observed <= network.bound * ROUND_UP:
        raise DisagreementError(f"observed_lipschitz {observed} is not in (0, {network.bound}]")


def _layers(network: Family, weights: Weights) -> Iterable[Body]:
    same = network.same_bound
    for name, bounds in network.matrices.items():
        numbers: Body = {key: Near(value, same) for key, value in bounds.stated().items()}
        if bounds.lower == 0:  # not derived: it only has to be one
            numbers["lower"] = Within(0.0, bounds.upper)
        if "condition" in numbers:
            numbers["condition"] = Near(numbers["condition"].value, SAME_CONDITION)
        rows, *columns = weights.shape(name)
        shape = [rows, math.prod(columns)]  # a filter is stated as the matrix that it is bounded as
        yield {"name": name, "shape": shape, "sha256": weights.sha256(name), **numbers}
