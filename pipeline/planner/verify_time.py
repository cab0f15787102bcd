"""How long `model.verify` takes for the certificate of a run: operations at stated rates."""

import dataclasses

from pydantic import TypeAdapter

from model.networks.config import NetworkConfig
from model.verifier.artifact import KEPT
from model.verifier.operation_counts import Pass, Work, bounds_work, image_work, stored_bytes
from model.verifier.samples import FLOATS_AT_ONCE

GFLOPS = 20.0
"""10^9 operations of float64 per second and process: one core of a server, assumed."""
HASHED = 5e8
"""Bytes per second that are read and hashed, assumed."""
_BATCH = 8
"""Arrays of one layer's activations that are alive together."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """A verification.

    Attributes:
        steps: what no image enters, matrix by matrix.
        gflops: 10^9 operations per second of a process.
        processes: which share the matrices.
        images: of the test split.
        one: the forward pass of one image.
        weights: bytes.
    """

    steps: tuple[Work, ...]
    gflops: float
    processes: int
    images: int
    one: Pass
    weights: int

    def seconds(self, operations: float) -> float:
        """Of one process."""
        return operations / (1e9 * self.gflops)

    @property
    def reading_s(self) -> float:
        """Seconds to read and hash all weights once."""
        return self.weights / HASHED

    @property
    def bounds_s(self) -> float:
        """Seconds until all bounds are there: each matrix goes to the process that is free."""
        busy = [0.0] * self.processes
        for step in (step for step in self.steps if step.side_by_side):
            busy.sort()
            busy[0] += self.seconds(step.operations)
        alone = sum(step.operations for step in self.steps if not step.side_by_side)
        return max(busy) + self.seconds(alone) + self.reading_s

    @property
    def image_s(self) -> float:
        """Seconds of one image; weights beyond `KEPT` bytes are read again for every batch."""
        again = self.weights > KEPT
        batch = max(1.0, FLOATS_AT_ONCE // (self.one.places * self.one.widest**0.5))
        return self.seconds(self.one.operations) + again * self.reading_s / batch

    @property
    def total_s(self) -> float:
        """Seconds with all images of the test split."""
        return self.bounds_s + self.images * self.image_s

    @property
    def peak(self) -> int:
        """Bytes of all processes together."""
        widest = sorted(step.values for step in self.steps if step.side_by_side)
        matrices = sum(widest[-self.processes :])
        alone = max((step.values for step in self.steps if not step.side_by_side), default=0.0)
        images = 2 * self.one.widest + _BATCH * FLOATS_AT_ONCE
        kept = self.weights if self.weights <= KEPT else 0
        return int(8 * max(matrices, alone, images)) + kept


def verification(
    network: NetworkConfig, *, images: int, gflops: float = GFLOPS, processes: int = 1
) -> Verification:
    """What verifying a certificate of such a network takes.

    Args:
        network: its configuration.
        images: of the certified split.
        gflops: 10^9 operations of float64 per second of a process.
        processes: `--processes` of the verifier.
    """
    stored = TypeAdapter(type(network)).dump_python(network, mode="json")
    return Verification(
        steps=tuple(bounds_work(stored)),
        gflops=gflops,
        processes=processes,
        images=images,
        one=image_work(stored),
        weights=stored_bytes(stored),
    )
