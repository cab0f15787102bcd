"""Time of LipNeXt's forward and backward pass against its own products, and what the bound costs.

    python -m benchmarks.network_step [--width 512] [--depth 16] [--batch 64]

The certification tax is the share of a training step that an unconstrained network of the same
shape would not pay: the manifold step (with Lookahead, retractions and audits) less Adam's
elementwise update. Peers: `python -m benchmarks.family_liresnet`.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optimizer_step import AUDIT, LOOKAHEAD, LR, POLAR, Manifold, Problem, Work
from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from model.build import build_network
from model.config import LipNeXtConfig
from model.layers import Block
from pipeline.config import LossConfig
from pipeline.objective import Objective
from pipeline.schedules import Moment

TOKENS = 2048
SIDE = 32  # CIFAR size; patches of 2 leave 16 x 16 tokens
TARGET_PRODUCTS, TARGET_TAX = 1.25, 8.0


def _config(width: int, depth: int) -> LipNeXtConfig:
    return LipNeXtConfig(
        input_shape=(3, SIDE, SIDE), num_classes=10, patch=2, width=width, depth=depth
    )


def block_pass(width: int, device: torch.device) -> Work:
    """Forward and backward pass of one block over `TOKENS` tokens, with all gradients."""
    config = _config(width, 1)
    block = Block(config).to(device)
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    height, breadth = config.grid
    shape = (TOKENS // (height * breadth), height, breadth, width)
    tokens = torch.randn(shape, device=device, requires_grad=True)
    gradient = torch.randn(shape, device=device)

    def run() -> None:
        block(tokens).backward(gradient)

    return run


def block_products(width: int, device: torch.device) -> Work:
    """The products of `block_pass`, M R^T folded: six with tokens, three of C x C matrices."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    x, g, R, M = normal(TOKENS, width), normal(TOKENS, width), *(normal(width, width),) * 2

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
    objective = Objective(network, LossConfig()).to(device)
    images = torch.randint(0, 256, (batch, *config.input_shape), dtype=torch.uint8, device=device)
    labels = torch.randint(0, config.num_classes, (batch,), device=device)

    def run() -> None:
        objective(images, labels, Moment(0, 0.0, 1.0, 0.1))[0].backward()

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
        "Lookahead": synchronising.step_number(LOOKAHEAD),
        "polar": polar.step_number(POLAR),
        "audit": audit.step_number(AUDIT),
    }
    found = interleaved(work, device, repeats=repeats)
    step = found["manifold"]
    for name, every in (("Lookahead", LOOKAHEAD), ("polar", POLAR), ("audit", AUDIT)):
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


def product_rows(width: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One block against its products."""
    work = {
        "products": block_products(width, device),
        "pass": block_pass(width, device),
    }
    found = interleaved(work, device, repeats=repeats)
    return [
        {"what": f"block, C={width}, {TOKENS} tokens: its products", "seconds": found["products"]},
        {
            "what": f"block, C={width}, {TOKENS} tokens: forward and backward",
            "seconds": found["pass"],
            "times its products": found["pass"] / found["products"],
            "target": f"<= {TARGET_PRODUCTS:g}",
        },
    ]


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    width, repeats = arguments.width, arguments.repeats
    rows: list[Row] = [*product_rows(width, device, 5 * repeats)]
    rows += tax_rows(width, arguments.depth, arguments.batch, device, repeats)
    write_result(
        "network_step",
        rows,
        [
            f"float32, {device}, images of 3 x {SIDE} x {SIDE} in patches of 2 x 2.",
            "Products: six of tokens x C x C, and M R^T with its two gradients.",
            "Manifold step: the ordinary one, and the surplus of those that synchronise Lookahead, "
            f"retract or audit, divided by {LOOKAHEAD}, {POLAR} and {AUDIT}.",
        ],
    )


if __name__ == "__main__":
    main()
