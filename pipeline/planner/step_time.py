"""Time and cost of a run on a device that is not there: a model with stated assumptions.

A step is the passes of its micro-batches, beside which ZeRO-3's collectives and the data stream
run, followed by the manifold step, in whose rounds the exchange of one runs beside the products of
another:

    step = max(passes, ZeRO-3 traffic, data) + manifold step
    manifold step = max(products, traffic) + min(products, traffic) / rounds

On CPUs collectives, decoding and products share the cores, nothing runs beside anything, and all
terms add up. What the model leaves out: copies into and out of buckets, and the host's own time.
"""

import dataclasses

from pipeline.errors import PipelineError
from pipeline.planner.calibration import Measured
from pipeline.planner.memory import Traffic
from pipeline.training.device_peak import peak_flops

MANIFOLD_PRODUCTS = {"exp": 4.6, "fast": 3.7}
"""Products of C x C matrices per matrix and step, by `optim.retraction`, as at C = 4096 and lr
1e-3: order 6, or form 4 and its share of a correction; one less where the backward pass delivers
X^T G."""
EFFICIENCY = 0.4
"""Share of a device's peak that products reach in practice; published runs of this size have 0.29
to 0.5."""
LATENCY_S = 30e-6
"""Start of one collective."""
DECODE_RATE = 800.0
"""Images per second that one CPU core decodes and crops to 224 x 224; smaller ones are faster."""
NETWORK_GBPS = 400
"""One network port for each device."""
_MEMORY_GB = {"B200": 180, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "V100": 32}
_INSIDE_GBPS = {"B200": 7200, "H200": 3600, "H100": 3600, "A100": 2400, "L40S": 256, "V100": 1200}
"""Of one direction, between the devices of a node, from NVIDIA's data sheets."""
DEVICES = tuple(_MEMORY_GB)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a step is computed on.

    Attributes:
        name: as its maker calls it.
        memory_gb: 10^9 bytes of memory.
        peak_flops: FLOP/s of which MFU is a share: an option, its data sheet, or what was measured.
        working_flops: FLOP/s of products in the type of the working weights.
        single_flops: FLOP/s of products in fp32.
        pass_efficiency: share of `working_flops` that the passes reach.
        step_efficiency: share of `single_flops` that the manifold step reaches.
        exchange_gbps: 10^9 bits per second that a device can send to the others in an all-to-all.
        gather_gbps: the same in an all-gather.
        scatter_gbps: the same in a reduce-scatter.
        latency_s: start of one collective.
        decode_rate: images per second of one CPU core.
        overlap: whether collectives and decoding run beside products.
        sources: where each of these numbers comes from, by name.
    """

    name: str
    memory_gb: float
    peak_flops: float
    working_flops: float
    single_flops: float
    pass_efficiency: float
    step_efficiency: float
    exchange_gbps: float
    gather_gbps: float
    scatter_gbps: float
    latency_s: float
    decode_rate: float
    overlap: bool
    sources: dict[str, str]


_LINKS = ("exchange_gbps", "gather_gbps", "scatter_gbps")
_EFFICIENCIES = ("pass_efficiency", "step_efficiency")
_Values = dict[str, tuple[float, str]]
"""Numbers of a device with their sources, by name."""


def device_of(
    name: str,
    *,
    precision: str,
    nodes: int,
    increment: str = "full",
    tflops: float = 0.0,
    memory_gb: float = 0.0,
    link_gbps: float = 0.0,
    efficiency: float = 0.0,
    measured: Measured | None = None,
) -> Device:
    """A device by name; values other than 0 replace what was measured, and that its data sheet.

    Args:
        name: one of DEVICES, or any other if all values are given or measured.
        precision: of the working weights.
        nodes: more than one communicate over the network.
        increment: precision of the manifold step's products; data sheets are read as if `full`.
        tflops: 10^12 FLOP/s in that precision.
        memory_gb: 10^9 bytes.
        link_gbps: 10^9 bits per second.
        efficiency: share of the peak that products reach.
        measured: of such a device.

    Raises:
        PipelineError: the device is not known and a value is missing; it was measured in another
            precision.
    """
    values = _sheet(name, precision, nodes)
    if measured is not None:
        _check_settings(measured, precision, increment)
        unknown = dict.fromkeys(_LINKS, (0.0, "not measured on one rank"))
        peak = {"peak_flops": (measured.working_flops, "measured")}
        values = unknown | peak | values | _measured(measured, nodes)
    if tflops:
        values |= dict.fromkeys(("peak_flops", "working_flops"), (tflops * 1e12, "--tflops"))
        if "single_flops" not in values:
            parts = 1 if precision == "fp32" else 16
            values["single_flops"] = tflops * 1e12 / parts, "--tflops"
    if memory_gb:
        values["memory_gb"] = memory_gb, "--memory-gb"
    if link_gbps:
        values |= dict.fromkeys(_LINKS, (link_gbps, "--link-gbps"))
    if efficiency:
        values |= dict.fromkeys(_EFFICIENCIES, (efficiency, "--efficiency"))
    for needed, option in (
        ("working_flops", "--tflops"),
        ("memory_gb", "--memory-gb"),
        ("exchange_gbps", "--link-gbps"),
    ):
        if needed not in values:
            raise PipelineError(
                f"--device {name}: not one of {', '.join(DEVICES)}; give {option} as well"
            )
    return Device(
        name=name,
        overlap=measured is None or measured.overlap,
        sources={key: source for key, (_, source) in values.items()},
        **{key: value for key, (value, _) in values.items()},
    )


def _check_settings(measured: Measured, precision: str, increment: str) -> None:
    for option, found, wanted in (
        ("--train.precision", measured.precision, precision),
        ("--optim.increment", measured.increment, increment),
    ):
        if found != wanted:
            raise PipelineError(
                f"--measured is of {option} {found}, the run is of {wanted}: measure with "
                f"{option} {wanted}"
            )


def _sheet(name: str, precision: str, nodes: int) -> _Values:
    """What data sheets say and what is assumed."""
    working, single = peak_flops(name, precision), peak_flops(name, "fp32")
    inside = _INSIDE_GBPS.get(name, 0)
    values: _Values = {
        **dict.fromkeys(_EFFICIENCIES, (EFFICIENCY, "assumed")),
        "latency_s": (LATENCY_S, "assumed"),
        "decode_rate": (DECODE_RATE, "assumed"),
    }
    if name in _MEMORY_GB:
        values["memory_gb"] = _MEMORY_GB[name], "data sheet"
    if working and single:
        values |= dict.fromkeys(("peak_flops", "working_flops"), (working, "data sheet"))
        values["single_flops"] = single, "data sheet"
    if nodes > 1:
        slower = min(NETWORK_GBPS, inside or NETWORK_GBPS)
        values |= dict.fromkeys(_LINKS, (slower, "assumed: a network port for each device"))
    elif inside:
        values |= dict.fromkeys(_LINKS, (inside, "data sheet"))
    return values


def _measured(found: Measured, nodes: int) -> _Values:
    """What replaces it. A link inside of a node says nothing of the network but an upper bound."""
    ranks = f"measured on {found.ranks} ranks of {found.nodes} node(s)"
    shape = f"measured at width {found.width}, {found.tokens} tokens"
    values: _Values = {
        "memory_gb": (found.memory_gb, "measured"),
        "working_flops": (found.working_flops, shape),
        "single_flops": (found.single_flops, shape),
        "pass_efficiency": (found.pass_efficiency, shape),
        "step_efficiency": (found.step_efficiency, shape),
        "decode_rate": (found.decode_rate, "measured"),
    }
    if found.ranks == 1:
        return values
    values["latency_s"] = found.latency_s, ranks
    for link in _LINKS:
        rate = getattr(found, link)
        if nodes <= found.nodes:
            values[link] = rate, ranks
        elif rate < NETWORK_GBPS:
            values[link] = rate, f"{ranks}, at most that"
    return values


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        passes: products of the forward and backward passes, recomputation included.
        zero3: collectives of ZeRO-3.
        data: decoding.
        manifold_products: of the rank that owns most matrices.
        manifold_traffic: all-to-alls of the manifold step, their latencies included.
        rounds: of the manifold step.
        overlap: whether collectives and decoding run beside products.
    """

    passes: float
    zero3: float
    data: float
    manifold_products: float
    manifold_traffic: float
    rounds: int
    overlap: bool

    @property
    def beside(self) -> tuple[float, float, float]:
        """What runs at the same time, or one after the other."""
        return self.passes, self.zero3, self.data

    @property
    def manifold(self) -> float:
        """What follows the passes."""
        parts = self.manifold_products, self.manifold_traffic
        if not self.overlap:
            return sum(parts)
        return max(parts) + min(parts) / max(self.rounds, 1)

    @property
    def total(self) -> float:
        """See the module."""
        return (max if self.overlap else sum)(self.beside) + self.manifold

    @property
    def bound(self) -> str:
        """What takes most of a step, or what the passes wait for."""
        if self.passes == max(self.beside):
            return "compute" if self.manifold < self.passes else "manifold step"
        return "ZeRO-3 traffic" if self.zero3 == max(self.beside) else "data"


def step_time(
    device: Device,
    *,
    pass_flops: float,
    manifold_flops: float,
    sent: Traffic,
    rank_images: int,
    decoders: int,
) -> StepTime:
    """Time of one step.

    Args:
        device: where.
        pass_flops: of all passes of one rank in one step.
        manifold_flops: of the rank that owns most matrices, in one step.
        sent: bytes of a rank in one step.
        rank_images: images of a rank in one step.
        decoders: threads of a rank that decode.

    Raises:
        PipelineError: ranks send, and the rate of the device is not known.
    """
    gathered = _seconds(sent.forward + sent.backward, device.gather_gbps)
    reduced = _seconds(sent.reduce, device.scatter_gbps)
    exchanged = _seconds(sent.manifold, device.exchange_gbps)
    return StepTime(
        passes=pass_flops / (device.pass_efficiency * device.working_flops),
        zero3=gathered + reduced + device.latency_s * sent.gathers * (sent.zero3 > 0),
        data=rank_images / (device.decode_rate * decoders),
        manifold_products=manifold_flops / (device.step_efficiency * device.single_flops),
        manifold_traffic=exchanged + 5 * sent.rounds * device.latency_s * (sent.manifold > 0),
        rounds=sent.rounds,
        overlap=device.overlap,
    )


def _seconds(sent: int, gbps: float) -> float:
    if not sent:
        return 0.0
    if not gbps:
        raise PipelineError(
            "what ranks send to each other was not measured: measure with more, or give --link-gbps"
        )
    return 8 * sent / (gbps * 1e9)
