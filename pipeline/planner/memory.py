"""Bytes of a run by component: integers in, integers out.

Memory of one rank under ZeRO-3 with the sharded manifold optimizer, what it sends per step, and the
size of a checkpoint. Only large tensors count: a matrix, its share, a bucket, the activations. The
allocator's own loss and the context of the device come on top (`RESERVE`).
"""

import dataclasses
from collections.abc import Sequence

from optim.zero_layout import Round, Slot, concurrent_rounds, plan_rounds

RESERVE = 0.08
"""Share of a device's memory that is left to its context, the collectives' own buffers and what an
allocator cannot use."""

ALWAYS = "always"
PASSES = "forward and backward"
STEP = "optimizer step"
EXPORT = "export"

_SERIES = 5
"""Matrices that the exponential's series works on, its result left out: D^2, the sum, two terms and
their mixture. Tangents, the fast retraction, polar projections and audits work on fewer."""
_ROUNDED = 6
"""Matrices more where the factors of products are rounded and a product is split: what is left of
each, their rounded parts, one while it is made, and the sum so far."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters of a network, in elements, in the order of the network.

    Attributes:
        matrices: of each matrix on the manifold.
        others: of each other parameter.
        block: of the module that owns most.
    """

    matrices: tuple[int, ...]
    others: tuple[int, ...]
    block: int

    @property
    def total(self) -> int:
        """All elements."""
        return sum(self.matrices) + sum(self.others)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What decides the memory of a rank beside the network.

    Attributes:
        ranks: W.
        working: bytes of an element of the working weights: 2 or 4.
        lookahead: whether there is a slow copy.
        rounds_factors: whether products of the manifold step round their factors.
        nadam: whether Euclidean parameters are updated by NAdam.
        sub_group: elements of one optimizer sub-group, of all ranks' partitions of one rank.
        bucket: elements of one gradient reduction.
        prefetch: elements gathered ahead of use.
        live: gathered elements that a rank keeps.
        interleaved: whether rounds of the manifold step are under way together: those of several
            ranks, and on a GPU.
        persist_below: elements below which a parameter is whole during a step.
    """

    ranks: int
    working: int
    lookahead: bool
    rounds_factors: bool
    nadam: bool
    sub_group: int
    bucket: int
    prefetch: int
    live: int
    interleaved: bool
    persist_below: int


_PEER_BYTES = 2_000_000
"""NCCL's buffers for another rank of an all-to-all; assumed, half of one of its 4 MiB buffers."""


def collective_buffers(ranks: int) -> int:
    """Bytes of a device that collectives keep for themselves; they grow with the ranks."""
    return _PEER_BYTES * (ranks - 1)


def room(memory: int, ranks: int) -> int:
    """Bytes of a device's memory that a run of so many ranks may fill."""
    return int(memory * (1 - RESERVE)) - collective_buffers(ranks)


@dataclasses.dataclass(frozen=True)
class Component:
    """One row of the table.

    Attributes:
        name: what it is.
        phase: when it exists.
        size: bytes.
    """

    name: str
    phase: str
    size: int


def share(elements: int, ranks: int) -> int:
    """Elements of a parameter that a rank holds, padding included."""
    return -(-elements // ranks)


def shares(parameters: Sequence[int], ranks: int) -> int:
    """The same of several parameters."""
    return sum(share(elements, ranks) for elements in parameters)


def persistent(weights: Weights, setting: Setting) -> list[Component]:
    """What a rank holds from the first step to the last."""
    matrices = shares(weights.matrices, setting.ranks)
    partition = matrices + shares(weights.others, setting.ranks)
    rows = [
        (f"working weights ({8 * setting.working} bit)", setting.working * partition),
        ("masters (fp32)", 4 * partition),
        ("exp_avg", 4 * partition),
        ("exp_avg_sq", 4 * partition),
    ]
    if setting.lookahead:
        rows += [("slow", 4 * partition), ("tangent_sum", 4 * matrices)]
    rows += [
        ("gradient sums (fp32)", 4 * partition),
        ("reduction bucket (fp32)", 4 * setting.bucket),
    ]
    return [Component(name, ALWAYS, size) for name, size in rows]


def _whole(weights: Weights, setting: Setting) -> list[int]:
    """The parameters that are gathered once, when a step begins."""
    return [n for n in (*weights.matrices, *weights.others) if n < setting.persist_below]


def passes(weights: Weights, setting: Setting, *, activations: int, pinned: int) -> list[Component]:
    """What the forward and backward pass of one micro-batch adds at its peak.

    The copy of the first full bucket meets what is left of the activations by then; the larger of
    the two moments counts.

    Args:
        weights: the network.
        setting: the rank.
        activations: bytes of `MetaPass.activation_bytes`.
        pinned: bytes of `MetaPass.pinned_weight_bytes`.
    """
    # A single rank uses its partition as it lies.
    many = setting.ranks > 1
    whole = sum(_whole(weights, setting))
    gathered = many * min(weights.total, setting.live + whole)
    ahead = many * min(weights.total - whole, setting.prefetch)
    pinned = many * min(pinned, setting.working * (weights.total - gathered))
    bucket = min(weights.total, setting.bucket)
    left = activations * (weights.total - bucket) // weights.total
    return [
        Component("gathered weights", PASSES, setting.working * gathered),
        Component("gathered ahead", PASSES, setting.working * ahead),
        Component("gathered weights that saved views hold", PASSES, pinned),
        Component("activations", PASSES, max(activations, left + 4 * bucket)),
    ]


def optimizer_step(weights: Weights, setting: Setting) -> list[Component]:
    """What the step of the sub-group that needs most adds at its peak, on the rank that does."""
    matrices = _sub_groups(weights.matrices, setting)
    candidates = [_manifold_step(group, setting) for group in matrices]
    for group in _sub_groups(weights.others, setting):
        flat = 4 * shares(group, setting.ranks)
        work = (3 if setting.nadam else 1) * flat
        candidates.append([("gradient of a sub-group", flat), ("increments", work)])
    rows = max(candidates, key=lambda rows: sum(size for _, size in rows))
    return [Component(name, STEP, size) for name, size in rows]


def _manifold_step(group: tuple[int, ...], setting: Setting) -> list[tuple[str, int]]:
    """Rows of one sub-group of matrices (optim/manifold_step.py, ManifoldStep.update)."""
    owned, cut, largest, together = _rounds(group, setting)
    series = _SERIES + _ROUNDED * setting.rounds_factors
    if setting.interleaved:  # D, D^2 and a term of all, and X of what lies on several ranks
        powers, held = (3 + (setting.ranks > 1)) * together, (series - 2) * largest
    else:  # what has moved, and D; all else is seen as it lies in flat tensors
        powers, held = owned + cut, (series - 1) * largest
    return [
        ("gradient of a sub-group", 4 * shares(group, setting.ranks)),
        ("matrices that move together, at their owner", 4 * powers),
        ("what one of them is worked on with", 4 * held),
    ]


def export(weights: Weights, setting: Setting) -> list[Component]:
    """What the float64 projection of the exported weights adds."""
    groups = _sub_groups(weights.matrices, setting)
    if not groups:
        return [Component("one parameter in float64", EXPORT, 8 * max(weights.others))]
    rounds = (_rounds(group, setting) for group in groups)
    owned, cut, largest, _ = max(rounds, key=lambda found: sum(found[:3]))
    sources = 4 * (2 if setting.lookahead else 1) * owned
    # The last matrix is worked on, or all of them are on their way back.
    working = 8 * (owned - largest) + 8 * (_SERIES + 3) * largest
    leaving = 8 * owned + 4 * owned * (setting.ranks > 1) + 4 * cut
    return [
        Component("matrices of a round at their owner (slow copy, tangent sum)", EXPORT, sources),
        Component("their averages in float64", EXPORT, max(working, leaving)),
    ]


def _sub_groups(parameters: tuple[int, ...], setting: Setting) -> list[tuple[int, ...]]:
    """Cut as DeepSpeed does: after the parameter that fills a sub-group of one rank's shares."""
    groups: list[tuple[int, ...]] = []
    current: list[int] = []
    for elements in parameters:
        current.append(elements)
        if shares(current, setting.ranks) >= setting.sub_group:
            groups.append(tuple(current))
            current = []
    return [*groups, tuple(current)] if current else groups


def _rounds(group: tuple[int, ...], setting: Setting) -> tuple[int, int, int, int]:
    """Of the largest round: elements that an owner assembles, a rank's slice, the largest matrix.

    The last figure: elements that an owner assembles of the rounds that are under way together.
    """
    slots, offset = [], 0
    for number, elements in enumerate(group):
        length = share(elements, setting.ranks)
        slots.append(Slot(str(number), (elements,), elements, offset, length))
        offset += length
    rounds = plan_rounds(tuple(slots), setting.ranks)

    def assembled(plan: Round) -> int:
        return max(setting.ranks * sum(slot.length for slot in slots) for slots in plan.owned)

    together = max(sum(map(assembled, some)) for some in concurrent_rounds(rounds))
    return (
        max(map(assembled, rounds)),
        max(r.stop - r.start for r in rounds),
        max(group),
        together,
    )


def peak(components: Sequence[Component]) -> int:
    """Most bytes at one time: what is always there and the largest phase."""
    phases = {row.phase for row in components} - {ALWAYS}
    return phase_size(components, ALWAYS) + max(phase_size(components, p) for p in phases)


def phase_size(components: Sequence[Component], phase: str) -> int:
    """Bytes of one phase."""
    return sum(row.size for row in components if row.phase == phase)


def largest(components: Sequence[Component]) -> Component:
    """The largest component of those that exist at the peak."""
    phases = {row.phase for row in components} - {ALWAYS}
    worst = max(phases, key=lambda phase: phase_size(components, phase))
    return max(
        (row for row in components if row.phase in (ALWAYS, worst)), key=lambda row: row.size
    )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends to others, per optimizer step.

    Attributes:
        forward: all-gathers of the forward passes.
        backward: all-gathers of the backward passes.
        reduce: reduce-scatters of the gradients.
        manifold: all-to-alls of the manifold step, Lookahead and retractions averaged in.
        rounds: rounds of the manifold step, of five collectives each.
        gathers: all-gathers and reduce-scatters, in number.
    """

    forward: int
    backward: int
    reduce: int
    manifold: int
    rounds: int
    gathers: int

    @property
    def zero3(self) -> int:
        """Bytes that overlap with the passes."""
        return self.forward + self.backward + self.reduce


def traffic(
    weights: Weights,
    setting: Setting,
    *,
    accumulation: int,
    lookahead_steps: int,
    polar_every: int,
) -> Traffic:
    """See Traffic.

    Args:
        weights: the network.
        setting: the rank.
        accumulation: passes per step.
        lookahead_steps: steps between two synchronisations, 0: none.
        polar_every: steps between two retractions, 0: none.
    """
    ranks = setting.ranks
    whole = ranks * (shares(weights.matrices, ranks) + shares(weights.others, ranks))
    once = ranks * shares(_whole(weights, setting), ranks)
    by_module = whole - once
    matrices = ranks * shares(weights.matrices, ranks)

    def sent(elements: int, size: int) -> int:
        return elements * size * (ranks - 1) // ranks

    manifold = sent(matrices, 20) // ranks
    if lookahead_steps:
        manifold += sent(matrices, 4) // ranks // lookahead_steps
        if polar_every:
            manifold += sent(matrices, 8) // ranks // polar_every
    rounds = sum(
        -(-len(group) // (ranks * max(1, _per_owner(group))))
        for group in _sub_groups(weights.matrices, setting)
    )
    # What is used again soon enough is not gathered again.
    kept = min(by_module, weights.block * (setting.live // (2 * weights.block) + 1))
    modules = -(-by_module // max(1, min(setting.prefetch, weights.block)))
    buckets = -(-weights.total // setting.bucket)
    return Traffic(
        forward=accumulation * sent(by_module, setting.working) + sent(once, setting.working),
        backward=accumulation * sent(by_module - kept, setting.working),
        reduce=accumulation * sent(whole, 4),
        manifold=manifold,
        rounds=rounds,
        gathers=accumulation * (2 * modules + buckets) + (once > 0),
    )


def _per_owner(group: tuple[int, ...]) -> int:
    slots = tuple(Slot(str(i), (n,), n, 0, n) for i, n in enumerate(group))
    return max(len(owned) for r in plan_rounds(slots, 1) for owned in r.owned)


def checkpoint_bytes(weights: Weights, *, lookahead: bool) -> int:
    """Bytes of one checkpoint: masters, moments and, with Lookahead, two more tensors."""
    return 4 * (3 + lookahead) * weights.total + 4 * lookahead * sum(weights.matrices)


def artifact_bytes(weights: Weights) -> int:
    """Bytes of one model artifact."""
    return 4 * weights.total
