"""Everything that can be known before workers start: storage, shards, run folder, refusals."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from data_shards.sources import SOURCES
from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError
from data_shards.write import write_shard_set
from pipeline.checkpoint.reader import committed, name_strays
from pipeline.config import RunConfig, changes, decides_result, flatten
from pipeline.errors import PipelineError
from pipeline.run import layout
from pipeline.run.lease import (
    Lease,
    LeaseHeldError,
    end_without_lease,
    hold_run,
    read_record,
    write_record,
)
from pipeline.run.movable_urls import relative
from pipeline.run.open_servers import require_closed
from pipeline.run.ray_job import is_ray_job, uploaded_code
from pipeline.run.ray_session import cluster_address
from pipeline.run.step_schedule import make_step_schedule, world_sizes
from pipeline.run.worker_spec import WorkerSpec
from pipeline.tracking.client import TrackingConfig
from pipeline.tracking.server_answers import listed_addresses
from pipeline.training.data import Samples, open_samples
from pipeline.training.zero3 import require_precision

_SQLITE = "sqlite:///"
_KEY = re.compile(rb"[0-9a-f]{32}")


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
        notice: what a person should know of the settings and cannot see; mostly empty.
    """

    job: WorkerSpec
    run: Store
    samples: Samples
    tracking: TrackingConfig
    run_key: str
    spool: Path
    changed: dict[str, str]
    notice: str = ""

    def accept(self) -> None:
        """Keep changed settings as those of the run; once its ranks have loaded a checkpoint."""
        if self.changed:
            body = self.job.config.to_json().encode()
            write_record(self.run, layout.CONFIG, self.job.writer, body)

    def params(self) -> dict[str, Any]:
        """Parameters of the tracked run: the resolved configuration and the code version."""
        body = TypeAdapter(RunConfig).dump_python(self.job.config, mode="json")
        return {**flatten(body), "code": self.job.context["code"]}


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
    require_closed(ray=elsewhere, mlflow=config.mlflow)
    no_gpu = not elsewhere and not torch.cuda.is_available()
    if cluster.device == "cpu" or no_gpu:
        require_precision(config.train.precision)
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


def _prepare(
    config: RunConfig, world_size: int, hold: Callable[[Store], Lease], *, no_gpu: bool
) -> PreparedRun:
    storage = storage_root(config)
    shards = _shards(config, storage)
    samples = open_samples(
        shards.url, config.data, config.model, certify=config.checkpoint.evaluate
    )
    schedule = make_step_schedule(
        config.train, config.checkpoint, samples=samples.per_epoch, world_size=world_size
    )
    config.require_effects(world_size=world_size)
    stop, end = config.train.stop_after, schedule.total_steps
    notice = f"train.stop_after={stop} is never reached: the run ends after step {end}"
    if config.cluster.launcher == "ray":
        world_sizes(config.cluster, config.train)
    if config.cluster.device == "cuda" and no_gpu:
        raise PipelineError("cluster.device=cuda: this machine has no GPU that torch can use")
    tracking = _tracking(config, storage, samples)
    config, run, lease, changed = _open_run(config, storage, hold)
    _remove_leftovers(run)
    name = config.name
    context = {
        "run": name,
        "preset": config.preset,
        "shards_url": relative(
            shards.url, base=run.child(layout.artifact(0)).url, within=storage.url
        ),
        "shards_digest": samples.digest,
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
        changed=changed,
        notice=notice if stop > end and not config.train.processor_seconds else "",
    )


def storage_root(config: RunConfig) -> Store:
    """Where runs and data live; never the throw-away working directory of a Ray job."""
    if config.storage:
        return Store(config.storage)
    if is_ray_job():
        return Store(str(Path.home() / "certified-pretrain"))
    return Store("runs")


def _tracking(config: RunConfig, storage: Store, samples: Samples) -> TrackingConfig:
    """Where the run is recorded. A server may be away; a folder that is missing never comes."""
    folder = storage.local_path() or Path.home() / "certified-pretrain"
    if not config.mlflow:
        folder.mkdir(parents=True, exist_ok=True)
    uri = config.mlflow or f"{_SQLITE}{folder / 'mlflow.db'}"
    try:
        tracking = TrackingConfig(
            uri=uri,
            experiment=config.experiment or samples.name,
            addresses=(storage.url, *listed_addresses()),
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise PipelineError(f"mlflow: {reason}") from None
    if uri.startswith(_SQLITE) and not Path(tracking.uri.removeprefix(_SQLITE)).parent.is_dir():
        raise PipelineError(f"mlflow={uri}: there is no such folder")
    return tracking


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
        write_shard_set(SOURCES[source](), shards.url)
    return shards


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


def _newest_run(config: RunConfig, storage: Store) -> str:
    names = sorted(
        (entry for entry in storage.ls("") if entry.startswith(f"{config.preset}-")), reverse=True
    )
    for name in names:
        if storage.child(name).exists(layout.CONFIG):
            return name
    raise PipelineError(f"--resume: no run of preset {config.preset!r} under {storage.url}")


def _open_run(
    config: RunConfig, storage: Store, hold: Callable[[Store], Lease]
) -> tuple[RunConfig, Store, Lease, dict[str, str]]:
    """The configuration with its name, the run's folder, created or checked, and what has changed.

    Nothing is written into the folder before its lease is held.
    """
    if config.name or config.resume:
        named = dataclasses.replace(config, name=config.name or _newest_run(config, storage))
        run = storage.child(named.name)
        _require_run(named, run)  # before the lease: a refused run leaves no folder
        lease = hold(run)
        if run.exists(layout.CONFIG) or config.resume or not _created(named, run):
            return named, run, lease, _continue(named, run)
        return named, run, lease, {}
    base = _new_name(config)
    for number in itertools.count(1):  # a second one of the same second is numbered
        named = dataclasses.replace(config, name=base if number == 1 else f"{base}-{number}")
        run = storage.child(named.name)
        if not run.exists(layout.CONFIG):
            with contextlib.suppress(LeaseHeldError):  # it belongs to one that has just begun
                lease = hold(run)
                if _created(named, run):
                    return named, run, lease, {}
    raise AssertionError("unreachable")


def _created(config: RunConfig, run: Store) -> bool:
    return run.create(layout.CONFIG, config.to_json().encode())


def _require_run(config: RunConfig, run: Store) -> None:
    """Check that the run exists if it has to, and does not if it must not."""
    exists = run.exists(layout.CONFIG)
    if config.resume and not exists:
        raise PipelineError(f"--resume: there is no run {run.url}")
    if exists and not (config.resume or config.start_or_resume):
        raise PipelineError(
            f"run {run.url} exists: give --resume to continue it, or another --name"
        )


def _continue(config: RunConfig, run: Store) -> dict[str, str]:
    """Check that an existing run may be continued with this config; what differs from before."""
    _require_run(config, run)
    name_strays(run)
    changed = changes(_stored_config(run), config)
    refused = [f"{name}: {values}" for name, values in changed.items() if decides_result(name)]
    if refused and not config.accept_changes:
        raise PipelineError(
            "--resume would change the mathematics of the run: "
            + "; ".join(refused)
            + " (--accept-changes continues all the same)"
        )
    if config.resume and not committed(run):
        raise PipelineError(f"--resume: {run.url} has no committed checkpoint")
    return changed


def _stored_config(run: Store) -> RunConfig:
    try:
        stored = read_record(run, layout.CONFIG) or run.read(layout.CONFIG, limit="json_bytes")
        return RunConfig.from_json(stored)
    except (PipelineError, UntrustedError) as error:
        raise PipelineError(
            f"{run}/{layout.CONFIG} cannot be used: {error}; restore it, or give another --name"
        ) from error


def code_version() -> dict[str, str]:
    """Package version and, in a git checkout, the commit (with `+` when files are modified).

    Of code that a Ray job brought with it, the digest of its files.
    """
    version = {"package": importlib.metadata.version("certified-pretrain")}
    image = os.environ.get("CERTIFIED_PRETRAIN_COMMIT")  # of a container image without .git
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        version["commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        version["commit"] = uploaded_code(root) or image or "unknown"
    return version
