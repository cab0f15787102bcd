"""What describes a run to its ranks, and where training stands: plain data that others pass on."""

import dataclasses
from typing import Any

from data_shards.streaming.sampler import Cursor
from pipeline.config import RunConfig
from pipeline.run.events import Metrics


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """Everything a rank needs, picklable and free of secrets.

    Attributes:
        config: the resolved configuration.
        run_url: folder of the run (checkpoints, artifacts, evaluations).
        shards_url: the shard set.
        context: facts that every artifact carries (run id, code version, shard digest).
        writer: number of the run's lease under which its checkpoints are written.
    """

    config: RunConfig
    run_url: str
    shards_url: str
    context: dict[str, Any]
    writer: int = 0


@dataclasses.dataclass
class TrainState:
    """Where training stands: steps done and the cursor of the next sample.

    Attributes:
        records: rank 0's newest ones, of two intervals between checkpoints; in checkpoints only.
    """

    step: int
    cursor: Cursor
    records: tuple[Metrics, ...] = ()
