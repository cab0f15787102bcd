"""The samples of a run: what the driver checks before it starts and what every rank streams."""

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from data_shards.format.shard_index import ShardIndex, load_index, named_classes
from data_shards.streaming.corruption_log import CorruptionLog
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream, require_crop
from data_shards.streaming.webdataset_stream import UnindexedStream
from model.networks.config import NetworkConfig
from pipeline.checkpoint.export import statistics
from pipeline.config import DataConfig, TrainConfig
from pipeline.errors import PipelineError
from pipeline.run.distributed import DistributedContext


@dataclasses.dataclass(frozen=True)
class Samples:
    """A set that fits a run.

    Attributes:
        url: the shard set.
        index: its index; None for a set that is read without one.
        per_epoch: samples of one epoch of the training split.
        data: which split is streamed, and how.
        network: fits the images; its shape and classes are those of the samples.
    """

    url: str
    index: ShardIndex | None
    per_epoch: int
    data: DataConfig
    network: NetworkConfig

    @property
    def name(self) -> str:
        """Name of the set."""
        return self.index.header.name if self.index else "unindexed"

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class; empty where the index has none, or there is no index."""
        return named_classes(self.index.header) if self.index else ()

    @property
    def digest(self) -> str:
        """Digest that covers every byte of the set; empty where nothing is known about it."""
        return self.index.digest if self.index else ""

    def calibration(self, train: TrainConfig) -> Iterator[Tensor]:
        """Batches of the first training samples of the run, uint8 (B, C, H, W).

        The same for every number of ranks.
        """
        if self.index is None:
            raise PipelineError("a set without an index has no first samples")
        batch = train.global_batch
        samples = min(train.calibration_samples, self.per_epoch)
        with SampleStream(
            self.index,
            self.data.stream,
            split=self.data.train_split,
            global_batch=batch,
            cursor=Cursor(seed=train.seed),
        ) as stream:
            # Whole batches that training itself begins with, read as by one rank: so the means do
            # not depend on the number of ranks.
            for _ in range(max(1, samples // batch)):
                yield next(stream).images

    def stream(
        self,
        train: TrainConfig,
        world: DistributedContext,
        cursor: Cursor,
        corruption_log: CorruptionLog,
    ) -> SampleStream | UnindexedStream:
        """Open the training batches of one rank.

        Raises:
            ShardError: the set cannot be streamed as asked.
        """
        if self.index is None:
            # Stock WebDataset draws samples on its own: no corruption log, no exact order.
            return UnindexedStream(
                self.url,
                self.data.stream,
                image_shape=self.network.input_shape,
                num_classes=self.network.num_classes,
                samples_per_epoch=self.per_epoch,
                global_batch=train.global_batch,
                rank=world.rank,
                world_size=world.size,
                cursor=cursor,
            )
        return SampleStream(
            self.index,
            self.data.stream,
            split=self.data.train_split,
            global_batch=train.global_batch,
            rank=world.rank,
            world_size=world.size,
            cursor=cursor,
            corruption_log=corruption_log,
            # Systems of different speed are compared by how they learn, not by how images decode.
            decode_first=train.processor_seconds > 0,
        )


def open_samples(url: str, data: DataConfig, network: NetworkConfig, *, certify: bool) -> Samples:
    """Load the index of a shard set and check that network and options fit it.

    Args:
        url: the shard set.
        data: splits, and how they are read.
        network: what is trained on them.
        certify: whether its checkpoints are certified, on the test split.

    Raises:
        PipelineError, ShardError: they do not fit.
    """
    if data.unindexed_samples:
        if certify:
            raise PipelineError(
                "data.unindexed_samples: a set without an index is never certified; give "
                "--checkpoint.no-evaluate"
            )
        if statistics(network):
            raise PipelineError(
                f"data.unindexed_samples: a {network.kind} network takes the means of its "
                "layers from the first training samples; a set without an index has none"
            )
        return Samples(url, None, data.unindexed_samples, data, network)
    index = load_index(url)
    index.require(network.input_shape, network.num_classes)
    samples = len(index.select(data.train_split))
    # The driver calls this first: there a refusal costs seconds, in a rank a start of the ranks.
    require_crop(index, data.stream, data.train_split)
    for split in {data.selection_split, data.test_split} - {None} if certify else ():
        if index.stored_shape(str(split)) is None:
            raise PipelineError(
                f"split {split}: shard set {index.store} holds images of different shapes "
                "there; only the test split is stored at network size, so that no checkpoint "
                "can be certified on another: data.test_split=test, data.train_split=train"
            )
    return Samples(url, index, samples, data, network)
