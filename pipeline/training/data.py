"""The samples of a run: what the driver checks before it starts and what every rank streams."""

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from data_shards.format.index import ShardIndex, load_index
from data_shards.streaming.corruption_log import CorruptionLog
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream, require_crop
from data_shards.streaming.webdataset_stream import UnindexedStream
from pipeline.checkpoint.export import statistics
from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext


@dataclasses.dataclass(frozen=True)
class Samples:
    """A set that fits a run.

    Attributes:
        url: the shard set.
        index: its index; None for a set that is read without one.
        per_epoch: samples of one epoch of the training split.
    """

    url: str
    index: ShardIndex | None
    per_epoch: int

    @property
    def name(self) -> str:
        """Name of the set."""
        return self.index.header.name if self.index else "unindexed"

    @property
    def digest(self) -> str:
        """Digest that covers every byte of the set; empty where nothing is known about it."""
        return self.index.digest if self.index else ""

    def calibration(self, config: RunConfig) -> Iterator[Tensor]:
        """Batches of the first training samples of the run, uint8 (B, C, H, W).

        The same for every number of ranks.
        """
        if self.index is None:
            raise PipelineError("a set without an index has no first samples")
        batch = config.train.global_batch
        samples = min(config.train.calibration_samples, self.per_epoch)
        with SampleStream(
            self.index,
            config.data.stream,
            split=config.data.train_split,
            global_batch=batch,
            cursor=Cursor(seed=config.train.seed),
        ) as stream:
            for _ in range(max(1, samples // batch)):
                yield next(stream).images

    def stream(
        self,
        config: RunConfig,
        world: DistributedContext,
        cursor: Cursor,
        corruption_log: CorruptionLog,
    ) -> SampleStream | UnindexedStream:
        """Open the training batches of one rank.

        Raises:
            ShardError: the set cannot be streamed as asked.
        """
        if self.index is None:
            return UnindexedStream(
                self.url,
                config.data.stream,
                image_shape=config.model.input_shape,
                num_classes=config.model.num_classes,
                samples_per_epoch=self.per_epoch,
                global_batch=config.train.global_batch,
                rank=world.rank,
                world_size=world.size,
                cursor=cursor,
            )
        return SampleStream(
            self.index,
            config.data.stream,
            split=config.data.train_split,
            global_batch=config.train.global_batch,
            rank=world.rank,
            world_size=world.size,
            cursor=cursor,
            corruption_log=corruption_log,
        )


def open_samples(config: RunConfig, url: str) -> Samples:
    """Load the index of the run's shard set and check that network and options fit it.

    Raises:
        PipelineError, ShardError: they do not.
    """
    if config.data.unindexed_samples:
        if config.checkpoint.evaluate:
            raise PipelineError(
                "data.unindexed_samples: a set without an index is never certified; give "
                "--checkpoint.no-evaluate"
            )
        if statistics(config.model):
            raise PipelineError(
                f"data.unindexed_samples: a {config.model.kind} network takes the means of its "
                "layers from the first training samples; a set without an index has none"
            )
        return Samples(url, None, config.data.unindexed_samples)
    index = load_index(url)
    index.require(config.model.input_shape, config.model.num_classes)
    samples = len(index.select(config.data.train_split))
    require_crop(index, config.data.stream, config.data.train_split)
    if config.checkpoint.evaluate:
        for split in {config.data.selection_split, config.data.test_split} - {None}:
            if index.stored_shape(str(split)) is None:
                raise PipelineError(
                    f"split {split}: shard set {index.store} holds images of different shapes "
                    "there; only the test split is stored at network size, so that no checkpoint "
                    "can be certified on another: data.test_split=test, data.train_split=train"
                )
    return Samples(url, index, samples)
