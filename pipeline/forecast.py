"""Time and cost of a run on a device that is not there: a model with stated assumptions.

A step is the passes of its micro-batches, beside which ZeRO-3's collectives and the data stream
run, followed by the manifold step, beside which nothing runs:

    step = max(passes, ZeRO-3 traffic, data) + manifold products + manifold traffic + latencies
"""

import dataclasses

from pipeline.budget import Traffic
from pipeline.errors import PipelineError
from pipeline.flops import peak_flops

MANIFOLD_PRODUCTS = 4.0
"""Products of C x C matrices per matrix and step (docs/log.md, the manifold step)."""
EFFICIENCY = 0.4
"""Share of a device's peak that products reach in practice; published runs of this size have 0.29
to 0.5."""
LATENCY_S = 30e-6
"""Start of one collective, which nothing hides in the manifold step."""
DECODE_RATE = 800.0
"""Images per second that one CPU core decodes and crops to 224 x 224; smaller ones are faster."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a step is computed on.

    Attributes:
        name: as its maker calls it.
        memory_gb: 10^9 bytes of memory.
        working_flops: FLOP/s of products in the type of the working weights.
        single_flops: FLOP/s of products in fp32.
        link_gbps: 10^9 bits per second that a device can send to the others.
    """

    name: str
    memory_gb: float
    working_flops: float
    single_flops: float
    link_gbps: float


_MEMORY_GB = {"B200": 180, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "V100": 32}
_INSIDE_GBPS = {"B200": 7200, "H200": 3600, "H100": 3600, "A100": 2400, "L40S": 256, "V100": 1200}
"""Of one direction, between the devices of a node, from NVIDIA's data sheets."""
NETWORK_GBPS = 400
"""One network port for each device."""
DEVICES = tuple(_MEMORY_GB)


def device_of(
    name: str,
    *,
    precision: str,
    nodes: int,
    tflops: float = 0.0,
    memory_gb: float = 0.0,
    link_gbps: float = 0.0,
) -> Device:
    """A device by name; values other than 0 replace those of its data sheet.

    Args:
        name: one of DEVICES, or any other if all values are given.
        precision: of the working weights.
        nodes: more than one communicate over the network.
        tflops: 10^12 FLOP/s in that precision.
        memory_gb: 10^9 bytes.
        link_gbps: 10^9 bits per second.

    Raises:
        PipelineError: the device is not known and a value is missing.
    """
    working, single = peak_flops(name, precision), peak_flops(name, "fp32")
    inside = _INSIDE_GBPS.get(name, 0)
    device = Device(
        name=name,
        memory_gb=memory_gb or _MEMORY_GB.get(name, 0),
        working_flops=tflops * 1e12 or working or 0.0,
        single_flops=single or tflops * 1e12 / (1 if precision == "fp32" else 16),
        link_gbps=link_gbps or (min(NETWORK_GBPS, inside or NETWORK_GBPS) if nodes > 1 else inside),
    )
    for value, option in (
        (device.working_flops, "--tflops"),
        (device.memory_gb, "--memory-gb"),
        (device.link_gbps, "--link-gbps"),
    ):
        if not value > 0:
            raise PipelineError(
                f"--device {name}: not one of {', '.join(DEVICES)}; give {option} as well"
            )
    return device


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        passes: products of the forward and backward passes, recomputation included.
        zero3: collectives of ZeRO-3, beside the passes.
        data: decoding, beside the passes.
        manifold_products: of the rank that owns most matrices.
        manifold_traffic: all-to-alls of the manifold step.
        latency: starts of the collectives of the manifold step.
    """

    passes: float
    zero3: float
    data: float
    manifold_products: float
    manifold_traffic: float
    latency: float

    @property
    def manifold(self) -> float:
        """What follows the passes."""
        return self.manifold_products + self.manifold_traffic + self.latency

    @property
    def total(self) -> float:
        """See the module."""
        return max(self.passes, self.zero3, self.data) + self.manifold

    @property
    def bound(self) -> str:
        """What the passes wait for, or `compute`."""
        slowest = max(self.passes, self.zero3, self.data)
        if slowest == self.passes:
            return "compute" if self.manifold < self.passes else "manifold step"
        return "ZeRO-3 traffic" if slowest == self.zero3 else "data"


def step_time(
    device: Device,
    *,
    pass_flops: float,
    manifold_flops: float,
    sent: Traffic,
    rank_images: int,
    decode_rate: float,
    efficiency: float = EFFICIENCY,
) -> StepTime:
    """Time of one step.

    Args:
        device: where.
        pass_flops: of all passes of one rank in one step.
        manifold_flops: of the rank that owns most matrices, in one step.
        sent: bytes of a rank in one step.
        rank_images: images of a rank in one step.
        decode_rate: images per second of a rank's decoding threads.
        efficiency: share of the device's peak.
    """
    link = device.link_gbps * 1e9 / 8
    return StepTime(
        passes=pass_flops / (efficiency * device.working_flops),
        zero3=sent.zero3 / link + LATENCY_S * sent.gathers * (sent.zero3 > 0),
        data=rank_images / decode_rate,
        manifold_products=manifold_flops / (efficiency * device.single_flops),
        manifold_traffic=sent.manifold / link,
        latency=5 * sent.rounds * LATENCY_S * (sent.manifold > 0),
    )
