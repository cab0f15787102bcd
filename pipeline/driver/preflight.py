"""Everything that can be known before workers start: storage, shards, run folder, refusals."""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from data_shards.sources.registry import SOURCES
from data_shards.storage.store import Store
from model.artifact.package_version import release
from pipeline.checkpoint.reader import committed, name_strays
from pipeline.config import RunConfig, changes, decides_result, flatten
from pipeline.errors import PipelineError
from pipeline.run import layout
from pipeline.run.config_file import newest_run, stored_config, to_yaml
from pipeline.run.lease import (
    Lease,
    LeaseHeldError,
    end_without_lease,
    hold_run,
    write_record,
)
from pipeline.run.ray_job import default_storage, uploaded_code
from pipeline.run.ray_session import cluster_address
from pipeline.run.relative_urls import relative
from pipeline.run.server_exposure import require_closed
from pipeline.run.step_schedule import StepSchedule, make_step_schedule, world_sizes
from pipeline.run.worker_spec import WorkerSpec
from pipeline.tracking.client import SQLITE, TrackingConfig
from pipeline.tracking.untrusted_server import listed_addresses
from pipeline.training.data import Samples, open_samples
from pipeline.training.schedules import step_context
from pipeline.training.zero3 import require_precision

_KEY = re.compile(rb"[0-9a-f]{32}")
# MLflow keeps the first value of a parameter, and warns of another one.
_OF_ONE_EXECUTION = ("resume", "start_or_resume", "wait_for_lease", "extend_to_epochs")


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run that may start.

    Attributes:
        job: what the ranks get.
        run: store of the run folder.
        samples: the shard set.
        tracking: resolved MLflow store and experiment.
        run_key: by which MLflow knows the run, also where its spool is lost.
        spool: local folder of the metrics spool.
        changed: settings of a continued run that are not those it had before.
        schedule: its steps.
        notices: what a person should know of the settings and cannot see; mostly none.
    """

    job: WorkerSpec
    run: Store
    samples: Samples
    tracking: TrackingConfig
    run_key: str
    spool: Path
    changed: dict[str, str]
    schedule: StepSchedule
    notices: tuple[str, ...] = ()

    def accept(self) -> None:
        """Keep changed settings as those of the run; once its ranks have loaded a checkpoint."""
        if self.changed:
            body = self.job.config.to_json().encode()
            write_record(self.run, layout.CONFIG, self.job.writer, body)
            self.run.write(layout.SETTINGS, to_yaml(self.job.config).encode())

    def params(self) -> dict[str, Any]:
        """Parameters of the tracked run: the resolved configuration and the code version."""
        body = TypeAdapter(RunConfig).dump_python(self.job.config, mode="json")
        kept = {name: value for name, value in body.items() if name not in _OF_ONE_EXECUTION}
        return {**flatten(kept), "code": self.job.context["code"]}


@contextlib.contextmanager
def prepare(
    config: RunConfig,
    *,
    world_size: int,
    waiting: Callable[[str], None] = lambda held: None,
    lost: Callable[[str], None] = end_without_lease,
) -> Iterator[PreparedRun]:
    """Check the run against the machine and the shards, and create or reopen its folder.

    This process is the only one that writes the run for the duration of the block.

    Args:
        config: the run.
        world_size: number of ranks.
        waiting: is told who holds the run, every time that `wait_for_lease` looks again.
        lost: called from a thread when another process has taken the run over.

    Raises:
        PipelineError, ShardError: the run is impossible; nothing was started.
        NoEffectError: a setting changes nothing on so many ranks.
        LeaseError: another process trains it, or the store cannot keep others from doing so.
        ExposureError: its Ray cluster or MLflow server stands open.
    """
    cluster = config.cluster
    try:
        elsewhere = cluster_address(cluster.address) if cluster.launcher == "ray" else ""
    except ConnectionError as error:
        raise PipelineError(str(error)) from error
    require_closed(ray=elsewhere, mlflow=config.tracking.uri)
    no_gpu = not elsewhere and not torch.cuda.is_available()
    if cluster.device == "cpu" or no_gpu:
        require_precision(config.train.precision, torch.device("cpu"))
    hold = functools.partial(_hold, waiting=waiting if config.wait_for_lease else None, lost=lost)
    with contextlib.ExitStack() as stack:
        try:
            prepared = _prepare(
                config, world_size, lambda run: stack.enter_context(hold(run)), no_gpu=no_gpu
            )
        except OSError as error:
            raise PipelineError(f"storage or shards: {type(error).__name__}: {error}") from error
        yield prepared


def _hold(
    run: Store, *, waiting: Callable[[str], None] | None, lost: Callable[[str], None]
) -> contextlib.AbstractContextManager[Lease]:
    return hold_run(
        run, newest_step=lambda: max(committed(run), default=-1), lost=lost, waiting=waiting
    )


def _require_own_gpus(config: RunConfig) -> None:
    """Refuse evaluations that wait in Ray's queue for the GPUs that ranks need to start again.

    Raises:
        PipelineError: nothing keeps them off the nodes that train.
    """
    checkpoint = config.checkpoint
    queued = config.cluster.launcher == "ray" and checkpoint.certifies
    if queued and checkpoint.evaluate_gpus and not checkpoint.evaluate_placement:
        raise PipelineError(
            f"checkpoint.evaluate_gpus={checkpoint.evaluate_gpus:g} without "
            "checkpoint.evaluate_placement: waiting evaluations would take the GPUs that ranks "
            "need to start again; label other nodes for them, or certify on CPUs"
        )


def _prepare(
    config: RunConfig, world_size: int, hold: Callable[[Store], Lease], *, no_gpu: bool
) -> PreparedRun:
    if config.extend_to_epochs:
        train = dataclasses.replace(config.train, epochs=config.extend_to_epochs)
        config = dataclasses.replace(config, train=train)
    storage = storage_root(config)
    shards = _shards(config, storage)
    samples = open_samples(
        shards.url, config.data, config.model, certify=config.checkpoint.certifies
    )
    schedule = make_step_schedule(
        config.train, config.checkpoint, samples=samples.per_epoch, world_size=world_size
    )
    config.require_effects(world_size=world_size)
    _require_own_gpus(config)
    if config.cluster.launcher == "ray":
        world_sizes(config.cluster, config.train)
    if config.cluster.device == "cuda" and no_gpu:
        raise PipelineError("cluster.device=cuda: this machine has no GPU that torch can use")
    tracking = _tracking(config, storage, samples)
    config, run, lease, before = _open_run(config, storage, hold)
    steps = committed(run) if before else {}
    if config.resume and not steps:
        raise PipelineError(f"--resume: {run.url} has no committed checkpoint")
    notices = _notices(config, schedule, samples, before, steps)
    _remove_leftovers(run)
    name = config.name
    context = {
        "run": name,
        "preset": config.preset,
        "shards_url": relative(
            shards.url, base=run.child(layout.artifact(0)).url, within=storage.url
        ),
        "shards_digest": samples.digest,
        "tracking": _stated(tracking, run, storage),
        "code": code_version(),
    }
    job = WorkerSpec(
        config=config,
        run_url=run.url,
        shards_url=shards.url,
        context=context,
        writer=lease.number,
    )
    return PreparedRun(
        job=job,
        run=run,
        samples=samples,
        tracking=tracking,
        run_key=_run_key(run),
        spool=(run.local_path() or Path.home() / ".cache/certified-pretrain" / name)
        / layout.TRACKING,
        changed=changes(before, config) if before else {},
        schedule=schedule,
        notices=tuple(notices),
    )


def _notices(
    config: RunConfig,
    schedule: StepSchedule,
    samples: Samples,
    before: RunConfig | None,
    steps: Collection[int],
) -> Iterator[str]:
    """What follows from the settings and the checkpoints of the run.

    Raises:
        PipelineError: the run is to stop before the step at which it goes on.
    """
    if config.checkpoint.none:
        yield "checkpoint.none: this run keeps nothing, is not certified and cannot be continued"
    stop, end, newest = config.train.stop_after, schedule.total_steps, max(steps, default=0)
    if stop > end and not config.train.processor_seconds:
        yield f"train.stop_after={stop} is never reached: the run ends after step {end}"
    if stop and newest > stop:
        raise PipelineError(
            f"train.stop_after={stop} lies before step {newest}, at which the run goes on"
        )
    if newest and newest >= schedule.last_step:
        yield (
            f"run {config.name} is at step {newest} of {end} already: nothing is trained; "
            f"--extend-to-epochs with more than {config.train.epochs:g} goes on"
        )
    elif before and config.train.epochs != before.train.epochs and config.extend_to_epochs:
        yield _extension(before, config, schedule, samples, newest)


def _extension(
    before: RunConfig, config: RunConfig, schedule: StepSchedule, samples: Samples, newest: int
) -> str:
    """What more epochs do to the schedule at the step where the run goes on."""
    shorter = make_step_schedule(
        before.train, before.checkpoint, samples=samples.per_epoch, world_size=1
    )
    schedules = (shorter, schedule)
    old, new = (
        step_context(min(newest, plan.total_steps - 1), plan=plan, train=one.train, loss=one.loss)
        for one, plan in zip((before, config), schedules, strict=True)
    )
    steps = " to ".join(str(plan.total_steps) for plan in schedules)
    return (
        f"extended from {before.train.epochs:g} to {config.train.epochs:g} epochs ({steps} steps): "
        f"from step {newest} on the schedule is that of a run of this length; there the learning "
        f"rate is {config.optim.lr * new.lr_factor:.2e} in place of "
        f"{before.optim.lr * old.lr_factor:.2e}, the training radius {new.eps:.3g} in place of "
        f"{old.eps:.3g}"
    )


def storage_root(config: RunConfig) -> Store:
    """Where runs and data live; never the throw-away working directory of a Ray job."""
    return Store(config.storage or default_storage())


def _tracking(config: RunConfig, storage: Store, samples: Samples) -> TrackingConfig:
    """Where the run is recorded. A server may be away; a folder that is missing never comes."""
    folder = storage.local_path() or Path.home() / "certified-pretrain"
    if not config.tracking.uri:
        folder.mkdir(parents=True, exist_ok=True)
    uri = config.tracking.uri or f"{SQLITE}{folder / 'mlflow.db'}"
    try:
        tracking = TrackingConfig(
            uri=uri,
            experiment=config.tracking.experiment or samples.name,
            addresses=(storage.url, *listed_addresses()),
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise PipelineError(f"tracking.uri: {reason}") from None
    if uri.startswith(SQLITE) and not Path(tracking.uri.removeprefix(SQLITE)).parent.is_dir():
        raise PipelineError(f"tracking.uri={uri}: there is no such folder")
    return tracking


def _stated(tracking: TrackingConfig, run: Store, storage: Store) -> dict[str, str]:
    """The store of the run as its artifacts name it; one beside the runs moves with them."""
    uri = tracking.uri
    if uri.startswith(SQLITE):
        artifact = run.child(layout.artifact(0)).url
        uri = SQLITE + relative(uri.removeprefix(SQLITE), base=artifact, within=storage.url)
    return {"uri": uri, "experiment": tracking.experiment}


def _shards(config: RunConfig, storage: Store) -> Store:
    """The shard set; one that this project can make is written on first use."""
    source = config.data.source
    if config.data.shards:
        return Store(config.data.shards)
    if source == "none":
        raise PipelineError(
            f"preset {config.preset!r} needs a shard set: give --data.shards URL "
            "(write one with `python -m data_shards.write`)"
        )
    shards = storage.child("data", source)
    if not shards.exists("index.json"):
        _write(source, shards)
    return shards


def _write(source: str, shards: Store) -> None:
    try:
        # Late: a run that writes no shards and reads no index may be without pyarrow.
        from data_shards.write import write_shard_set

        images = SOURCES[source]()
    except ImportError as error:
        raise PipelineError(
            f"data.source={source}: its shards cannot be written, {error.name} is not installed; "
            "give --data.shards"
        ) from error
    write_shard_set(images, shards.url)


def _run_key(run: Store) -> str:
    """The key that the first execution of the run has drawn."""
    run.create(layout.TRACKING_KEY, uuid.uuid4().hex.encode())
    key = run.read(layout.TRACKING_KEY, limit="name_bytes")
    if not _KEY.fullmatch(key):
        raise PipelineError(
            f"{run}/{layout.TRACKING_KEY} is damaged: {key[:40]!r} is no key of an MLflow run; "
            "without the file the run gets a new one"
        )
    return key.decode()


def _remove_leftovers(run: Store) -> None:
    """Remove what Ray Train wrote for itself during executions whose driver was killed."""
    for name in run.ls():
        if layout.is_ray_folder(name):
            with contextlib.suppress(OSError):  # a few empty folders: they end no run
                run.remove(name, recursive=True)


def _new_name(config: RunConfig) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{config.preset}-{now:%Y%m%d-%H%M%S}"


def _open_run(
    config: RunConfig, storage: Store, hold: Callable[[Store], Lease]
) -> tuple[RunConfig, Store, Lease, RunConfig | None]:
    """The configuration with its name, the run's folder, created or checked, and its old settings.

    Nothing is written into the folder before its lease is held.
    """
    if config.name or config.resume:
        named = dataclasses.replace(config, name=config.name or newest_run(storage, config.preset))
        run = storage.child(named.name)
        _require_run(named, run)  # before the lease: a refused run leaves no folder
        lease = hold(run)
        if run.exists(layout.CONFIG) or config.resume or not _created(named, run):
            return named, run, lease, _continue(named, run)
        return named, run, lease, None
    base = _new_name(config)
    for number in itertools.count(1):  # a second one of the same second is numbered
        named = dataclasses.replace(config, name=base if number == 1 else f"{base}-{number}")
        run = storage.child(named.name)
        if not run.exists(layout.CONFIG):
            with contextlib.suppress(LeaseHeldError):  # it belongs to one that has just begun
                lease = hold(run)
                if _created(named, run):
                    return named, run, lease, None
    raise AssertionError("unreachable")


def _created(config: RunConfig, run: Store) -> bool:
    if not run.create(layout.CONFIG, config.to_json().encode()):
        return False
    run.write(layout.SETTINGS, to_yaml(config).encode())
    return True


def _require_run(config: RunConfig, run: Store) -> None:
    """Check that the run exists if it has to, and does not if it must not."""
    exists = run.exists(layout.CONFIG)
    if config.resume and not exists:
        raise PipelineError(f"--resume: there is no run {run.url}")
    if exists and not (config.resume or config.start_or_resume):
        raise PipelineError(
            f"run {run.url} exists: give --resume to continue it, or another --name"
        )


def _continue(config: RunConfig, run: Store) -> RunConfig:
    """Check that an existing run may be continued with this config; its settings before."""
    _require_run(config, run)
    name_strays(run)
    before = stored_config(run)
    more, epochs = config.extend_to_epochs, before.train.epochs
    if more and more < epochs:
        raise PipelineError(f"--extend-to-epochs {more:g}: run {config.name} has {epochs:g}")
    changed = changes(before, config)
    if more:
        changed.pop("train.epochs", None)
    refused = [f"{name}: {values}" for name, values in changed.items() if decides_result(name)]
    if refused and not config.accept_changes:
        raise PipelineError(
            "--resume would change the mathematics of the run: "
            + "; ".join(refused)
            + " (--accept-changes continues all the same)"
        )
    return before


def code_version() -> dict[str, str]:
    """Package version and, in a git checkout, the commit (with `+` when files are modified).

    Of code that a Ray job brought with it, the digest of its files.
    """
    version = {"package": release()}
    image = os.environ.get("CERTIFIED_PRETRAIN_COMMIT")  # of a container image without .git
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        version["commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        version["commit"] = uploaded_code(root) or image or "unknown"
    return version
