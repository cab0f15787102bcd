"""From the ranks' partitions to one model artefact, one parameter at a time."""

from collections.abc import Mapping
from typing import Any

from data_shards.store import Store
from model.artifact import ArtifactInfo, write_artifact
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
) -> ArtifactInfo | None:
    """Write the averaged, float64-projected fp32 weights; training state is not touched.

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
                tensors=((name, whole) for name, whole in exported if whole is not None),
                order=[s.name for p in engine.optimizer.partitions for s in p.slots],
                context=context,
            )
        except (OSError, ModelError) as failure:
            error = f"cannot write the artefact {folder.url}: {failure}"
    # Every rank has to exhaust the iterator: its steps are collective.
    for _ in exported:
        pass
    world.agree(error)
    return info
