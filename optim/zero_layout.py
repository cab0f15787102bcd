"""ZeRO-3's flat layout in integers: where parameters lie, and which rank owns which one when.

One sub-group of DeepSpeed ZeRO-3 is a flat tensor on each rank. It is the concatenation of one
slice per parameter: of a row-major parameter with `numel` elements, rank r holds elements
`[r * length, min((r + 1) * length, numel))`. The last ranks fill up with padding, whose content
is undefined and may be NaN.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from optim.errors import OptimizerError
from optim.manifolds import Manifold


@dataclass(frozen=True)
class Slot:
    """One parameter inside one rank's flat partition."""

    name: str
    """Name of the parameter in the model."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    numel: int
    """Elements of the whole parameter."""
    offset: int
    """First element of the slice in the flat tensor."""
    length: int
    """Elements of the slice including padding; the same on every rank."""
    trivialized: bool = False
    """Whether its gradient is X^T G (`optim.manifolds.is_trivialized`)."""

    @property
    def stop(self) -> int:
        """End of the slice in the flat tensor."""
        return self.offset + self.length


@dataclass(frozen=True, eq=False)
class FlatPartition:
    """This rank's fp32 master of one ZeRO sub-group."""

    flat: Tensor
    """1-D master tensor, float32 (float64 in tests)."""
    slots: tuple[Slot, ...]
    """The parameters, contiguous and in order."""
    manifold: Manifold | None
    """Manifold of all of the slots; None means Euclidean."""
    publish: Callable[[], None]
    """Copies the master to the model's working parameters after a change outside `step`."""


@dataclass(frozen=True)
class Round:
    """Consecutive slots, distributed over owners: rank i assembles the whole parameters `owned[i]`.

    A round is one contiguous range of the flat tensor, so it is exchanged without packing.
    """

    owned: tuple[tuple[Slot, ...], ...]
    """Per rank the slots that it owns, in order; some ranks may own none."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots of the round in the order of the flat tensor."""
        return tuple(slot for slots in self.owned for slot in slots)

    @property
    def start(self) -> int:
        """First element of the round in the flat tensor."""
        return self.slots[0].offset

    @property
    def stop(self) -> int:
        """End of the round in the flat tensor."""
        return self.slots[-1].stop

    def slice_lengths(self) -> list[int]:
        """Elements that any rank sends to each owner; equally, gets back from each."""
        return [sum(slot.length for slot in slots) for slots in self.owned]

    def whole_lengths(self, rank: int) -> list[int]:
        """Elements that `rank` as an owner receives from each rank; equally, sends back."""
        return [self.slice_lengths()[rank]] * len(self.owned)


ROUND_ELEMENTS = 1 << 22
"""Most elements an owner assembles in one exchange, unless a single parameter is larger.

16 MiB in float32: small parameters share an exchange, whose latency then hardly counts; a large
matrix travels alone, so that the memory of a step does not grow with the network.
"""


CONCURRENT_ELEMENTS = 1 << 28
"""Most elements of the matrices of an owner whose moves are decided together, unless a single round
has more.

An owner holds each with its increment and up to two powers of it: 4 GiB in float32. One wait of the
host serves so many: all of LipNeXt-1B's on 8 ranks, 16 matrices of 4096 x 4096 on one.
"""


def plan_rounds(
    slots: tuple[Slot, ...], world_size: int, *, elements: int = ROUND_ELEMENTS
) -> list[Round]:
    """Cut consecutive slots into rounds and give each rank an equal share of every round.

    Args:
        slots: The slots of one partition, contiguous.
        world_size: Number of ranks.
        elements: See ROUND_ELEMENTS.

    Returns:
        Rounds of at most k * world_size slots, with k = max(1, elements // largest parameter);
        owners' shares of a round differ by at most one slot.
    """
    if world_size < 1:
        raise OptimizerError(f"world size must be at least 1, got {world_size}")
    if not slots:
        return []
    # By the largest, so that no owner exceeds `elements` whatever it is given.
    size = world_size * max(1, elements // max(slot.numel for slot in slots))
    rounds = []
    for first in range(0, len(slots), size):
        part = slots[first : first + size]
        # Of the shapes and the number of ranks alone: all ranks cut alike without a word.
        cuts = [rank * len(part) // world_size for rank in range(world_size + 1)]
        rounds.append(Round(tuple(part[a:b] for a, b in pairwise(cuts))))
    return rounds


def concurrent_rounds(rounds: Sequence[Round]) -> list[list[Round]]:
    """Cut rounds into those that are under way at the same time: see CONCURRENT_ELEMENTS."""
    found: list[list[Round]] = []
    held = 0
    for plan in rounds:
        elements = max(sum(slot.numel for slot in slots) for slots in plan.owned)
        held += elements
        if not found or held > CONCURRENT_ELEMENTS:
            found.append([])
            held = elements
        found[-1].append(plan)
    return found


def check_partition(partition: FlatPartition, world_size: int) -> None:
    """Refuse a partition that is not in ZeRO-3's layout for `world_size` ranks.

    Raises:
        OptimizerError: Wrong dtype or shape of the master, a gap between slots, a slot that is not
            partitioned over all ranks, or a matrix that cannot live on the manifold.
    """
    flat = partition.flat
    if flat.dtype not in (torch.float32, torch.float64):
        raise OptimizerError(
            f"flat master of {_names(partition)} is {flat.dtype}, needs float32: "
            "bf16 masters lose the update"
        )
    if flat.ndim != 1 or not flat.is_contiguous():
        raise OptimizerError(f"flat master of {_names(partition)} is not a contiguous 1-D tensor")
    end = 0
    for slot in partition.slots:
        if slot.numel != math.prod(slot.shape) or slot.offset != end:
            raise OptimizerError(
                f"slot {slot} does not fit: expected offset {end}, numel {math.prod(slot.shape)}"
            )
        # Rounded up: ZeRO pads the last slice.
        expected = -(-slot.numel // world_size)
        if slot.length != expected:
            raise OptimizerError(
                f"parameter {slot.name!r} of {slot.numel} elements is not partitioned over "
                f"{world_size} ranks: this rank holds {slot.length} elements, expected {expected}"
            )
        if partition.manifold is not None:
            try:
                partition.manifold.check_shape(slot.shape)
            except OptimizerError as error:
                raise OptimizerError(f"parameter {slot.name!r}: {error}") from error
        end = slot.stop
    if end != flat.numel():
        raise OptimizerError(
            f"slots of {_names(partition)} cover {end} elements of a flat of {flat.numel()}"
        )


def check_expected(partitions: list[FlatPartition], expected_matrices: list[str]) -> list[Slot]:
    """The slots of all manifold matrices, in order, if each expected one is claimed exactly once.

    Raises:
        OptimizerError: A matrix is missing, unexpected or claimed twice (each is named).
    """
    slots = list(_manifold_slots(partitions))
    claimed = [slot.name for slot in slots]
    problems = {
        "missing": sorted(set(expected_matrices) - set(claimed)),
        "unexpected": sorted(set(claimed) - set(expected_matrices)),
        "claimed twice": sorted({name for name in claimed if claimed.count(name) > 1}),
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise OptimizerError(
            f"of {len(expected_matrices)} expected manifold matrices {len(claimed)} are claimed; "
            f"{text}"
        )
    return slots


def _manifold_slots(partitions: list[FlatPartition]) -> Iterator[Slot]:
    for partition in partitions:
        if partition.manifold is not None:
            yield from partition.slots


def _names(partition: FlatPartition) -> str:
    names = [slot.name for slot in partition.slots]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
