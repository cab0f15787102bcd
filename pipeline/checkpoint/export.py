"""From the ranks' partitions to one model artifact."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data_shards.storage.store import Store
from model.artifact.artifact import ArtifactInfo, write_artifact
from model.networks.config import NetworkConfig
from model.networks.registry import build_network
from pipeline.checkpoint.writer import Partitioned
from pipeline.run.distributed import DistributedContext


@dataclasses.dataclass(frozen=True)
class Export:
    """The weights of an artifact on the host of rank 0."""

    network: NetworkConfig
    """What they are the weights of."""
    weights: dict[str, Tensor]
    """Whole float32 parameters by name."""


def take_export(
    engine: Partitioned, *, world: DistributedContext, network: NetworkConfig
) -> Export | None:
    """The averaged, float64-projected fp32 weights; training state is not touched.

    Ranks: all call it together; returns the weights on rank 0, None elsewhere.

    Raises:
        OptimizerError: a matrix cannot be projected; raised on every rank.
        PipelineError: a weight is not finite; raised on every rank.
    """
    # Copied to the host one by one: the device never holds a second network.
    weights = {
        name: whole.detach().to("cpu", copy=True)
        for name, whole in engine.optimizer.export()
        if whole is not None
    }
    # Only rank 0 has the weights; `agree` makes its finding an error of all.
    bad = [name for name, whole in weights.items() if not bool(whole.isfinite().all())]
    world.agree(f"tensor {bad[0]} holds values that are not finite" if bad else None)
    return Export(network, weights) if world.rank == 0 else None


def write_export(
    folder: Store,
    export: Export,
    *,
    context: Mapping[str, Any],
    class_names: Sequence[str] = (),
    calibration: Callable[[], Iterable[Tensor]],
) -> ArtifactInfo:
    """Write an artifact. Networks with centred layers get their stored means first.

    Args:
        folder: the artifact.
        export: its weights.
        context: facts about its origin.
        class_names: one per class, or none.
        calibration: batches of training images, uint8 (B, C, H, W).

    Raises:
        OSError: the store refused.
        ShardError: the images cannot be read.
    """
    means = statistics(export.network)
    return write_artifact(
        folder.open,
        network_config=export.network,
        tensors=_with_means(export, calibration) if means else export.weights.items(),
        order=[*export.weights, *means],
        context=context,
        class_names=class_names,
    )


def statistics(config: NetworkConfig) -> list[str]:
    """Names of the stored means that `config` describes; most networks have none."""
    with torch.device("meta"):
        return [name for name, _ in build_network(config).named_buffers()]


@torch.no_grad()
def _with_means(
    export: Export, calibration: Callable[[], Iterable[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters, then the means that a network with these parameters has."""
    # On the host and in float32: training goes on meanwhile on the device.
    network = build_network(export.network).float().eval()
    for name, value in export.weights.items():
        network.get_parameter(name).copy_(value)
    network.calibrate(images / 255 for images in calibration())
    yield from export.weights.items()
    yield from network.named_buffers()
