"""Time of LipNeXt's forward and backward pass against its own products, and what the bound costs.

    python -m benchmarks.network_step [--width 512] [--depth 16] [--batch 64]
        [--gpu-width 4096] [--gpu-tokens 32768]

On a GPU it adds the block at the size of a large network, in bfloat16 and float32, with and without
its kernels, and the rate at which each kernel moves bytes beside that of a copy.

The certification tax is the share of a training step that an unconstrained network of the same
shape would not pay: the manifold step (with Lookahead, retractions and audits) less Adam's
elementwise update. Peers: `python -m benchmarks.family_liresnet`.
"""

import argparse
import dataclasses
import math

import torch
from torch import Tensor, nn

from benchmarks.manifold_peers import LR, Problem, Work
from benchmarks.optimizer_step import AUDIT, LOOKAHEAD, POLAR, Manifold
from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from model.networks.lipnext import ops
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.lipnext.layers import Block
from model.networks.registry import build_network
from pipeline.losses.emma import EmmaLoss
from pipeline.training.objective import Objective
from pipeline.training.schedules import StepContext

TOKENS = 2048
SIDE = 32  # CIFAR size; patches of 2 leave 16 x 16 tokens
TARGET_PRODUCTS, TARGET_TAX = 1.25, 8.0
CALLS = 20


def _config(width: int, depth: int) -> LipNeXtConfig:
    return LipNeXtConfig(
        input_shape=(3, SIDE, SIDE), num_classes=10, patch=2, width=width, depth=depth
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a block is measured at: (T, C) tokens of a type."""

    width: int
    device: torch.device
    tokens: int = TOKENS
    dtype: torch.dtype = torch.float32

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @property
    def name(self) -> str:
        """For a table."""
        plain = self.dtype == torch.float32 and self.tokens == TOKENS
        kind = "" if plain else f", {str(self.dtype).removeprefix('torch.')}"
        return f"C={self.width}, {self.tokens} tokens{kind}"


def block_pass(setting: Setting, *, plain: bool = False) -> Work:
    """Forward and backward pass of one block, with all gradients.

    Args:
        setting: The size; tokens in multiples of the grid of one image.
        plain: Operator by operator, differentiated by autograd.
    """
    config = _config(setting.width, 1)
    block = Block(config).to(setting.device, setting.dtype)
    block.plain = plain
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    height, breadth = config.grid
    shape = (setting.tokens // (height * breadth), height, breadth, setting.width)
    tokens = setting.normal(*shape).requires_grad_()
    gradient = setting.normal(*shape)

    def run() -> None:
        block(tokens).backward(gradient)

    return run


def block_products(setting: Setting) -> Work:
    """The products of `block_pass`, M R^T folded: six with tokens, three of C x C matrices."""
    normal, width = setting.normal, setting.width
    x, g = normal(setting.tokens, width), normal(setting.tokens, width)
    R, M = (normal(width, width),) * 2

    def run() -> None:
        P = M @ R.mT
        v = x @ R.mT
        _ = v @ P.mT
        dv, dP = g @ P, g.mT @ v
        _, _ = dP @ R, dP.mT @ M
        _, _ = dv @ R, dv.mT @ x

    return run


def network_pass(config: LipNeXtConfig, batch: int, device: torch.device) -> Work:
    """Loss and gradients of a whole network for one batch."""
    network = build_network(config)
    network.initialise(0)
    objective = Objective(network, EmmaLoss()).to(device)
    images = torch.randint(0, 256, (batch, *config.input_shape), dtype=torch.uint8, device=device)
    labels = torch.randint(0, config.num_classes, (batch,), device=device)

    def run() -> None:
        objective(images, labels, StepContext(0, 0.0, 1.0, 0.1))[0].backward()

    return run


def adam_step(problem: Problem) -> Work:
    """Adam's fused elementwise update of as many values."""
    parameters = problem.parameters()
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    return optimizer.step


def tax_rows(width: int, depth: int, batch: int, device: torch.device, repeats: int) -> list[Row]:
    """Parts of a training step, and the share that the bound costs."""
    problem = Problem(width, 2 * depth + 1, device)  # R and M of each block, and the stem
    plain = Manifold(problem)
    polar = Manifold(problem, polar_every=POLAR, lookahead_steps=2 * POLAR)
    audit = Manifold(problem, audit_every=AUDIT)
    synchronising = Manifold(problem, lookahead_steps=LOOKAHEAD)
    work = {
        "forward and backward": network_pass(_config(width, depth), batch, device),
        "Adam": adam_step(problem),
        "manifold": plain.step,
        "Lookahead": synchronising.step_numbers(1, LOOKAHEAD),
        "polar": polar.step_numbers(POLAR, POLAR),
        "audit": audit.step_numbers(AUDIT, AUDIT),
    }
    found = interleaved(work, device, repeats=repeats)
    # The last of them synchronises along the sum of all their increments.
    step = found["Lookahead"] / LOOKAHEAD
    for name, every in (("polar", POLAR), ("audit", AUDIT)):
        step += (found[name] - found["manifold"]) / every
    whole = found["forward and backward"] + step
    parts: dict[str, float] = {
        "forward and backward": found["forward and backward"],
        "manifold step, all included": step,
        "Adam of the same values": found["Adam"],
        "certification tax": step - found["Adam"],
    }
    return [
        {
            "what": f"L{depth}W{width}, batch {batch}: {name}",
            "seconds": seconds,
            "share of the step %": 100 * seconds / whole,
            "target": f"<= {TARGET_TAX:g} %" if name == "certification tax" else "",
        }
        for name, seconds in parts.items()
    ]


def product_rows(setting: Setting, repeats: int) -> list[Row]:
    """One block against its products."""
    work = {
        "products": block_products(setting),
        "pass": block_pass(setting),
        "plain": block_pass(setting, plain=True),
    }
    found = interleaved(work, setting.device, repeats=repeats)
    return [
        {"what": f"block, {setting.name}: its products", "seconds": found["products"]},
        {
            "what": f"block, {setting.name}: forward and backward",
            "seconds": found["pass"],
            "times its products": found["pass"] / found["products"],
            "target": f"<= {TARGET_PRODUCTS:g}",
        },
        {
            "what": f"block, {setting.name}: the same, operator by operator",
            "seconds": found["plain"],
            "times its products": found["plain"] / found["products"],
        },
    ]


def kernel_rows(setting: Setting, repeats: int) -> list[Row]:
    """What the element-wise parts of a block move per second, beside a copy of the tokens."""
    config = _config(setting.width, 1)
    images = setting.tokens // math.prod(config.grid)
    x = setting.normal(images, *config.grid, setting.width)
    rows, other = x.view(-1, setting.width), torch.empty_like(x)
    folded = config.absolute_channels
    signs = torch.ones((len(rows), folded), dtype=torch.int8, device=setting.device)
    moved = 4 * config.shifted_channels / setting.width
    work: dict[str, tuple[Work, float]] = {
        "copy": (lambda: other.copy_(x), 2 * x.nbytes),
        "shift": (lambda: ops.shift_(x, config.shifted_channels), 2 * moved * x.nbytes),
        "shift back": (
            lambda: ops.shift_(x, config.shifted_channels, back=True),
            2 * moved * x.nbytes,
        ),
        "beta-Abs": (
            lambda: ops.fold_(rows, folded, keep=True),
            2 * folded / setting.width * x.nbytes + signs.nbytes,
        ),
        "gradient of beta-Abs and bias": (
            lambda: ops.unfold(rows, signs),
            2 * x.nbytes + signs.nbytes,
        ),
    }

    def often(call: Work) -> Work:
        def run() -> None:  # one call is short beside a synchronisation
            for _ in range(CALLS):
                call()

        return run

    calls = {name: often(call) for name, (call, _) in work.items()}
    found = interleaved(calls, setting.device, repeats=repeats)
    rates = {name: size * CALLS / found[name] for name, (_, size) in work.items()}
    return [
        {
            "what": f"{name}, {setting.name}",
            "seconds": found[name] / CALLS,
            "GB/s": rate / 1e9,
            "share of a copy's rate %": 100 * rate / rates["copy"],
        }
        for name, rate in rates.items()
    ]


def gpu_rows(width: int, tokens: int, device: torch.device, repeats: int) -> list[Row]:
    """The block at the size of a large network and its kernels; `not run` without a GPU."""
    settings = [Setting(width, device, tokens, dtype) for dtype in (torch.bfloat16, torch.float32)]
    if device.type != "cuda":
        return [
            {"what": f"{what}, {setting.name}, on a GPU", "seconds": "not run"}
            for setting in settings
            for what in ("block", "kernels")
        ]
    return [
        row
        for setting in settings
        for row in (*product_rows(setting, repeats), *kernel_rows(setting, repeats))
    ]


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu-width", type=int, default=4096)
    parser.add_argument("--gpu-tokens", type=int, default=128 * 256, help="128 images of 256")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    width, repeats = arguments.width, arguments.repeats
    rows: list[Row] = product_rows(Setting(width, device), 5 * repeats)
    rows += tax_rows(width, arguments.depth, arguments.batch, device, repeats)
    rows += gpu_rows(arguments.gpu_width, arguments.gpu_tokens, device, 5 * repeats)
    write_result(
        "network_step",
        rows,
        [
            f"float32 unless stated, {device}, images of 3 x {SIDE} x {SIDE} in patches of 2 x 2.",
            "Products: six of tokens x C x C, and M R^T with its two gradients.",
            "Operator by operator: rolled, joined and differentiated by autograd.",
            "Manifold step: the ordinary one, and the surplus of those that synchronise Lookahead, "
            f"retract or audit, divided by {LOOKAHEAD}, {POLAR} and {AUDIT}.",
        ],
    )


if __name__ == "__main__":
    main()
