"""What one rank does: build the parts, resume, train, save checkpoints and artifacts."""

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_shards.storage.store import Store
from data_shards.streaming.corruption_log import CorruptionLog
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from data_shards.streaming.webdataset_stream import UnindexedStream
from pipeline.checkpoint.async_saver import AsyncSaver
from pipeline.checkpoint.reader import load_newest
from pipeline.config import RunConfig, TrainConfig
from pipeline.errors import failing
from pipeline.resilience.hang_detector import watched
from pipeline.resilience.heartbeat import Phase
from pipeline.resilience.oom import fitting, holding, recorded, too_large
from pipeline.resilience.rollback import Rollbacks
from pipeline.resilience.signals import Interruption
from pipeline.resilience.straggler import StragglerDetector
from pipeline.run import layout
from pipeline.run.distributed import DistributedContext, join_process_group
from pipeline.run.events import Emit, Event, MetricsReplayed, Started
from pipeline.run.step_schedule import StepSchedule, make_step_schedule
from pipeline.run.worker_spec import TrainState, WorkerSpec
from pipeline.training.data import Samples, open_samples
from pipeline.training.device_flops import measured_flops, peak_flops
from pipeline.training.hooks import (
    CheckpointHook,
    HangDetectionHook,
    Hook,
    HookList,
    InterruptionHook,
    OrthogonalityHook,
    ProfilerHook,
    StragglerHook,
)
from pipeline.training.processor_time import ProcessorTimeHook
from pipeline.training.profiler import profiled
from pipeline.training.recorder import Recorder
from pipeline.training.schedules import step_context
from pipeline.training.trainer import Trainer
from pipeline.training.zero3 import Zero3, require_precision

Recomputing = Callable[[RunConfig, DistributedContext], TrainConfig]
"""Decides `activation_checkpointing auto`; all ranks call it together and have the same answer."""


def _undecided(config: RunConfig, world: DistributedContext) -> TrainConfig:
    return config.train


def run_rank(
    job: WorkerSpec,
    emit: Emit,
    interruption: Interruption,
    hooks: Sequence[Hook] = (),
    *,
    recomputing: Recomputing = _undecided,
) -> None:
    """Train on this rank until the plan's last step, or until a stop is requested.

    Ranks: all ranks call it together.

    Args:
        job: the run.
        emit: receives events; but for Hung, on rank 0 alone.
        interruption: what this rank can learn of the end of its time.
        hooks: join the loop after those that every run has.
        recomputing: by the memory of the devices; without it `auto` keeps all blocks.

    Raises:
        PipelineError, ShardError, ModelError, OptimizerError: bad input, named.
        RunFailedError: the same once training has begun.
    """
    config = job.config
    # DeepSpeed on torch >= 2.12 calls collectives under their former names, once per parameter.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"deepspeed|torch\.distributed"
    )
    with join_process_group(config.cluster) as world:
        require_precision(config.train.precision, world.device)
        asked = dataclasses.replace(job.config, train=recomputing(job.config, world))
        _train(dataclasses.replace(job, config=asked), world, emit, interruption, hooks)


def build_engine(config: RunConfig, *, world: DistributedContext, micro_batch: int) -> Zero3:
    """The engine of a run; its state has still to be made or loaded.

    Ranks: all call it together.

    Args:
        config: the run.
        world: the ranks.
        micro_batch: samples per rank and backward pass.
    """
    return Zero3(
        world=world,
        model=config.model,
        loss=config.loss,
        optim=config.optim,
        train=config.train,
        zero=config.zero,
        micro_batch=micro_batch,
        persist_below=config.cluster.persist_below,
    )


def _train(
    job: WorkerSpec,
    world: DistributedContext,
    emit: Emit,
    interruption: Interruption,
    hooks: Sequence[Hook],
) -> None:
    run = Store(job.run_url)
    # Rank 0 asks the store for all: an answer that differed would give ranks different batches.
    sizes = world.share(too_large(run) if world.rank == 0 else None)
    train = fitting(job.config.train, sizes, world.size)
    config = dataclasses.replace(job.config, train=train)
    samples = open_samples(
        job.shards_url, config.data, config.model, certify=config.checkpoint.certifies
    )
    plan = make_step_schedule(
        config.train, config.checkpoint, samples=samples.per_epoch, world_size=world.size
    )
    with holding("the engine is built"):
        engine = build_engine(config, world=world, micro_batch=plan.micro_batch)
    # Whoever tries again in this process, or certifies in it, needs the memory of this engine.
    with contextlib.closing(engine):
        _train_with(engine, job, config, plan, samples, sizes, world, emit, interruption, hooks)


def _train_with(
    engine: Zero3,
    job: WorkerSpec,
    config: RunConfig,
    plan: StepSchedule,
    samples: Samples,
    sizes: list[int],
    world: DistributedContext,
    emit: Emit,
    interruption: Interruption,
    hooks: Sequence[Hook],
) -> None:
    """Train the engine from where the run stands."""
    run = Store(job.run_url)
    rollbacks = Rollbacks(
        run,
        world=world,
        engine=engine,
        max_skipped=config.train.max_skipped,
        limit=config.train.rollbacks,
        per_epoch=samples.per_epoch,
        writer=job.writer,
    )
    with holding("its state is made or restored"):
        progress, damaged = _restored(run, world, engine, rollbacks, seed=config.train.seed)
    if world.rank == 0:
        emit(_started(config, world, engine, plan, progress, damaged, sizes))
        emit(MetricsReplayed(progress.records))
    record = layout.damaged_samples(progress.step, world.rank)
    with (
        failing(),
        # Left in reverse order: the saver waits for the checkpoint under way when the stream has
        # ended and while the hang detector still watches.
        contextlib.closing(CorruptionLog(run, record)) as corruption_log,
        watched(world, config.cluster, step=progress.step, run=run, emit=emit) as hang_detector,
        _saver(job, config, run, world, engine, samples, emit) as saver,
        samples.stream(config.train, world, progress.cursor, corruption_log) as stream,
        profiled(
            run,
            config.profile if world.rank == 0 else 0,
            first=progress.step,
            device=world.device,
        ) as stepped,
    ):
        tell = emit if world.rank == 0 else _say_nothing
        joined = _hooks(
            config, world, engine, interruption, tell, hang_detector.beat, saver, stepped
        )
        trainer = _trainer(
            config,
            plan,
            world=world,
            engine=engine,
            stream=stream,
            progress=progress,
            rollbacks=rollbacks,
            hooks=HookList([*joined, *hooks]),
            emit=tell,
        )
        # Inside of the saver: what does not fit is written down before a failed run waits for its
        # checkpoint.
        with recorded(
            run,
            sizes,
            plan.micro_batch,
            recomputes=config.train.activation_checkpointing == "all",
            where=lambda: f"step {trainer.progress.step + 1}, rank {world.rank}",
            writer=job.writer,
        ):
            trainer.fit()
    # A rank that left earlier would end the process group under the others.
    world.barrier()


def _restored(
    run: Store, world: DistributedContext, engine: Zero3, rollbacks: Rollbacks, *, seed: int
) -> tuple[TrainState, list[str]]:
    """The newest checkpoint, or the first state, and what was passed over as damaged."""
    progress, damaged = load_newest(run, world=world, engine=engine)
    if progress is None:
        # Only now: an owner makes each matrix in float64, which a loaded state would overwrite.
        engine.initialise(seed)
        progress = TrainState(0, Cursor(seed=seed))
    # Samples that an earlier execution left out stay left out.
    return rollbacks.resumed(progress), damaged


def _saver(
    job: WorkerSpec,
    config: RunConfig,
    run: Store,
    world: DistributedContext,
    engine: Zero3,
    samples: Samples,
    emit: Emit,
) -> contextlib.AbstractContextManager[AsyncSaver | None]:
    if config.checkpoint.none:
        return contextlib.nullcontext()
    return AsyncSaver(
        run,
        world=world,
        engine=engine,
        network=config.model,
        config=json.loads(config.to_json()),
        timeout_s=config.cluster.collective_timeout_s,
        context=job.context,
        calibration=lambda: samples.calibration(config.train),
        emit=emit,
        writer=job.writer,
        class_names=samples.class_names,
    )


def _hooks(
    config: RunConfig,
    world: DistributedContext,
    engine: Zero3,
    interruption: Interruption,
    emit: Emit,
    beat: Callable[[int, Phase], None],
    saver: AsyncSaver | None,
    stepped: Callable[[], None],
) -> list[Hook]:
    """What joins the loop of every run, in the order in which it is called."""
    straggler = StragglerDetector(config.cluster.straggler_ratio)
    return [
        # First at every moment: what the other hooks wait for counts as their phase.
        HangDetectionHook(beat),
        InterruptionHook(interruption),
        StragglerHook(engine.forward_seconds, straggler, hosts=world.hosts, emit=emit),
        OrthogonalityHook(engine.audit_metrics),
        *([CheckpointHook(saver)] if saver else []),
        # After the saver, so that the trace of a step holds its checkpoint as well.
        ProfilerHook(stepped),
    ]


def _trainer(
    config: RunConfig,
    plan: StepSchedule,
    *,
    world: DistributedContext,
    engine: Zero3,
    stream: SampleStream | UnindexedStream,
    progress: TrainState,
    rollbacks: Rollbacks,
    hooks: Hook,
    emit: Emit,
) -> Trainer:
    """The loop, with a recorder that knows the same hooks."""
    spent = ProcessorTimeHook(config.train.processor_seconds)
    hooks = HookList([hooks, spent])
    by_step = functools.partial(step_context, plan=plan, train=config.train, loss=config.loss)
    recorder = Recorder(
        world=world,
        statistics=engine.statistics,
        stream=stream,
        hooks=hooks,
        global_batch=config.train.global_batch,
        peak_lr=config.optim.lr,
        emit=emit,
    )
    return Trainer(
        plan=plan,
        context_at=spent.scheduled(by_step, plan.total_steps),
        engine=engine,
        stream=stream,
        progress=progress,
        recorder=recorder,
        rollbacks=rollbacks,
        hooks=hooks,
        emit=emit,
    )


def _say_nothing(event: Event) -> None:
    """Where the events of a rank go that are not rank 0's: all have the same."""


def _started(
    config: RunConfig,
    world: DistributedContext,
    engine: Zero3,
    plan: StepSchedule,
    progress: TrainState,
    damaged: list[str],
    too_large: list[int],
) -> Started:
    matrices, recomputed = engine.optimizer.partitioned_matrices, engine.recomputed_blocks
    facts: dict[str, Any] = {
        "network": f"{config.model.kind}, {engine.parameter_count:,} parameters",
        "ranks": f"{world.size} on {world.device.type}, {config.train.precision}, ZeRO-3",
        "partitioned matrices": f"{matrices} of {engine.matrix_count}"
        + (" (one rank holds them whole)" if world.size == 1 else ""),
        "batch": f"{config.train.global_batch} = {world.size} ranks x "
        f"{config.train.accumulation} x {plan.micro_batch}"
        + (f", {recomputed} of {engine.block_count} blocks recomputed" if recomputed else ""),
    }
    if progress.step:
        facts["resumed"] = f"after step {progress.step}"
    if too_large:
        facts["out of memory"] = f"with micro-batches of {', '.join(map(str, too_large))}"
    if damaged:
        facts["damaged checkpoints passed over"] = "; ".join(damaged)
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else world.device.type
    precision = config.train.precision
    known = config.cluster.peak_tflops or peak_flops(device, precision)
    return Started(
        facts,
        progress.step,
        plan.total_steps,
        devices=world.size,
        device=device,
        micro_batch=plan.micro_batch,
        recomputed_blocks=recomputed,
        measured_flops=0.0 if known else measured_flops(world.device, precision),
    )
