"""Time and cost of a run on a device that is not there: a model with stated assumptions.

A step is the passes of its micro-batches, beside which ZeRO-3's collectives and the data stream
run, followed by the manifold step, in whose rounds the exchange of one runs beside the products of
another:

    step = max(passes, ZeRO-3 traffic, data) + manifold step
    passes = products + bytes that other operators move + COLLECTIVES_TAKE * ZeRO-3 traffic beside
             + the first gather and the last reduction, which have nothing to run beside
    manifold step = max(products, traffic) + min(products, traffic) / rounds

A ring over several nodes uses all adapters of a node, so W ranks in nodes of n gather S bytes in
max(S (1 - n/W) / (n ports), S (W - 1)/W / NVLink), and in W - 1 hops. An all-to-all has one port
for each device.

On CPUs collectives, decoding and products share the cores, nothing runs beside anything, and all
terms add up. What the model leaves out: copies into and out of buckets, and the host's own time.
`benchmarks/plan.py` holds it to published measurements.
"""

import dataclasses

from pipeline.errors import PipelineError
from pipeline.planner.calibration import Measured
from pipeline.planner.memory import Traffic
from pipeline.training.device_flops import has, peak_flops

MANIFOLD_WORK = {
    ("exp", "full"): (4.625, 145),
    ("exp", "tf32"): (10.625, 781),
    ("exp", "bf16"): (6.625, 280),
    ("fast", "full"): (3.625, 101),
    ("fast", "tf32"): (7.625, 561),
    ("fast", "bf16"): (7.625, 280),
}
"""By `optim.retraction` and `optim.increment`: products of C x C matrices per matrix and step, and
bytes that its owner reads and writes per element beside them, as at C = 4096 and lr 1e-3. Rounding
to TF32 takes three operators, splitting a product into rounded ones several of them."""
TANGENT_BYTES = {"full": 0, "tf32": 64, "bf16": 12}
"""Of these, what the rounding of X and G takes, where the step itself forms X^T G: with
`optim.gradient trivialized` it is not rounded, and one product less."""
SLICE_BYTES, LOOKAHEAD_BYTES = 76, 24
"""Read and written per element of a rank's slices, and with Lookahead more. All of these are
counted on a step, and `tests/fake_gpu/test_step.py` counts them again."""
_BEST_SHARES = {"H100": 0.803, "H200": 0.803, "A100": 0.869}
"""Of the data sheet's bf16, what the best shape of a product reaches, as measured:
github.com/stas00/ml-engineering, compute/accelerator, maximum achievable matmul FLOPS."""
SHARE_OF_BEST = 0.75
"""What products of a network reach of that: its shapes are not the best, and power is shared."""
_MEMORY_GBPS = {"B200": 8000, "H200": 4800, "H100": 3350, "A100": 2039, "L40S": 864, "V100": 900}
"""10^9 bytes per second of a device's memory, from NVIDIA's data sheets."""
MEMORY_SHARE = 0.8
"""What operators reach of it; github.com/calculon-ai/calculon has 0.9 for 100 MB on an A100."""
LINK_SHARE = 0.8
"""What collectives reach of a link: NVIDIA expects 46 to 48 of 50 GB/s per adapter
(github.com/NVIDIA/nccl-tests, issue 290)."""
COLLECTIVES_TAKE = 32 / 132
"""Share of a device that collectives take from the passes beside them: NCCL's thread blocks, up to
32, of the multiprocessors of an H100. calculon has 0.15 for an A100."""
LATENCY_S = 30e-6
"""Start of one collective."""
_HOP_S, _NETWORK_HOP_S = 3.4e-6, 14e-6
"""One step of a ring inside a node and between two: NCCL's own estimate (src/graph/tuning.cc)."""
NODE = 8
"""Devices of a node."""
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
        single_flops: FLOP/s of the manifold step's products, in `optim.increment`.
        pass_efficiency: share of `working_flops` that the passes reach.
        step_efficiency: share of `single_flops` that the manifold step reaches.
        exchange_gbps: 10^9 bits per second that a device can send to the others in an all-to-all.
        gather_gbps: the same in an all-gather.
        scatter_gbps: the same in a reduce-scatter.
        latency_s: start of one collective, the steps of its ring included.
        memory_gbps: 10^9 bytes per second that operators read and write; 0: part of the shares
            that passes and step reach.
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
    memory_gbps: float
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
    per_node: int = NODE,
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
        per_node: devices of each.
        increment: precision of the manifold step's products.
        tflops: 10^12 FLOP/s in that precision.
        memory_gb: 10^9 bytes.
        link_gbps: 10^9 bits per second.
        efficiency: share of the peak that products reach.
        measured: of such a device.

    Raises:
        PipelineError: the device is not known and a value is missing; it has no such precision, or
            was measured in another one.
    """
    if not has(name, precision):
        raise PipelineError(
            f"--device {name}: its tensor cores have no {precision}; give --train.precision fp16 "
            "or fp32"
        )
    values = _sheet(name, precision, increment, nodes, per_node)
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


def _sheet(name: str, precision: str, increment: str, nodes: int, per_node: int) -> _Values:
    """What data sheets say and what is assumed."""
    working, single = peak_flops(name, precision), _increment_flops(name, increment)
    best, whose = _BEST_SHARES.get(name, min(_BEST_SHARES.values())), "ml-engineering"
    share = SHARE_OF_BEST * best, f"assumed: {SHARE_OF_BEST} of the best shape's {best} ({whose})"
    hops = (nodes - 1) * _NETWORK_HOP_S + nodes * (per_node - 1) * _HOP_S
    values: _Values = {
        **dict.fromkeys(_EFFICIENCIES, share),
        "latency_s": (LATENCY_S + hops, "assumed start, hops as NCCL's tuning.cc has them"),
        "memory_gbps": (
            MEMORY_SHARE * _MEMORY_GBPS.get(name, 0),
            f"{MEMORY_SHARE} of the data sheet",
        ),
        "decode_rate": (DECODE_RATE, "assumed"),
    }
    if name in _MEMORY_GB:
        values["memory_gb"] = _MEMORY_GB[name], "data sheet"
    if working and single:
        values |= dict.fromkeys(("peak_flops", "working_flops"), (working, "data sheet"))
        values["single_flops"] = single, "data sheet"
    return values | _links(name, nodes, per_node)


def _increment_flops(name: str, increment: str) -> float | None:
    """Peak of the manifold step's products: TF32 has half of bf16's, where there is either."""
    single, half = peak_flops(name, "fp32"), peak_flops(name, "bf16")
    if increment == "full" or not half:
        return single
    return half / 2 if increment == "tf32" else half


def _links(name: str, nodes: int, per_node: int) -> _Values:
    """Rates of collectives, see the module."""
    inside = _INSIDE_GBPS.get(name, 0)
    if nodes == 1:
        known = LINK_SHARE * inside, f"{LINK_SHARE} of the data sheet"
        return dict.fromkeys(_LINKS, known) if inside else {}
    ranks = nodes * per_node
    # Of what a rank sends, S (W - 1)/W, a node's adapters send S (1 - n/W) together.
    ring = per_node * NETWORK_GBPS * (ranks - 1) / (ranks - per_node)
    port = min(NETWORK_GBPS, inside or NETWORK_GBPS)
    said = f"{LINK_SHARE} of a port of {NETWORK_GBPS} Gbit/s for each device, assumed"
    values: _Values = {"exchange_gbps": (LINK_SHARE * port, said)}
    rate = LINK_SHARE * min(ring, inside or ring), f"{said}; rings use all of a node"
    return values | dict.fromkeys(("gather_gbps", "scatter_gbps"), rate)


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
        "memory_gbps": (0.0, "part of the measured shares"),
        "decode_rate": (found.decode_rate, "measured"),
    }
    if found.ranks == 1:
        return values
    values["latency_s"] = found.latency_s, ranks
    for link in _LINKS:
        rate = getattr(found, link)
        if nodes <= found.nodes:
            values[link] = rate, ranks
        elif rate < LINK_SHARE * NETWORK_GBPS:
            values[link] = rate, f"{ranks}, at most that"
    return values


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        passes: the forward and backward passes, recomputation included, slowed by the collectives
            beside them.
        zero3: collectives of ZeRO-3.
        data: decoding.
        manifold_products: of the rank that owns most matrices, and what it moves in memory.
        manifold_traffic: all-to-alls of the manifold step, their latencies included.
        rounds: of the manifold step.
        overlap: whether collectives and decoding run beside products.
        products: of the passes alone.
    """

    passes: float
    zero3: float
    data: float
    manifold_products: float
    manifold_traffic: float
    rounds: int
    overlap: bool
    products: float = 0.0

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


def manifold_products(retraction: str, increment: str) -> float:
    """Products of C x C matrices per matrix and step."""
    return MANIFOLD_WORK[retraction, increment][0]


def step_time(
    device: Device,
    *,
    pass_flops: float,
    pass_bytes: float,
    manifold_flops: float,
    manifold_bytes: float,
    sent: Traffic,
    rank_images: int,
    decoders: int,
) -> StepTime:
    """Time of one step.

    Args:
        device: where.
        pass_flops: of all passes of one rank in one step.
        pass_bytes: read and written by what is no product in them.
        manifold_flops: of the rank that owns most matrices, in one step.
        manifold_bytes: read and written by what is no product there.
        sent: bytes of a rank in one step.
        rank_images: images of a rank in one step.
        decoders: threads of a rank that decode.

    Raises:
        PipelineError: ranks send, and the rate of the device is not known.
    """
    gathered = _seconds(sent.forward + sent.backward, device.gather_gbps)
    reduced = _seconds(sent.reduce, device.scatter_gbps)
    exchanged = _seconds(sent.manifold, device.exchange_gbps)
    zero3 = gathered + reduced + device.latency_s * sent.gathers * (sent.zero3 > 0)
    products = pass_flops / (device.pass_efficiency * device.working_flops)
    moved, moved_by_owner = (
        moved / (1e9 * device.memory_gbps) if device.memory_gbps else 0.0
        for moved in (pass_bytes, manifold_bytes)
    )
    passes = products + moved
    if device.overlap:
        passes += COLLECTIVES_TAKE * min(zero3, passes) + 2 * zero3 / max(sent.gathers, 1)
    manifold = manifold_flops / (device.step_efficiency * device.single_flops)
    return StepTime(
        passes=passes,
        products=products,
        zero3=zero3,
        data=rank_images / (device.decode_rate * decoders),
        manifold_products=manifold + moved_by_owner,
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
