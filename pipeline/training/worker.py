"""What one rank does: build the parts, resume, train, keep checkpoints and artefacts."""

import contextlib
import warnings
from typing import Any

import torch

from data_shards.storage.store import Store
from data_shards.streaming.corruption_log import CorruptionLog
from data_shards.streaming.sampler import Cursor
from pipeline.checkpoint.async_saver import AsyncSaver
from pipeline.checkpoint.reader import load_newest
from pipeline.config import RunConfig
from pipeline.resilience.hang_detector import watched
from pipeline.resilience.oom import fitting, recorded, too_large
from pipeline.resilience.rollback import Rollbacks
from pipeline.resilience.signals import Interruption
from pipeline.run import layout
from pipeline.run.distributed import DistributedContext, join_process_group
from pipeline.run.events import Emit, MetricsReplayed, Started
from pipeline.run.state import TrainState, WorkerSpec
from pipeline.run.step_schedule import StepSchedule, make_step_schedule
from pipeline.training.data import open_samples
from pipeline.training.device_peak import measured_flops, peak_flops
from pipeline.training.profiler import profiled
from pipeline.training.trainer import Trainer
from pipeline.training.zero3 import Zero3, require_precision


def run_rank(job: WorkerSpec, emit: Emit, interruption: Interruption) -> None:
    """Train on this rank until the plan's last step, or until a stop is requested.

    Ranks: all ranks call it together.

    Raises:
        PipelineError, ShardError, ModelError, OptimizerError: bad input, named.
    """
    config = job.config
    # DeepSpeed on torch >= 2.12 calls collectives under their former names, once per parameter.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"deepspeed|torch\.distributed"
    )
    with join_process_group(config.cluster) as world:
        require_precision(config.train.precision)
        _train(job, world, emit, interruption)


def _train(
    job: WorkerSpec, world: DistributedContext, emit: Emit, interruption: Interruption
) -> None:
    run = Store(job.run_url)
    sizes = world.share(too_large(run) if world.rank == 0 else None)
    config = fitting(job.config, sizes, world.size)
    samples = open_samples(config, job.shards_url)
    plan = make_step_schedule(config, samples=samples.per_epoch, world_size=world.size)
    engine = Zero3(world=world, config=config, micro_batch=plan.micro_batch)
    progress, damaged = load_newest(run, world=world, engine=engine)
    if progress is None:
        engine.initialise(config.train.seed)
        progress = TrainState(0, Cursor(seed=config.train.seed))
    rollbacks = Rollbacks(
        run,
        world=world,
        engine=engine,
        limit=config.train.rollbacks,
        per_epoch=samples.per_epoch,
    )
    progress = rollbacks.resumed(progress)
    if world.rank == 0:
        emit(_started(config, world, engine, plan, progress, damaged, sizes))
        emit(MetricsReplayed(progress.records))
    record = layout.damaged_samples(progress.step, world.rank)
    with (
        contextlib.closing(CorruptionLog(run, record)) as corruption_log,
        watched(world, config.cluster, step=progress.step, run=run, emit=emit) as watch,
        AsyncSaver(
            run,
            world=world,
            engine=engine,
            config=config,
            context=job.context,
            calibration=lambda: samples.calibration(config),
            emit=emit,
            writer=job.writer,
        ) as saver,
        samples.stream(config, world, progress.cursor, corruption_log) as stream,
        profiled(
            run,
            config.profile if world.rank == 0 else 0,
            first=progress.step,
            device=world.device,
        ) as stepped,
    ):
        trainer = Trainer(
            world=world,
            config=config,
            plan=plan,
            engine=engine,
            stream=stream,
            progress=progress,
            emit=emit,
            saver=saver,
            rollbacks=rollbacks,
            interruption=interruption,
            beat=watch.beat,
            stepped=stepped,
        )
        with recorded(
            run,
            sizes,
            plan.micro_batch,
            where=lambda: f"step {trainer.progress.step + 1}, rank {world.rank}",
        ):
            trainer.fit()
    world.barrier()


def _started(
    config: RunConfig,
    world: DistributedContext,
    engine: Zero3,
    plan: StepSchedule,
    progress: TrainState,
    damaged: list[str],
    too_large: list[int],
) -> Started:
    matrices = engine.optimizer.partitioned_matrices
    facts: dict[str, Any] = {
        "network": f"{config.model.kind}, {engine.parameter_count:,} parameters",
        "ranks": f"{world.size} on {world.device.type}, {config.train.precision}, ZeRO-3",
        "partitioned matrices": f"{matrices} of {engine.matrix_count}"
        + (" (one rank holds them whole)" if world.size == 1 else ""),
        "batch": f"{config.train.global_batch} = {world.size} ranks x "
        f"{config.train.accumulation} x {plan.micro_batch}",
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
        measured_flops=0.0 if known else measured_flops(world.device, precision),
    )
