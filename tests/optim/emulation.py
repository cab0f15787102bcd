"""ZeRO-3's flat layout without DeepSpeed: partitions with NaN padding, seeded matrices, digests."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optim.collectives import Exchange
from optim.config import OptimConfig
from optim.manifolds import ORTHOGONAL, declare, is_trivialized, manifold_of
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from optim.zero3_adam import ShardedManifoldAdam
from optim.zero_layout import ROUND_ELEMENTS, FlatPartition, Slot


@dataclass(frozen=True)
class Problem:
    """Matrices of the given sizes, two Euclidean parameters, and how the sub-groups are cut."""

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    matrices_per_group: int = 1000
    steps: int = 20
    lr: float = 0.02
    lookahead_steps: int = 7
    polar_every: int = 5
    audit_every: int = 4
    euclidean: str = "nadam"
    round_elements: int = ROUND_ELEMENTS
    increment: str = "full"
    retraction: str = "exp"
    gradient: str = "ambient"
    """Or "trivialized", of all matrices but the first: the gradients below are X^T G then."""
    overlap: bool = True

    @property
    def config(self) -> OptimConfig:
        return OptimConfig(
            lr=self.lr,
            euclidean_lr_factor=0.5,
            eps=1e-6,
            weight_decay=0.01,
            euclidean=self.euclidean,
            lookahead_steps=self.lookahead_steps,
            polar_every=self.polar_every,
            audit_every=self.audit_every,
            increment=self.increment,
            retraction=self.retraction,
            gradient=self.gradient,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        named = {}
        for i, n in enumerate(self.sizes):
            matrix = nn.Parameter(initial(f"matrix{i}", (n, n)))
            named[f"matrix{i}"] = declare(matrix, ORTHOGONAL, trivializes=i > 0)
        for name, shape in (("bias", (7,)), ("head", (3, 5))):
            named[name] = nn.Parameter(initial(name, shape))
        for parameter in named.values():
            parameter.data = parameter.data.to(self.dtype)
        return named

    def lr_at(self, step: int, base: float) -> float:
        return base * (1.0 + math.cos(math.pi * step / self.steps)) / 2


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    if len(shape) == 2 and shape[0] == shape[1]:
        return ORTHOGONAL.random(shape, generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradient(name: str, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A gradient that does not depend on the parameters, so that rounding does not feed back."""
    generator = torch.Generator().manual_seed(1000 * sum(name.encode()) + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run_reference(problem: Problem) -> tuple[dict[str, nn.Parameter], ReferenceManifoldAdam]:
    named = problem.parameters()
    optimizer = ReferenceManifoldAdam(
        parameter_groups(named.items(), problem.config), problem.config
    )
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(problem.steps):
        for name, parameter in named.items():
            parameter.grad = gradient(name, step, tuple(parameter.shape), problem.dtype)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = problem.lr_at(step, lr)
        optimizer.step()
    return named, optimizer


def cut_slots(named: dict[str, nn.Parameter], world_size: int) -> tuple[Slot, ...]:
    slots, offset = [], 0
    for name, parameter in named.items():
        length = -(-parameter.numel() // world_size)
        sizes = tuple(parameter.shape), parameter.numel(), offset, length
        slots.append(Slot(name, *sizes, trivialized=is_trivialized(parameter)))
        offset += length
    return tuple(slots)


def fill(flat: Tensor, slot: Slot, rank: int, whole: Tensor) -> None:
    """This rank's slice of a whole parameter; the padding becomes NaN."""
    piece = whole.reshape(-1)[rank * slot.length : (rank + 1) * slot.length]
    flat[slot.offset : slot.stop] = math.nan
    flat[slot.offset : slot.offset + len(piece)] = piece


class Emulation:
    """A bound ShardedManifoldAdam on the flat partitions of one rank."""

    def __init__(self, problem: Problem, exchange: Exchange) -> None:
        self.problem, self.exchange = problem, exchange
        named = problem.parameters()
        groups = parameter_groups(named.items(), problem.config)
        self.optimizer = ShardedManifoldAdam(
            groups,
            problem.config,
            round_elements=problem.round_elements,
            overlap=problem.overlap,
        )
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.published: list[int] = []
        self.partitions: list[FlatPartition] = []
        for group in self.optimizer.param_groups:
            group["params"] = []
            names = group["names"]
            size = problem.matrices_per_group
            for first in range(0, len(names), size):
                part = {name: named[name] for name in names[first : first + size]}
                partition = self._partition(part, len(self.partitions), group["manifold"])
                self.partitions.append(partition)
        self.optimizer.bind(
            self.partitions,
            exchange,
            expected_matrices=[name for name in named if manifold_of(named[name])],
        )
        self.optimizer.initialise(lambda slot: initial(slot.name, slot.shape))

    def _partition(self, named, number, manifold):
        slots = cut_slots(named, self.exchange.world_size)
        flat = torch.full((slots[-1].stop,), math.nan, dtype=self.problem.dtype)
        return FlatPartition(flat, slots, manifold, lambda: self.published.append(number))

    def poison_padding(self) -> None:
        for partition in self.partitions:
            for slot in partition.slots:
                held = slot.numel - self.exchange.rank * slot.length
                if held < slot.length:
                    partition.flat[slot.offset + max(held, 0) : slot.stop] = math.nan

    def scale(self, name: str, factor: float, kind: str = "master") -> None:
        """Multiply this rank's slice of one parameter."""
        for found, partition, flat in self.optimizer.partitioned_state():
            for slot in partition.slots:
                if (found, slot.name) == (kind, name):
                    flat[slot.offset : slot.stop] *= factor

    def step(self, number: int) -> None:
        """One iteration as DeepSpeed runs it: one call of step() per sub-group."""
        for partition in self.partitions:
            flat = partition.flat
            flat.grad = torch.zeros_like(flat)
            for slot in partition.slots:
                whole = gradient(slot.name, number, slot.shape, flat.dtype)
                fill(flat.grad, slot, self.exchange.rank, whole)
            on_manifold = partition.manifold is not None
            for group, lr in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = self.problem.lr_at(number, lr)
                if (group["manifold"] is not None) == on_manifold:
                    group["params"] = [flat]
            self.optimizer.step()
            for group in self.optimizer.param_groups:
                group["params"] = []
            flat.grad = None

    def run(self, first: int = 0, last: int | None = None) -> None:
        for number in range(first, self.problem.steps if last is None else last):
            self.step(number)
            self.poison_padding()

    def whole(self, kind: str = "master") -> dict[str, Tensor]:
        """All parameters of one kind, assembled on rank 0 (empty elsewhere)."""
        values = {}
        for found, partition, flat in self.optimizer.partitioned_state():
            if found != kind:
                continue
            for slot in partition.slots:
                whole = self.exchange.gather(flat[slot.offset : slot.stop].clone())
                if whole is not None:
                    values[slot.name] = whole[: slot.numel].view(slot.shape)
        return values


def digest(values: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(values):
        sha.update(values[name].contiguous().numpy().tobytes())
    return sha.hexdigest()
