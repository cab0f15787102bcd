"""DeepSpeed ZeRO-3: the only file that imports it.

Builds the partitioned network, hands the flat partitions to the manifold optimizer, runs the steps.
"""

import contextlib
import gc
import importlib
import inspect
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model.device_copy import to_device
from model.networks.init import initial_kind, initial_value
from model.networks.registry import AnyNetwork, build_network
from optim.collectives import LocalExchange, ProcessGroupExchange
from optim.config import OptimConfig
from optim.manifolds import is_trivialized, manifold_of
from optim.param_groups import parameter_groups
from optim.zero3_adam import ShardedManifoldAdam
from optim.zero_layout import FlatPartition, Slot
from pipeline.config import TrainConfig, ZeroConfig
from pipeline.errors import PipelineError
from pipeline.losses.base import Loss
from pipeline.resilience.straggler import Stopwatch
from pipeline.run.distributed import DistributedContext
from pipeline.training.device_flops import DTYPES
from pipeline.training.metric_reducer import Metric
from pipeline.training.objective import Objective
from pipeline.training.schedules import StepContext
from pipeline.training.without_compiler import without_compiler


def require_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the accelerator of a rank does not have.

    Raises:
        PipelineError: fp16 on a device without fp16 arithmetic.
    """
    if precision != "fp16":
        return
    accelerator = _import_deepspeed(device).get_accelerator()
    if not accelerator.is_fp16_supported():
        raise PipelineError(
            f"train.precision=fp16: the {accelerator.device_name()} of this machine has no fp16 "
            "arithmetic; use bf16 or fp32"
        )


def engine_settings(
    *,
    train: TrainConfig,
    zero: ZeroConfig,
    micro_batch: int,
    largest: int,
    block: int,
    persist_below: int,
) -> dict[str, Any]:
    """DeepSpeed configuration of ZeRO-3.

    Args:
        train: precision, accumulation, clipping.
        zero: bucket sizes; 0 derives them.
        micro_batch: samples per rank and backward pass.
        largest: elements of the largest parameter.
        block: elements of the largest module that is gathered as one.
        persist_below: elements of the smallest parameter that is gathered module by module.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": train.accumulation,
        # DeepSpeed's default is 1.0, so 0 has to be said.
        "gradient_clipping": train.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The defaults of bf16 and fp16 would add up gradients in 16 bit.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": zero.sub_group_size,
            "reduce_bucket_size": zero.reduce_bucket_size or max(4 * largest, 1_000_000),
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size or block,
            # Of the largest one that stays whole; the default is 1e5, whatever the network.
            "stage3_param_persistence_threshold": max(0, persist_below - 1),
            # On, it replaces torch's F.linear in the whole process, for good and for a slower one.
            "memory_efficient_linear": False,
            # The default of 1e9 would keep a whole billion-parameter network on every rank.
            "stage3_max_live_parameters": zero.max_live_parameters or 3 * block,
            "stage3_max_reuse_distance": zero.max_live_parameters or 3 * block,
        },
    }
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    elif train.precision == "fp16":
        # Stage 3 halves the client gradient on growth steps of the dynamic scaler.
        settings["fp16"] = {"enabled": True, "loss_scale": train.loss_scale}
    return settings


@without_compiler()
def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this device, quiet."""
    # Not what it would find on the machine: a run may be on the CPU beside a GPU.
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cpu":
        # Else stage 3 starts `numactl` at every reduction of gradients, to count the devices here.
        os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        # Ranges that no profiler of a CPU records, around 150 calls a step.
        nvtx: Any = importlib.import_module("deepspeed.utils.nvtx")
        nvtx.enable_nvtx = False
        # The shared-memory op would be compiled at start (40 s, needs g++ and ninja).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _partitions(zero_optimizer: Any, names: dict[int, str]) -> list[FlatPartition]:
    """Describe DeepSpeed's flat fp32 partitions, one per sub-group."""
    partitions = []
    for group, (parameters, flat) in enumerate(
        zip(zero_optimizer.fp16_groups, zero_optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        slots, offset = [], 0
        for p in parameters:
            length = p.partition_numel()
            sizes = tuple(p.ds_shape), p.ds_numel, offset, length
            slots.append(Slot(names[id(p)], *sizes, trivialized=is_trivialized(p)))
            # Padded to the same length on all ranks, so offsets agree without being told.
            offset += length

        def publish(flat: Tensor = flat, group: int = group) -> None:
            zero_optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            _order_streams(zero_optimizer)

        partitions.append(FlatPartition(flat, tuple(slots), manifold_of(parameters[0]), publish))
    return partitions


def _forget_modules(root: torch.nn.Module) -> None:
    """Take the modules of an engine out of what DeepSpeed 0.19.8 keeps for the whole process.

    Each engine puts its root on the stack of modules whose pass is under way and leaves it there,
    and a pass that ends in an error leaves the others. A cache of a method has all modules as keys.
    """
    from deepspeed.runtime.zero import parameter_offload

    own = set(root.modules())
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module not in own]
    coordinator = parameter_offload.PartitionedParameterCoordinator
    wrapper = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(wrapper).nonlocals["func"].cache_clear()


def _order_streams(zero_optimizer: Any) -> None:
    """Let what is gathered from now on wait for what was written to the working weights.

    DeepSpeed gathers on a stream of its own (`overlap_comm`, on in stage 3) that waits for nothing:
    the next forward pass could gather weights that the step is still writing. Its one wait for the
    device is in its gathering of parameters that stay whole, which `WholeParameters` does instead.
    """
    coordinator = zero_optimizer.parameter_offload.param_coordinator
    gathering = coordinator._PartitionedParameterCoordinator__allgather_stream
    if gathering is not None:  # on CPU there are no streams
        gathering.wait_stream(torch.accelerator.current_stream())


@contextlib.contextmanager
def _initialising_threads(device: torch.device) -> Iterator[int]:
    """Matrices that a rank makes at the same time: beside a GPU, one on each of its share of cores.

    Whatever `OMP_NUM_THREADS` says, and without ranks that take each other's cores.
    """
    if device.type == "cpu":  # each of its cores computes in every product already
        yield 1
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield max(1, len(os.sched_getaffinity(0)) // ranks)
    finally:
        torch.set_num_threads(before)


def _check_working_type(named: Iterable[tuple[str, Any]], precision: str) -> None:
    """Refuse a partition of another type than the run asked for."""
    for name, p in named:
        if p.ds_tensor.dtype != DTYPES[precision]:
            raise PipelineError(
                f"train.precision={precision}, but DeepSpeed made {name} {p.ds_tensor.dtype}"
            )


def gathered_sizes(network: torch.nn.Module) -> tuple[int, int]:
    """Elements of the largest parameter, and of the most that one module owns (meta device)."""
    largest = max(p.numel() for p in network.parameters())
    block = max(
        sum(p.numel() for p in module.parameters(recurse=False)) for module in network.modules()
    )
    return largest, block


WHOLE_ELEMENTS = 1 << 24
"""Elements of a network up to which its working weights stay whole: 64 MiB in float32."""


def persistence(asked: int, sizes: Collection[int]) -> int:
    """Elements below which a parameter is whole on every rank during a step.

    Args:
        asked: `cluster.persist_below`.
        sizes: elements of all parameters.
    """
    if asked >= 0:
        return asked
    return max(sizes) + 1 if sum(sizes) <= WHOLE_ELEMENTS else 0


class WholeParameters:
    """Working weights that are gathered at once before a step, and not module by module.

    Masters, moments and gradients stay partitioned. DeepSpeed gathers such parameters after a step,
    one collective each, and neither after a step that it skips nor after a change behind its back;
    here they are gathered, all in one collective, when a step begins, and let go before their
    partitions are updated, so that between steps there is no copy that could be stale.

    Args:
        zero_optimizer: of an engine that has just been made.
    """

    def __init__(self, zero_optimizer: Any) -> None:
        self._parameters = zero_optimizer.persistent_parameters
        zero_optimizer.persistent_parameters = []
        if len(self._parameters) == sum(map(len, zero_optimizer.fp16_groups)):
            # Nothing is gathered or released during the passes: half of the calls of a small step.
            zero_optimizer.parameter_offload.destroy()

    def gather(self) -> None:
        """Make them whole. Collective."""
        if self._parameters:
            self._parameters[0].all_gather_coalesced(self._parameters).wait()

    def release(self) -> None:
        """Let them go, as DeepSpeed would one by one, for a tenth of a small step."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param

        for p in self._parameters:
            p.ds_active_sub_modules.clear()  # as DeepSpeed does: some hooks are never called
            free_param(p)
            p.ds_status = ZeroParamStatus.NOT_AVAILABLE


class Zero3:
    """A network trained under ZeRO-3 by the sharded manifold optimizer.

    Args:
        world: the ranks; all construct it together.
        model: the network.
        loss: what it is trained for.
        optim: the manifold optimizer.
        train: precision, accumulation, clipping, activation checkpointing, seed.
        zero: bucket sizes.
        micro_batch: samples per rank and backward pass.
        persist_below: see `ClusterConfig`.

    Attributes:
        statistics: what the tensor that `step` returns holds, in this order.
        optimizer: the bound client optimizer.
        partitions: this rank's flat partitions.
        matrix_count: matrices on the manifold.
        parameter_count: elements of the whole network.
        block_count: blocks of the network.
        recomputed_blocks: those of them that are recomputed in the backward pass.
    """

    @without_compiler()
    def __init__(
        self,
        *,
        world: DistributedContext,
        model: AnyNetwork,
        loss: Loss,
        optim: OptimConfig,
        train: TrainConfig,
        zero: ZeroConfig,
        micro_batch: int,
        persist_below: int,
    ) -> None:
        deepspeed = _import_deepspeed(world.device)
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
        # Sizes of buckets have to be known before the first real parameter is made.
        with torch.device("meta"):
            shape = build_network(model)
        largest, block = gathered_sizes(shape)
        settings = engine_settings(
            train=train,
            zero=zero,
            micro_batch=micro_batch,
            largest=largest,
            block=block,
            persist_below=persistence(persist_below, [p.numel() for p in shape.parameters()]),
        )
        # The type comes from the settings: DeepSpeed 0.19.8 ignores `dtype` where fp16 is missing.
        with deepspeed.zero.Init(config_dict_or_path=settings):
            network = build_network(model)
        self.block_count = network.block_count
        self.recomputed_blocks = network.recomputed_blocks = train.recomputed(self.block_count)
        objective = Objective(network, loss)
        self.statistics: Sequence[Metric] = [s.metric for s in objective.statistics]
        named: list[tuple[str, Any]] = list(network.named_parameters())
        _check_working_type(named, train.precision)
        groups = parameter_groups(named, optim)
        self.optimizer = ShardedManifoldAdam(groups, optim)
        self._engine, *_ = deepspeed.initialize(
            model=objective, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self._whole = WholeParameters(self._engine.optimizer)
        # After initialize: its hooks must run inside of those that gather and release parameters.
        self._stopwatch = Stopwatch(objective, world.device)
        self._device = world.device
        self._network = network
        self._seed = train.seed
        self._initial = {name: initial_kind(p) for name, p in named}
        # The schedule multiplies these; DeepSpeed has no scheduler here that could disagree.
        self._base_lr = [group["lr"] for group in self.optimizer.param_groups]
        group = named[0][1].ds_process_group
        exchange = LocalExchange() if world.size == 1 else ProcessGroupExchange(group)
        self.partitions = _partitions(self._engine.optimizer, {id(p): name for name, p in named})
        matrices = [name for name, p in named if manifold_of(p) is not None]
        self.matrix_count = len(matrices)
        self.parameter_count = sum(p.ds_numel for _, p in named)
        self.optimizer.bind(self.partitions, exchange, expected_matrices=matrices)

    def close(self) -> None:
        """Give the engine's memory back; nothing else may be called afterwards.

        DeepSpeed's hooks, names and streams refer to each other and to the partitions, so an engine
        that is only forgotten stays, and with it every byte of the weights and of their state.
        """
        self._engine.destroy()
        _forget_modules(self._engine.module)
        self._stopwatch.close()
        self.optimizer.close()
        self.partitions = []
        del self._engine, self._network, self._whole
        gc.collect()  # what is left refers to itself in circles

    def initialise(self, seed: int) -> None:
        """Owners make every initial value in float64 and scatter it into the fp32 masters."""

        def value(slot: Slot) -> Tensor:
            return initial_value(self._initial[slot.name], slot.shape, seed=seed, name=slot.name)

        with _initialising_threads(self._device) as threads:
            self.optimizer.initialise(value, threads=threads)

    def accumulate(self, images: Tensor, labels: Tensor, now: StepContext) -> Tensor:
        """Forward and backward pass of one micro-batch; returns the sums of `statistics`."""
        loss, sums = self._engine(
            to_device(images, self._device),
            to_device(labels, self._device),
            now,
        )
        # DeepSpeed divides by the accumulation itself and steps only after the last micro-batch.
        self._engine.backward(loss)
        if self._engine.is_gradient_accumulation_boundary():
            self._whole.release()
        self._engine.step()
        return sums

    def step(
        self, micro_batches: Iterable[tuple[Tensor, Tensor]], now: StepContext
    ) -> Tensor | None:
        """One optimizer step over this rank's micro-batches.

        Returns:
            Sums of `statistics` over the micro-batches, shape (number of statistics,); None if a
            loss or gradient was not finite on some rank: then no rank has updated anything.
        """
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * now.lr_factor
        self._whole.gather()
        # Before the first micro-batch: what is drawn for a step is the same in all of them.
        self._network.begin_step(step=now.step, progress=now.progress, seed=self._seed)
        sums = torch.stack([self.accumulate(x, t, now) for x, t in micro_batches]).sum(0)
        _order_streams(self._engine.optimizer)
        # DeepSpeed's check for overflow is collective: all ranks have the same answer.
        return sums if self._engine.was_step_applied() else None

    def forward_seconds(self) -> float:
        """Of this rank alone, since the last call; see Stopwatch."""
        return self._stopwatch.read()

    def audit_metrics(self) -> dict[str, float]:
        """Orthogonality found since the last call, the same on all ranks; no device is asked."""
        return self.optimizer.audit.metrics()
