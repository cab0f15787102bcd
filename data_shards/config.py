"""Options of the sample stream."""

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class StreamConfig:
    """How samples are ordered, read ahead and augmented."""

    lanes: int = Field(default=128, ge=1)
    """Places of the shard sequence that are read in turn; a batch draws from about as many shards.
    A set of at most lanes * window samples, or one that is cached whole when a run begins, is
    shuffled uniformly instead."""
    window: int = Field(default=128, ge=1)
    """Shuffle window in samples per lane: no sample moves this far or farther."""
    read_ahead_bytes: int = Field(default=256 * MIB, ge=1)
    """Bound on encoded and decoded bytes held ahead of the consumer, per rank."""
    workers: int = Field(default=0, ge=0, le=256)
    """Threads that decode and augment; 0 = the thread that assembles batches. The samples are the
    same for every number."""
    cache_bytes: int = Field(default=64 * MIB, ge=0)
    """A split whose decoded images fit in this is decoded once and kept in memory; 0 = never."""
    disk_cache: str = ""
    """Local directory for blocks of remote shards, shared by the ranks of a node; "" = none."""
    disk_cache_bytes: int = Field(default=16 * GIB, ge=1)
    """Bound on the disk cache; the least recently used blocks go first."""
    damage_fraction: float = Field(default=0.001, ge=0.0, le=1.0)
    """Share of the samples seen that may be damaged before the run stops."""
    damage_allowance: int = Field(default=10, ge=0)
    """Damaged samples allowed on top of the share, so that an early one does not stop a run."""
    crop: Literal["none", "random-resized"] = "none"
    """Augmentation: cut a random part of each image and scale it to the set's image shape; needed
    where the train images differ in shape."""
    randaugment: float = Field(default=0.0, ge=0.0, le=1.0)
    """Augmentation: share of the images that RandAugment changes; 0: none."""
    shift_pixels: int = Field(default=0, ge=0)
    """Augmentation: translate by up to this many pixels in each direction, zeros move in; 0: not at
    all."""
    flip: bool = False
    """Augmentation: mirror half of the images left to right."""

    def without_effect(self) -> dict[str, str]:
        """Options that the others leave without effect: name -> the setting that does so."""
        found = {}
        if not self.disk_cache:
            found["disk_cache_bytes"] = "an empty disk_cache"
        if self.crop != "none":  # images of any size are decoded anew in every epoch
            found["cache_bytes"] = f"crop={self.crop}"
        return found


INDEXED_ONLY = ("lanes", "window", "cache_bytes", "disk_cache", "disk_cache_bytes")
"""Options that only a set with an index can follow: stock WebDataset streams the others."""

SAME_SAMPLES = ("read_ahead_bytes", "workers", "cache_bytes", "disk_cache", "disk_cache_bytes")
"""Options that change how samples are read: free when a run is resumed, whose cursor states the
order it began with. Whether a set is cached whole decides that order where a run begins."""
