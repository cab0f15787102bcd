"""Manifold Adam as client optimizer of DeepSpeed ZeRO-3: owner-compute, state in ZeRO's layout.

Per round an all-to-all assembles whole matrices at their owners, one large matrix or several small
ones each. The owner forms the Lie-algebra gradient, which returns to the flat layout; there Adam's
moments are advanced, element by element; the increment goes to the owner, which applies the
exponential, and the matrix returns. Per rank and step this sends 20 N / W bytes (X, G, A, D, X in
float32), 24 N / W at a Lookahead synchronisation, and 8 N / W more at a polar projection without
one. What a round sends travels during the products of others (`optim.manifold_step`).

Every whole-matrix product sees one matrix on one rank, and the rest is element-wise, so for a given
gradient the result does not depend on W, bit by bit.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optim.adam_update import euclidean_average, euclidean_step, new_state
from optim.collective_errors import Guard
from optim.collectives import Exchange
from optim.config import OptimConfig
from optim.errors import OptimizerError
from optim.manifold_step import ManifoldStep, in_sequence, interleaved
from optim.manifolds import Manifold
from optim.matmul import Precision
from optim.matrix_exp import Expected
from optim.orthogonality_audit import Audit
from optim.zero_layout import (
    ROUND_ELEMENTS,
    FlatPartition,
    Round,
    Slot,
    check_expected,
    check_partition,
    concurrent_rounds,
    plan_rounds,
)

TENSOR_KINDS = ("exp_avg", "exp_avg_sq", "slow", "tangent_sum")
"""State tensors, each in the layout of the master."""


@contextmanager
def made_ahead(
    fn: Callable[[Slot], Tensor], slots: Sequence[Slot], threads: int
) -> Iterator[Callable[[Slot], Tensor]]:
    """A function as `fn` for slots that are asked for in this order; threads work ahead.

    Not more of its values exist at a time than there are threads, and one.
    """
    if threads == 1:
        yield fn
        return
    waiting = list(slots)[::-1]
    begun: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def made(slot: Slot) -> Tensor:
            while waiting and len(begun) < threads:
                begun.append(pool.submit(fn, waiting.pop()))
            return begun.popleft().result()

        yield made


OPTIONAL_SCALARS = frozenset({"full_increments"})
"""Scalars of the state that are there only after what they tell has happened."""


class ShardedManifoldAdam(torch.optim.Optimizer):
    """Manifold Adam on ZeRO-3's flat partitions; equals `ReferenceManifoldAdam`.

    Life: construct with the model's parameters, hand to `deepspeed.initialize`, `bind`, then
    `initialise` or fill `partitioned_state()`, then train. DeepSpeed calls `step` once per
    sub-group with that sub-group's flat tensor as the only parameter, so counters live in the
    state of the flat tensor.

    Args:
        param_groups: From `optim.param_groups.parameter_groups`.
        config: Hyper-parameters. Learning rates are read from the groups at every step.
        round_elements: Most elements that an owner assembles in one exchange.
        overlap: Whether rounds overlap where there are several ranks; the results are the same.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        config: OptimConfig,
        *,
        round_elements: int = ROUND_ELEMENTS,
        overlap: bool = True,
    ) -> None:
        super().__init__(param_groups, {"lr": config.lr})
        self.config = config
        self.audit = Audit(config)
        self._round_elements = round_elements
        self._overlap = overlap
        self.partitioned_matrices = 0
        self.increment: Precision = "full"
        self._raised = False
        self._expected: dict[tuple[str, bool], Expected] = {}
        self.partitions: list[FlatPartition] = []
        self._partition_of: dict[Tensor, FlatPartition] = {}
        self._exchange: Exchange | None = None

    # -- binding ---------------------------------------------------------------------------------

    def bind(
        self,
        partitions: Sequence[FlatPartition],
        exchange: Exchange,
        *,
        expected_matrices: Sequence[str],
    ) -> None:
        """Tell the optimizer what its flat tensors contain. Call on every rank, before any step.

        Whatever could fail later on one rank only, and leave the others waiting, is checked here.
        Afterwards `partitioned_matrices` is the number of manifold matrices that are divided among
        several ranks: all of them, or 0 in one process.

        Args:
            partitions: All sub-groups of this rank, in the same order on all ranks.
            exchange: Collectives over the ranks that share the partitions.
            expected_matrices: Names of all matrices with a declared manifold.

        Raises:
            OptimizerError: See `optim.zero_layout.check_partition` and `check_expected`.
        """
        for partition in partitions:
            check_partition(partition, exchange.world_size)
        matrices = check_expected(list(partitions), list(expected_matrices))
        self.partitions = list(partitions)
        self.partitioned_matrices = sum(slot.length < slot.numel for slot in matrices)
        self._partition_of = {partition.flat: partition for partition in partitions}
        self._exchange = exchange
        device = partitions[0].flat.device
        self._guard = Guard(exchange, device)
        largest = max((slot.shape[0] for slot in matrices), default=0)
        self.increment = self.config.precision(device.type, largest)

    def close(self) -> None:
        """Forget the partitions and their state; the optimizer takes no step any more."""
        self.state.clear()
        self.param_groups.clear()
        self.partitions = []
        self._partition_of = {}

    @property
    def exchange(self) -> Exchange:
        """The exchange given to `bind`; counts the bytes sent."""
        if self._exchange is None:
            raise OptimizerError("the optimizer is not bound to partitions yet: call bind() first")
        return self._exchange

    # -- stepping --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every flat tensor that is in a group now. Collective.

        Raises:
            OptimizerError: A flat tensor is not bound or has no gradient; or a polar projection
                fails, be it due or because of an audit (then on every rank, naming the matrix).
        """
        if closure is not None:
            raise OptimizerError("a closure is not supported: gradients are already partitioned")
        for group in self.param_groups:
            for flat in group["params"]:
                partition = self._partition_of.get(flat)
                if partition is None:
                    raise OptimizerError("step() met a tensor that bind() was not told of")
                if flat.grad is None:
                    names = [slot.name for slot in partition.slots]
                    raise OptimizerError(f"no gradient for the partition of {names}")
                state = self._state(partition)
                if partition.manifold is None:
                    euclidean_step(flat, flat.grad, state, group["lr"], self.config)
                else:
                    self._manifold_step(partition, partition.manifold, state, group["lr"])

    def _manifold_step(
        self, partition: FlatPartition, manifold: Manifold, state: dict[str, Any], lr: float
    ) -> None:
        state["step"] += 1
        step = ManifoldStep(
            partition,
            manifold,
            state,
            lr,
            config=self.config,
            exchange=self.exchange,
            audit=self.audit,
            guard=self._guard,
            increment=self.increment,
            expected=self._expected,
        )
        # One rank waits for nobody, and on a CPU for no norms: interleaving would only hold more
        # matrices at a time.
        waits = self.exchange.world_size > 1 or self._device().type != "cpu"
        run = interleaved if self._overlap and waits else in_sequence
        for rounds in concurrent_rounds(self._rounds(partition)):
            run([step.update(plan) for plan in rounds])
        if step.projects:
            self._guard.raise_together()
        if self.audit.due(state["step"]):
            self._finish_audit(partition, manifold)

    def _finish_audit(self, partition: FlatPartition, manifold: Manifold) -> None:
        """Share what the owners measured; re-project matrices past the limit, fast and slow."""
        audit = self.audit
        # float64, in which the owners have measured.
        row = torch.tensor(audit.summary(), dtype=torch.float64, device=self._device())
        if audit.conclude(self.exchange.all_gather(row).tolist()):

            def repair(X: Tensor, slot: Slot) -> Tensor:
                return audit.repaired(slot.name, X, manifold)

            for kind in ("master", "slow")[: 1 + (self.config.lookahead_steps > 0)]:
                flat = self._tensor(partition, kind)
                mapped = self.owner_map(repair, sources=(kind,), partitions=[partition])
                for _, plan, values in mapped:
                    flat[plan.start : plan.stop] = values
        if self.increment != "full" and self.config.increment == "auto" and audit.drifts:
            self._raise_precision()
        audit.forget()

    def _raise_precision(self) -> None:
        """Full increments from now on, for good: what has drifted once may drift again."""
        self.increment, self._raised = "full", True

    # -- whole-matrix operations -----------------------------------------------------------------

    @torch.no_grad()
    def owner_map(
        self,
        fn: Callable[..., Tensor],
        *,
        sources: Sequence[str] = ("master",),
        partitions: Sequence[FlatPartition] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[FlatPartition, Round, Tensor]]:
        """Apply a function to whole parameters at their owners, round by round. Collective.

        Args:
            fn: Called as `fn(*wholes, slot)` with one whole parameter-shaped tensor per source;
                returns a tensor of the parameter's shape. Only the owner of a parameter calls it.
            sources: "master" or names of state tensors.
            partitions: Default all.
            dtype: Of the results, default that of the master.

        Yields:
            The partition, the round, and this rank's range `[round.start, round.stop)` of the
            results in the flat layout. Every rank must exhaust the iterator.

        Raises:
            OptimizerError: `fn` failed at an owner; raised on every rank.
        """
        exchange = self.exchange
        for partition in self.partitions if partitions is None else partitions:
            flats = [self._tensor(partition, source) for source in sources]
            like = partition.flat.new_empty(0, dtype=dtype)
            for plan in self._rounds(partition):
                cut = slice(plan.start, plan.stop)
                wholes = [exchange.to_owner(flat[cut], plan).wait() for flat in flats]
                results = self._guard.call(plan.owned[exchange.rank], fn, *wholes)
                self._guard.raise_together()
                out = like.new_empty(plan.stop - plan.start)
                yield partition, plan, exchange.to_partitions(results, plan, out).wait()

    @torch.no_grad()
    def initialise(self, fn: Callable[[Slot], Tensor], *, threads: int = 1) -> None:
        """Set every master to `fn(slot)`, start the state anew and publish. Collective.

        Args:
            fn: The whole float64 value of a parameter, of shape `slot.shape`; called on its owner
                only, so it must not depend on the rank.
            threads: How many values an owner makes at the same time, each by one thread.
        """
        owned = [
            slot
            for partition in self.partitions
            for plan in self._rounds(partition)
            for slot in plan.owned[self.exchange.rank]
        ]
        with made_ahead(fn, owned, threads) as made:
            for partition, plan, values in self.owner_map(made, sources=()):
                partition.flat[plan.start : plan.stop] = values
        for partition in self.partitions:
            # Moments of other values would move the new ones.
            self.state.pop(partition.flat, None)
            partition.publish()

    @torch.no_grad()
    def residuals(self) -> dict[str, float]:
        """Distance of every manifold master from its manifold, in float64. Collective.

        Returns:
            By parameter name, the same on all ranks.
        """
        exchange = self.exchange
        names: list[list[str]] = [[] for _ in range(exchange.world_size)]
        measured: list[float] = []
        for partition in self.partitions:
            if partition.manifold is None:
                continue
            for plan in self._rounds(partition):
                wholes = exchange.to_owner(partition.flat[plan.start : plan.stop], plan)
                measured += [partition.manifold.residual(X) for X in wholes.wait()]
                for owner, slots in enumerate(plan.owned):
                    names[owner] += [slot.name for slot in slots]
        # Owners hold different numbers of matrices; a collective needs one length.
        row = torch.zeros(max(map(len, names)), dtype=torch.float64, device=self._device())
        row[: len(measured)] = torch.tensor(measured, dtype=torch.float64)
        table = exchange.all_gather(row).tolist()
        return {
            name: value
            for owner, values in enumerate(table)
            for name, value in zip(names[owner], values, strict=False)  # rows are padded
        }

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, Tensor | None]]:
        """Averaged parameters for the artifact, one after the other. Collective.

        The value is that after a Lookahead synchronisation now (right after one, the slow copy
        itself); manifold matrices are projected in float64. Masters and state do not change.

        Yields:
            Name and, on rank 0, the whole float32 tensor; None on the other ranks. Every rank must
            exhaust the iterator; no rank ever holds more than a round.

        Raises:
            OptimizerError: A matrix cannot be projected; raised on every rank.
        """
        for partition in self.partitions:
            for plan, values in self._averaged(partition):
                for slot in plan.slots:
                    start = slot.offset - plan.start
                    whole = self.exchange.gather(values[start : start + slot.length])
                    yield slot.name, None if whole is None else whole[: slot.numel].view(slot.shape)

    def _averaged(self, partition: FlatPartition) -> Iterator[tuple[Round, Tensor]]:
        """This rank's ranges of the averaged parameters in float32, round by round."""
        state, factor = self._state(partition), self.config.lookahead_factor
        manifold, rule, double = partition.manifold, self.config.rule, torch.float64
        if manifold is None:
            for plan in self._rounds(partition):
                cut = slice(plan.start, plan.stop)
                slow = state["slow"][cut] if "slow" in state else None
                yield plan, euclidean_average(partition.flat[cut], slow, factor).float()
            return

        def average(X: Tensor, *rest: Any) -> Tensor:
            if len(rest) == 2:  # X is the slow copy; then the tangent sum and the slot
                X = manifold.retract(X.to(double), factor * rest[0].to(double), rule)
            return manifold.project(X, dtype=double)

        sources = ("slow", "tangent_sum") if "slow" in state else ("master",)
        mapped = self.owner_map(
            average, sources=sources, partitions=[partition], dtype=torch.float32
        )
        for _, plan, values in mapped:
            yield plan, values

    # -- state -----------------------------------------------------------------------------------

    def partitioned_state(self) -> Iterator[tuple[str, FlatPartition, Tensor]]:
        """Every tensor to be saved, in ZeRO's layout; fill them in place to resume.

        Yields:
            Kind ("master", "exp_avg", "exp_avg_sq", "slow" or "tangent_sum"), partition, tensor.
            After filling, call each partition's `publish()`.
        """
        for partition in self.partitions:
            state = self._state(partition)
            yield "master", partition, partition.flat
            for kind in TENSOR_KINDS:
                if kind in state:
                    yield kind, partition, state[kind]

    def scalar_state(self) -> dict[str, float]:
        """Step counter, product of mu, re-projections, precision of increments, as JSON values.

        All partitions have the same between two iterations, so the values are stored once and fit
        a resume whose partitions are cut differently.

        Raises:
            OptimizerError: The partitions disagree (an iteration is under way).
        """
        scalars: dict[str, float] = {"reprojections": self.audit.reprojections}
        if self._raised:
            scalars["full_increments"] = 1
        for partition in self.partitions:
            for key in ("step", "mu_product"):
                value = self._state(partition).get(key)
                if value is not None and scalars.setdefault(key, value) != value:
                    raise OptimizerError(
                        f"partitions disagree in {key}: {scalars[key]} and {value}; "
                        "save only between two iterations"
                    )
        return scalars

    def load_scalar_state(self, scalars: dict[str, float]) -> None:
        """Restore `scalar_state` into all partitions.

        Raises:
            OptimizerError: A value is missing.
        """
        for partition in self.partitions:
            state = self._state(partition)
            for key, kind in (("step", int), ("mu_product", float)):
                if key not in state:
                    continue
                if key not in scalars:
                    raise OptimizerError(f"scalar state {sorted(scalars)} lacks {key!r}")
                state[key] = kind(scalars[key])
        self.audit.reprojections = int(scalars.get("reprojections", 0))
        if scalars.get("full_increments"):
            self._raise_precision()

    # -- helpers ---------------------------------------------------------------------------------

    def _state(self, partition: FlatPartition) -> dict[str, Any]:
        flat = partition.flat
        # At the first use: ZeRO-3 hands over partitions before their values are known.
        if not self.state[flat]:
            on_manifold = partition.manifold is not None
            self.state[flat] = new_state(flat, self.config, on_manifold=on_manifold)
        return self.state[flat]

    def _tensor(self, partition: FlatPartition, kind: str) -> Tensor:
        return partition.flat if kind == "master" else self._state(partition)[kind]

    def _rounds(self, partition: FlatPartition) -> list[Round]:
        world_size, elements = self.exchange.world_size, self._round_elements
        return plan_rounds(partition.slots, world_size, elements=elements)

    def _device(self) -> torch.device:
        return self.partitions[0].flat.device
