"""The planner's time beside published measurements: `python -m benchmarks.plan`.

The layers of the networks that were measured are built on the meta device, counted as the planner
counts those of this project, and timed by the same function with the same assumptions. No number
below was chosen for a row.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import Row, write_result
from pipeline.planner.memory import Traffic
from pipeline.planner.meta_pass import MovedBytes
from pipeline.planner.step_time import MEMORY_SHARE, NODE, StepTime, device_of, step_time

FOUNDRY = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
TITAN = "github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md"
_ADAM_BYTES = 32
"""Read and written per element that a rank steps: gradient, weight, two moments, the copy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
    """A decoder with full attention.

    Attributes:
        width: of the residual stream.
        layers: blocks.
        hidden: of the perceptron.
        vocabulary: rows of the embedding.
        keys: width of keys and of values.
        gated: SwiGLU and RMSNorm with an own output matrix; else GELU, LayerNorm and a tied one.
    """

    width: int
    layers: int
    hidden: int
    vocabulary: int
    keys: int
    gated: bool = False

    @property
    def parameters(self) -> int:
        """Matrices and the embedding."""
        block = (2 * self.width + 2 * self.keys) * self.width
        block += (3 if self.gated else 2) * self.width * self.hidden
        return self.layers * block + (1 + self.gated) * self.vocabulary * self.width


def _mpt(width: int, layers: int) -> Transformer:
    return Transformer(width=width, layers=layers, hidden=4 * width, vocabulary=50368, keys=width)


NETWORKS = {
    "MPT 1b": _mpt(2048, 24),
    "MPT 3b": _mpt(2560, 32),
    "MPT 7b": _mpt(4096, 32),
    "MPT 13b": _mpt(5120, 40),
    "MPT 30b": _mpt(7168, 48),
    "Llama 3.1 8B": Transformer(
        width=4096, layers=32, hidden=14336, vocabulary=128256, keys=1024, gated=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A measurement.

    Attributes:
        network: of NETWORKS.
        devices: H100, eight a node, an adapter of 400 Gbit/s each.
        micro_batch: sequences per device and pass.
        passes: per step.
        length: tokens of a sequence.
        rate: tokens per second and device, as published.
        recomputed: share of the products of blocks, attention left out, that the backward pass
            recomputes; from 1 on attention as well.
        regathered: whether weights are gathered for the backward pass as well.
        memory_gbps: 10^9 bytes per second of the devices' memory; 0: of the data sheet.
        source: where it was published.
    """

    network: str
    devices: int
    micro_batch: int
    passes: int
    length: int
    rate: float
    recomputed: float = 0.0
    regathered: bool = True
    memory_gbps: float = 0.0
    source: str = FOUNDRY

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.micro_batch * self.passes * self.length / self.rate


PUBLISHED = (
    Published("MPT 1b", 8, 14, 1, 2048, 45455),
    Published("MPT 1b", 64, 20, 1, 2048, 44402),
    Published("MPT 1b", 512, 12, 1, 2048, 39837, regathered=False),
    Published("MPT 3b", 16, 10, 3, 2048, 24142),
    Published("MPT 3b", 64, 6, 3, 2048, 22525),
    Published("MPT 3b", 512, 8, 1, 2048, 21664, regathered=False),
    Published("MPT 7b", 8, 6, 1, 2048, 10643),
    Published("MPT 7b", 128, 6, 1, 2048, 10475),
    Published("MPT 7b", 512, 6, 1, 2048, 9670),
    Published("MPT 13b", 8, 2, 1, 2048, 4792),
    Published("MPT 13b", 64, 2, 1, 2048, 4800),
    Published("MPT 13b", 512, 16, 1, 2048, 4952, recomputed=1.0),
    Published("MPT 30b", 128, 8, 1, 2048, 2199, recomputed=1.0),
    Published("MPT 30b", 512, 8, 1, 2048, 2115, recomputed=1.0),
    Published("Llama 3.1 8B", 8, 2, 1, 8192, 5762, 0.5, memory_gbps=2400, source=TITAN),
    Published("Llama 3.1 8B", 128, 2, 1, 8192, 5605, 0.5, memory_gbps=2400, source=TITAN),
)


class _Block(nn.Module):
    def __init__(self, kind: Transformer) -> None:
        super().__init__()
        width, keys = kind.width, kind.keys
        norm: Callable[[int], nn.Module] = nn.RMSNorm if kind.gated else nn.LayerNorm
        self.kind = kind
        self.before, self.after = norm(width), norm(width)
        self.projections = nn.Linear(width, width + 2 * keys, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, (1 + kind.gated) * kind.hidden, bias=False)
        self.down = nn.Linear(kind.hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.kind.width, self.kind.keys, self.kind.keys]
        q, k, v = self.projections(self.before(x)).split(sizes, -1)
        groups = self.kind.width // self.kind.keys
        # Element-wise in the place of attention: what it reads and writes, without its products.
        x = x + self.out(q + k.repeat(1, 1, groups) + v.repeat(1, 1, groups))
        h = self.up(self.after(x))
        if self.kind.gated:
            gate, h = h.chunk(2, -1)
            return x + self.down(F.silu(gate) * h)
        return x + self.down(F.gelu(h))


def counted(kind: Transformer, row: Published) -> tuple[float, float]:
    """FLOPs and bytes moved by one pass of one device; embedding, loss and optimizer included.

    Attention is counted by formula and without its mask, as published shares of peak are: 4 n^2
    products of a sequence of n and each channel forward, five halves of that backward.
    """
    with torch.device("meta"):
        block = _Block(kind).to(torch.bfloat16)
        head = torch.empty(kind.vocabulary, kind.width, dtype=torch.bfloat16, requires_grad=True)
        tokens = torch.zeros(row.micro_batch, row.length, dtype=torch.int64)
        x = torch.empty(*tokens.shape, kind.width, dtype=torch.bfloat16, requires_grad=True)
    with torch.device("meta"), FlopCounterMode(display=False) as flops, MovedBytes() as moved:
        if row.recomputed:
            y = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = block(x)
        y.backward(torch.empty_like(y))
    with torch.device("meta"), FlopCounterMode(display=False) as last, MovedBytes() as ends:
        logits = (x @ head.mT).float()
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        F.embedding(tokens, head).backward(x.detach())
    attention = 4 * row.micro_batch * row.length**2 * kind.width
    saved = (1 - row.recomputed) * _forward_products(kind, row) if row.recomputed else 0.0
    passes = 3.5 + (row.recomputed >= 1)
    stepped = _ADAM_BYTES * kind.parameters / row.devices / row.passes
    return (
        kind.layers * (flops.get_total_flops() - saved + passes * attention)
        + last.get_total_flops(),
        kind.layers * moved.moved + ends.moved + stepped,
    )


def _forward_products(kind: Transformer, row: Published) -> float:
    """FLOPs of one block's matrices in the forward pass of one device."""
    ends = (1 + kind.gated) * kind.vocabulary * kind.width
    per_token = 2 * (kind.parameters - ends) / kind.layers
    return per_token * row.micro_batch * row.length


def planned(row: Published) -> StepTime:
    """What the planner makes of the same layers."""
    kind = NETWORKS[row.network]
    flops, moved = counted(kind, row)
    elements, share = kind.parameters, (row.devices - 1) / row.devices
    gathered = int(2 * elements * share * row.passes)
    device = device_of("H100", precision="bf16", nodes=-(-row.devices // NODE))
    if row.memory_gbps:
        device = dataclasses.replace(device, memory_gbps=MEMORY_SHARE * row.memory_gbps)
    return step_time(
        device,
        pass_flops=row.passes * flops,
        pass_bytes=row.passes * moved,
        manifold_flops=0.0,
        manifold_bytes=0.0,
        sent=Traffic(
            forward=gathered,
            backward=gathered * row.regathered,
            reduce=int(4 * elements * share * row.passes),
            manifold=0,
            rounds=0,
            gathers=row.passes * kind.layers * (2 + row.regathered),
        ),
        rank_images=0,
        decoders=1,
    )


def rows() -> list[Row]:
    """One for each measurement."""
    found: list[Row] = []
    for row in PUBLISHED:
        time = planned(row)
        found.append(
            {
                "what": f"{row.network}, {row.devices} H100, {row.passes} x {row.micro_batch} x "
                f"{row.length} tokens"
                + (f", {row.recomputed:.0%} recomputed" if row.recomputed else ""),
                "published s": row.seconds,
                "planned s": time.total,
                "planned / published": time.total / row.seconds,
                "products": time.products,
                "ZeRO-3": time.zero3,
                "target": "0.8 to 1.2",
            }
        )
    return found


def main() -> None:
    """Compute and write benchmarks/results/plan.md."""
    write_result(
        "plan",
        rows(),
        [
            "Nothing was measured here: published seconds per step beside the planner's.",
            f"MPT: {FOUNDRY}, commit 8c8dd48 (tokens per second and device; weights of bf16 are "
            "gathered, gradients reduced in float32).",
            f"Llama: {TITAN} (FSDP without compilation; these H100 have 2.4 TB/s and 500 W, the "
            "second of which is not in the planned time; every second product is recomputed).",
            "Attention is counted without its mask, as the published shares of peak are.",
        ],
    )


if __name__ == "__main__":
    main()
