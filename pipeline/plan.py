"""Entry: `python -m pipeline.plan [PRESET] --nodes N --gpus G [--setting value ...]`.

Says what a run needs before anybody pays for it: memory of a rank, FLOPs, traffic, time, cost.
Needs no GPU and no cluster. Exit codes: 0 it fits, 2 it does not, or the input is wrong.
"""

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from data_shards.command_line.help_page import show_help
from data_shards.command_line.parsing import as_typed, one_line, parse_words
from data_shards.command_line.settings import settings
from data_shards.sources.base import HELD_OUT, MOST_HELD_OUT
from data_shards.untrusted.terminal import PlainConsole
from pipeline.command_line.arguments import DEFAULT_PRESET, parse_with_preset
from pipeline.config import RunConfig
from pipeline.errors import REFUSALS, PipelineError
from pipeline.planner import memory as budget
from pipeline.planner.calibration import Measured
from pipeline.planner.estimate import (
    Estimate,
    estimate,
    recomputed_blocks,
    trials,
    weights_of,
    with_increment,
)
from pipeline.planner.step_time import Device, device_of
from pipeline.planner.verify_time import GFLOPS, Verification, verification
from pipeline.presets.registry import run_preset
from pipeline.training.data import Samples, open_samples

_PROG = "python -m pipeline.plan"
_EXAMPLES = {
    f"{_PROG} imagenet-L32W4096 --nodes 2 --gpus 8 --device H100": "a published network on 16 GPUs",
    f"{_PROG} cifar10-L32W1024 --data.shards s3://bucket/set --train.epochs 100": (
        "on a shard set, with settings of `python -m pipeline.pretrain --help-all`"
    ),
    f"{_PROG} imagenet-L32W4096 --sweep 8,16,32": "a table with a row for each number of GPUs",
}
_DEFAULT_DEVICE = "H100"
_GB = 1e9
_SETS = {  # images of the training split, kB of one, images of the test split
    "imagenet": (1_281_167, 110.0, 50_000),
    "tiny-imagenet": (100_000, 2.2, 10_000),
    "cifar": (50_000, 2.3, 10_000),
    "mnist": (60_000, 0.3, 10_000),
    "fashion": (60_000, 0.5, 10_000),
    "digits": (1_437, 0.1, 360),
}
_WORTH = 0.5
"""Share of the devices added that has to show in images per second: else scaling has ended."""
_DRAWN = 1000
"""Images of a verification with `--sample`."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Says what a run needs: memory, FLOPs, traffic, time, cost; needs no GPU.

    Attributes:
        run: the run, with the settings of `python -m pipeline.pretrain`.
        nodes: machines.
        gpus: devices of each.
        device: B200, H200, H100, A100, L40S, V100, or another name with the three values below.
            Empty: H100, or that of measured.
        measured: a file of `python -m benchmarks.calibrate`, for the device that it was made on.
            Empty: data sheets.
        tflops: 10^12 FLOP/s of a device in the run's precision; 0: measured, or its data sheet.
        memory_gb: 10^9 bytes of a device; 0: measured, or its data sheet.
        link_gbps: 10^9 bits per second from a device to the others; 0: measured, or 0.8 of its
            data sheet within one node and of 400 over the network.
        efficiency: share of the peak that products reach; 0: measured, or 0.75 of the best shape's.
        price_per_gpu_hour: in any currency; 0: cluster.price-per-device-hour.
        images: samples of an epoch; 0: of --data.shards, or of the preset's data set.
        image_kb: 10^3 bytes of an encoded image; 0: as of images.
        test_images: samples of the certified split; 0: as of images.
        verify_gflops: 10^9 float64 operations per second of one process of `model.verify`.
        verify_processes: its `--processes`.
        json: print JSON instead of tables.
        sweep: numbers of devices, as in 8,16,32: a Markdown table with one row for each; empty: one
            number.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    nodes: int = 1
    gpus: int = 8
    device: str = ""
    measured: str = ""
    tflops: float = 0.0
    memory_gb: float = 0.0
    link_gbps: float = 0.0
    efficiency: float = 0.0
    price_per_gpu_hour: float = 0.0
    images: int = 0
    image_kb: float = 0.0
    test_images: int = 0
    verify_gflops: float = GFLOPS
    verify_processes: int = 1
    json: bool = False
    sweep: str = ""

    def require(self) -> None:
        """Refuse what is no number of devices and no rate.

        Raises:
            PipelineError: a value is out of its range.
        """
        for name in ("nodes", "gpus", "verify_processes"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise PipelineError(f"--{flag} {getattr(self, name)}: at least 1")
        for name in (
            "tflops",
            "memory_gb",
            "link_gbps",
            "efficiency",
            "price_per_gpu_hour",
            "images",
            "image_kb",
            "test_images",
        ):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise PipelineError(
                    f"--{name.replace('_', '-')} {value}: a number that is not negative"
                )
        if not 0 < self.verify_gflops < math.inf:
            raise PipelineError(f"--verify-gflops {self.verify_gflops} must be positive")
        if self.run.train.processor_seconds:
            raise PipelineError(
                f"train.processor_seconds={self.run.train.processor_seconds:g}: a plan counts the "
                "steps of the epochs, and a budget of time has as many as it has time for"
            )
        if self.efficiency > 1:
            raise PipelineError(f"--efficiency {self.efficiency} must be in (0, 1]")
        if self.device and self.measured:
            raise PipelineError(
                f"--device {self.device} and --measured {self.measured}: the file has its own"
            )

    @property
    def price(self) -> float:
        """Of one device for an hour; 0: unknown."""
        return self.price_per_gpu_hour or self.run.cluster.price_per_device_hour

    def on(self, nodes: int) -> Device:
        """The device among `nodes` nodes."""
        measured = Measured.read(Path(self.measured)) if self.measured else None
        name = measured.device if measured else self.device or _DEFAULT_DEVICE
        increment = with_increment(self.run, weights_of(self.run)[0], name).optim.increment
        return device_of(
            name,
            precision=self.run.train.precision,
            increment=increment,
            nodes=nodes,
            per_node=self.gpus,
            tflops=self.tflops,
            memory_gb=self.memory_gb,
            link_gbps=self.link_gbps,
            efficiency=self.efficiency,
            measured=measured,
        )

    def data(self) -> tuple[int, float]:
        """Samples of an epoch and bytes of one; 0.0: not known.

        Raises:
            PipelineError: the data set of the preset is not known, or the network does not fit it.
            ShardError: there is no such shard set.
        """
        images, kilobytes, _ = self._known
        if not (self.images or images):
            raise PipelineError(
                f"preset {self.run.preset!r}: give --data.shards, or --images, samples of an epoch"
            )
        return self.images or images, 1e3 * (self.image_kb or kilobytes)

    @functools.cached_property
    def _known(self) -> tuple[int, float, int]:
        """Samples of an epoch, kB of one and samples of the certified split; 0: not known."""
        data = self.run.data
        if data.shards:
            return _counted(open_samples(data.shards, data, self.run.model, certify=False))
        known = (v for name, v in _SETS.items() if self.run.preset.startswith(name))
        images, kilobytes, test = next(known, (0, 0.0, 0))
        if data.train_split == "fit":
            images -= min(math.ceil(images * HELD_OUT), MOST_HELD_OUT)
        return images, kilobytes, test

    def verification(self) -> Verification:
        """What it takes to verify the certificate of the result."""
        return verification(
            self.run.model,
            images=self.test_images or self._known[2],
            gflops=self.verify_gflops,
            processes=self.verify_processes,
        )

    def estimate(self, ranks: int, run: RunConfig | None = None) -> Estimate:
        """The run (or another one) on a number of devices.

        As the run itself does, blocks are recomputed where they do not fit otherwise: as many as
        needed, or all where `auto` is not asked for.
        """
        run, device = run or self.run, self.on(-(-ranks // self.gpus))
        found = estimate(run, ranks=ranks, device=device, images=self.data()[0])
        if found.fits or found.meta_pass.recomputed == found.meta_pass.blocks:
            return found
        blocks: int | Literal["all"] = "all"
        if run.train.activation_checkpointing == "auto" and device.name != "cpu":
            blocks = recomputed_blocks(
                run,
                ranks=ranks,
                micro_batch=found.counts.micro_batch,
                device=device.name,
                room=found.room,
            )
        train = dataclasses.replace(run.train, activation_checkpointing=blocks)
        again = dataclasses.replace(run, train=train)
        return estimate(again, ranks=ranks, device=device, images=self.data()[0])


def _counted(samples: Samples) -> tuple[int, float, int]:
    """What the index of a shard set says; see `Request._known`."""
    if samples.index is None:
        return samples.per_epoch, 0.0, 0
    sizes = samples.index.rows.size[samples.index.select(samples.data.train_split)]
    test = len(samples.index.select(samples.data.test_split))
    return samples.per_epoch, float(sizes.mean()) / 1e3, test


def parse(arguments: Sequence[str]) -> Request:
    """What the command line asks for.

    Raises:
        PipelineError: unknown preset or loss, an option without effect, a value out of its range.
    """
    request = parse_with_preset(
        arguments,
        lambda name, preset, words: parse_words(
            Request, words, default=Request(run=preset), prog=_PROG
        ),
    )
    request.require()
    return request


def report(found: Estimate, request: Request) -> dict[str, Any]:
    """The estimate as JSON values: bytes, seconds, counts."""
    image_bytes = request.data()[1]
    kept = not request.run.checkpoint.none
    state = budget.checkpoint_bytes(found.weights, lookahead=found.lookahead)
    return {
        "preset": request.run.preset,
        "parameters": found.weights.total,
        "matrices": len(found.weights.matrices),
        "devices": found.ranks,
        "device": dataclasses.asdict(found.device),
        "counts": dataclasses.asdict(found.counts),
        "memory": [dataclasses.asdict(row) for row in found.components],
        "memory_peak": found.peak,
        "memory_room": found.room,
        "blocks": found.meta_pass.blocks,
        "recomputed": found.meta_pass.recomputed,
        "fits": found.fits,
        "host": found.host,
        "flops_per_image": found.least_flops,
        "flops_per_rank_step": found.meta_pass.flops * request.run.train.accumulation,
        "operations_per_image": request.run.model.operations(),
        "flops_epoch": found.least_flops and found.least_flops * found.images,
        "sent_per_rank_step": dataclasses.asdict(found.sent),
        "step_s": dataclasses.asdict(found.time)
        | {"manifold": found.time.manifold, "total": found.time.total},
        "bound": found.time.bound,
        "images_per_s": found.images_per_s,
        "mfu": found.mfu,
        "epoch_s": found.epoch_s,
        "device_hours": found.device_hours,
        "cost": found.device_hours * request.price if request.price else None,
        "checkpoint_bytes": state if kept else 0,
        "artifact_bytes": budget.artifact_bytes(found.weights) if kept else 0,
        "data_bytes_per_s": image_bytes * found.images_per_s if image_bytes else None,
        "verification": _verification_facts(request.verification()),
    }


def _verification_facts(found: Verification) -> dict[str, Any]:
    """The verification of the certificate as JSON values: seconds, bytes, counts."""
    return {
        "matrices": [
            step._asdict() | {"s": found.seconds(step.operations)} for step in found.steps
        ],
        "gflops": found.gflops,
        "processes": found.processes,
        "reading_s": found.reading_s,
        "bounds_s": found.bounds_s,
        "image_s": found.image_s,
        "images": found.images,
        "total_s": found.total_s,
        "memory_peak": found.peak,
    }


def refusal(found: Estimate, request: Request) -> str:
    """Why a run does not fit, and what would."""
    worst = budget.largest(found.components)
    text = (
        f"a rank needs {found.peak / _GB:.1f} GB, a {found.device.name} has room for "
        f"{found.room / _GB:.1f} GB of {found.device.memory_gb:g}; the largest component is "
        f"{worst.name} ({worst.phase}): {worst.size / _GB:.1f} GB. "
    )
    fitting: list[tuple[str, str]] = []
    for change, run, ranks in trials(request.run, ranks=found.ranks):
        kind = "devices" if ranks != found.ranks else "setting"
        if kind in [k for k, _ in fitting]:
            continue
        trial = request.estimate(ranks, run)
        if trial.fits:
            fitting.append((kind, f"{change} ({trial.peak / _GB:.1f} GB)"))
    if not fitting:
        return text + "No smaller micro-batch and no larger number of devices that was tried fits."
    return text + "What fits: " + "; or ".join(change for _, change in fitting)


def _tables(found: Estimate, request: Request) -> Iterator[Table]:
    facts = report(found, request)
    memory = Table("component", "when", "GB", title=f"Memory of one of {found.ranks} ranks")
    for row in found.components:
        memory.add_row(row.name, row.phase, f"{row.size / _GB:.3f}")
    peak = f"{found.peak / _GB:.2f} of {found.room / _GB:.1f}"
    memory.add_row("peak: always + largest phase", "", peak, style="bold")
    for name, size in found.host.items():
        memory.add_row(name, "host memory", f"{size / _GB:.3f}")
    yield memory
    yield _time_table(found)
    yield _device_table(found.device)
    run = Table("run", "", title=f"{request.run.preset} on {found.ranks} x {found.device.name}")
    for name, value in _figures(found, facts):
        run.add_row(name, value)
    yield run
    yield _verification_table(request.verification())


def _verification_table(found: Verification) -> Table:
    """What `model.verify` takes; steps of one shape are one row."""
    table = Table("verification of the certificate", "FLOPs", "seconds", "GB")
    same = Counter((step.shape, step.operations, step.values) for step in found.steps)
    for (shape, operations, values), count in same.items():
        sides = " x ".join(map(str, shape))
        seconds = f"{found.seconds(operations):,.3g}"
        table.add_row(
            f"{count} of {sides}, each", f"{operations:.3g}", seconds, f"{8 * values / _GB:.2f}"
        )
    rate = f"{found.processes} x {found.gflops:g} GFLOP/s (float64)"
    table.add_row("reading and hashing the weights", "", f"{found.reading_s:,.3g}", "")
    table.add_row(f"all bounds, {rate}", "", f"{found.bounds_s:,.3g}", f"{found.peak / _GB:.2f}")
    for images in dict.fromkeys(n for n in (1, min(_DRAWN, found.images), found.images) if n):
        operations = images * found.one.operations
        table.add_row(
            f"{images:,} images", f"{operations:.3g}", f"{images * found.image_s:,.3g}", ""
        )
    return table


def _time_table(found: Estimate) -> Table:
    table = Table("per rank and step", "GB", "seconds", "beside", title="Traffic and time")
    sent, t = found.sent, found.time
    passes = "passes" if t.overlap else "nothing: one after the other"
    products = "products" if t.overlap else passes
    table.add_row("products of the passes", "", f"{t.products:.4f}", "")
    table.add_row("passes", "", f"{t.passes:.4f}", "")
    table.add_row("all-gather, forward", f"{sent.forward / _GB:.3f}", "", passes)
    table.add_row("all-gather, backward", f"{sent.backward / _GB:.3f}", "", passes)
    table.add_row("reduce-scatter", f"{sent.reduce / _GB:.3f}", "", passes)
    table.add_row("ZeRO-3 together", f"{sent.zero3 / _GB:.3f}", f"{t.zero3:.4f}", passes)
    table.add_row("data", "", f"{t.data:.4f}", passes)
    table.add_row("manifold products", "", f"{t.manifold_products:.4f}", "")
    traffic = f"{sent.manifold / _GB:.3f}"
    table.add_row("manifold traffic", traffic, f"{t.manifold_traffic:.4f}", products)
    table.add_row("manifold step", "", f"{t.manifold:.4f}", "nothing")
    table.add_row("step", "", f"{t.total:.4f}", f"bound by {t.bound}", style="bold")
    return table


def _device_table(device: Device) -> Table:
    """Every number of the device that the times follow from, and where it is from."""
    table = Table("of a device", "", "from", title=device.name)
    rows = {
        "memory_gb": ("memory", "{:,.1f} GB", 1.0),
        "peak_flops": ("peak, of which MFU is a share", "{:,.4g} TFLOP/s", 1e12),
        "working_flops": ("products, working precision", "{:,.4g} TFLOP/s", 1e12),
        "single_flops": ("products, fp32", "{:,.4g} TFLOP/s", 1e12),
        "pass_efficiency": ("share that passes reach", "{:.2f}", 1.0),
        "step_efficiency": ("share that the manifold step reaches", "{:.2f}", 1.0),
        "exchange_gbps": ("sent in an all-to-all", "{:,.4g} Gbit/s", 1.0),
        "gather_gbps": ("sent in an all-gather", "{:,.4g} Gbit/s", 1.0),
        "scatter_gbps": ("sent in a reduce-scatter", "{:,.4g} Gbit/s", 1.0),
        "latency_s": ("start of a collective", "{:,.4g} us", 1e-6),
        "memory_gbps": ("memory, as operators reach it", "{:,.4g} GB/s", 1.0),
        "decode_rate": ("decoded by a core", "{:,.4g} images/s", 1.0),
    }
    for name, (label, form, unit) in rows.items():
        value = form.format(getattr(device, name) / unit)
        table.add_row(label, value, device.sources[name])
    return table


def _figures(found: Estimate, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    known = found.least_flops
    yield "parameters", f"{facts['parameters']:,} in {facts['matrices']} matrices and the rest"
    yield (
        "batch",
        f"{found.ranks} ranks x {found.counts.rank_batch}, {found.counts.micro_batch} a pass",
    )
    seen = found.meta_pass
    again = f"{seen.recomputed} of {seen.blocks} recomputed in the backward pass"
    yield "blocks", again if seen.recomputed else "kept"
    yield "steps", f"{found.counts.total_steps:,}"
    yield "least FLOPs per image", f"{known:.4g}" if known else "not known for this family"
    flops = facts["flops_per_rank_step"]
    yield "FLOPs per rank and step", f"{flops:.4g}, as counted" if flops else "no products"
    if operations := facts["operations_per_image"]:
        counts = ", ".join(f"{count:.4g} {name}" for name, count in operations.items())
        yield "of distances, per image", f"{counts}; the times leave them out"
    yield "FLOPs per epoch", f"{facts['flops_epoch']:.4g}" if known else "not known"
    yield "images per second", f"{found.images_per_s:,.0f}"
    yield "MFU", f"{found.mfu:.1%}" if found.mfu is not None else "not known"
    yield "time per epoch", f"{found.epoch_s:,.0f} s"
    yield "device hours", f"{found.device_hours:,.1f}"
    yield "cost", f"{facts['cost']:,.0f}" if facts["cost"] else "no price given"
    for what in ("checkpoint", "artifact"):
        size = facts[f"{what}_bytes"]
        yield what, f"{size / _GB:.2f} GB" if size else "none is written"
    needed = facts["data_bytes_per_s"]
    yield "data", f"{needed / 1e6:,.1f} MB/s from the store" if needed else "give --image-kb"


def swept(request: Request) -> list[Estimate]:
    """The run on each number of devices of `--sweep`.

    Raises:
        PipelineError: one is no number of devices; the batch does not split over it.
    """
    try:
        numbers = [int(word) for word in request.sweep.split(",")]
    except ValueError as error:
        raise PipelineError(f"--sweep {request.sweep}: numbers as in 8,16,32") from error
    if min(numbers) < 1:
        raise PipelineError(f"--sweep {request.sweep}: {min(numbers)} devices, at least 1")
    return [request.estimate(ranks) for ranks in numbers]


def sweep(estimates: Sequence[Estimate]) -> Iterator[str]:
    """Lines of a Markdown table, one row for each number of devices."""
    columns = (
        "devices", "images a device", "memory GB", "fits", "recomputed", "passes ms", "ZeRO-3 ms",
        "manifold ms", "step ms", "bound", "images/s", "MFU", "epoch min", "device hours",
    )  # fmt: skip
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---:|" * len(columns)
    for e in estimates:
        t = e.time
        cells = [
            str(e.ranks), str(e.counts.rank_batch), f"{e.peak / _GB:.1f}",
            "yes" if e.fits else "no", f"{e.meta_pass.recomputed} of {e.meta_pass.blocks}",
            f"{1e3 * t.passes:.0f}", f"{1e3 * t.zero3:.0f}", f"{1e3 * t.manifold:.0f}",
            f"{1e3 * t.total:.0f}", t.bound, f"{e.images_per_s:,.0f}",
            f"{e.mfu:.0%}" if e.mfu is not None else "", f"{e.epoch_s / 60:.1f}",
            f"{e.device_hours:,.0f}",
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def end_of_scaling(estimates: Sequence[Estimate]) -> str:
    """Up to which number of devices more of them pay, and what the step waits for beyond."""
    for few, many in itertools.pairwise(sorted(estimates, key=lambda e: e.ranks)):
        gained = many.images_per_s / few.images_per_s - 1
        added = many.ranks / few.ranks - 1
        if gained < _WORTH * added:
            return (
                f"Scaling ends at {few.ranks} devices: {many.ranks} make {gained:.0%} more "
                f"images per second of {added:.0%} more devices; a step is bound by "
                f"{many.time.bound}."
            )
    return f"Scaling does not end within {max(e.ranks for e in estimates)} devices."


def _show(request: Request, console: Console) -> int:
    if request.sweep:
        estimates = swept(request)
        for line in (*sweep(estimates), "", end_of_scaling(estimates)):
            console.print(line, soft_wrap=True)
        return 0 if all(e.fits for e in estimates) else 2
    found = request.estimate(request.nodes * request.gpus)
    if request.json:
        console.print(json.dumps(report(found, request), indent=1), soft_wrap=True)
    else:
        for table in _tables(found, request):
            console.print(table)
    if found.fits:
        return 0
    error = PlainConsole(stderr=True, soft_wrap=True)
    error.print(f"refused: {refusal(found, request)}")
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the entry; returns the exit code."""
    console = PlainConsole()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if any(word in words for word in ("-h", "--help")):
        show_help(Request, None, prog=_PROG, examples=_EXAMPLES)
        return 0
    try:
        return _show(parse(words), console)
    except (*REFUSALS, ValidationError) as error:
        known = settings(RunConfig, run_preset(DEFAULT_PRESET))
        text = one_line(error, known) if isinstance(error, ValidationError) else str(error)
        PlainConsole(stderr=True, soft_wrap=True).print(f"refused: {as_typed(text, known)}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
