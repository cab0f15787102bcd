"""From the ranks' partitions to one model artefact, one parameter at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from data_shards.errors import ShardError
from data_shards.store import Store
from model.artifact import ArtifactInfo, write_artifact
from model.build import build_network
from model.config import NetworkConfig
from model.errors import ModelError
from pipeline.checkpoint import Partitioned
from pipeline.ranks import World


def export_artifact(
    folder: Store,
    *,
    world: World,
    engine: Partitioned,
    network: NetworkConfig,
    context: Mapping[str, Any],
    calibration: Callable[[], Iterable[Tensor]],
) -> ArtifactInfo | None:
    """Write the averaged, float64-projected fp32 weights; training state is not touched.

    Rank 0 takes the stored means of centred layers, where a network has such, from the batches of
    `calibration`: uint8 images (B, C, H, W).

    Ranks: all call it together; returns the description on rank 0, None elsewhere.

    Raises:
        PipelineError: rank 0 could not write, or a weight is not finite; raised on every rank.
    """
    exported = engine.optimizer.export()
    info, error = None, None
    if world.rank == 0:
        try:
            info = write_artifact(
                folder.open,
                network_config=network,
                tensors=_stored(exported, network, calibration),
                order=[s.name for p in engine.optimizer.partitions for s in p.slots]
                + statistics(network),
                context=context,
            )
        except (OSError, ModelError, ShardError) as failure:
            error = f"cannot write the artefact {folder.url}: {failure}"
    # Every rank has to exhaust the iterator: its steps are collective.
    for _ in exported:
        pass
    world.agree(error)
    return info


def statistics(config: NetworkConfig) -> list[str]:
    """Names of the stored means that `config` describes; most networks have none."""
    with torch.device("meta"):
        return [name for name, _ in build_network(config).named_buffers()]


def _stored(
    exported: Iterable[tuple[str, Tensor | None]],
    config: NetworkConfig,
    calibration: Callable[[], Iterable[Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """The exported parameters, then the means that a network with these parameters has."""
    whole = ((name, value) for name, value in exported if value is not None)
    if not statistics(config):
        yield from whole
        return
    network = build_network(config).float().eval()
    with torch.no_grad():
        for name, value in whole:
            network.get_parameter(name).copy_(value)
            yield name, value
        network.calibrate(images / 255 for images in calibration())
    yield from network.named_buffers()
