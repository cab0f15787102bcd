"""Everything that can be known before workers start: storage, shards, run folder, refusals."""

import dataclasses
import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from data_shards.sources import digits, synthetic
from data_shards.store import Store
from data_shards.write import write_shard_set
from pipeline.config import RunConfig, changed_mathematics, flatten
from pipeline.errors import PipelineError
from pipeline.plan import make_plan
from pipeline.restore import committed
from pipeline.samples import Samples, open_samples
from pipeline.worker import Job
from pipeline.zero3 import require_precision

_RECORD = "run.json"
_SOURCES = {"digits": digits, "synthetic": synthetic}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that may start.

    Attributes:
        job: what the ranks get.
        run: store of the run folder.
        samples: the shard set.
        mlflow: resolved MLflow store.
        experiment: resolved MLflow experiment.
        spool: local folder of the metrics spool.
    """

    job: Job
    run: Store
    samples: Samples
    mlflow: str
    experiment: str
    spool: Path

    def params(self) -> dict[str, Any]:
        """Parameters of the tracked run: the resolved configuration and the code version."""
        body = TypeAdapter(RunConfig).dump_python(self.job.config, mode="json")
        return {**flatten(body), "code": self.job.context["code"]}


def prepare(config: RunConfig, *, world_size: int) -> Prepared:
    """Check the run against the machine and the shards, and create or reopen its folder.

    Raises:
        PipelineError, ShardError: the run is impossible; nothing was started.
    """
    cluster = config.cluster
    elsewhere = cluster.launcher == "ray" and (cluster.address or os.environ.get("RAY_ADDRESS"))
    if cluster.device == "cpu" or not (elsewhere or torch.cuda.is_available()):
        require_precision(config.train.precision)
    storage = storage_root(config)
    shards = _shards(config, storage)
    samples = open_samples(config, shards.url)
    make_plan(config, samples=samples.per_epoch, world_size=world_size)
    name = config.name or (_newest_run(config, storage) if config.resume else _new_name(config))
    run = storage.child(name)
    config = dataclasses.replace(config, name=name)
    _open_folder(config, run)
    context = {
        "run": name,
        "preset": config.preset,
        "shards_url": shards.url,
        "shards_digest": samples.digest,
        "code": code_version(),
    }
    job = Job(config=config, run_url=run.url, shards_url=shards.url, context=context)
    return Prepared(
        job=job,
        run=run,
        samples=samples,
        mlflow=config.mlflow or _embedded_mlflow(storage),
        experiment=config.experiment or samples.name,
        spool=(run.local_path() or Path.home() / ".cache/certified-pretrain" / name) / "tracking",
    )


def storage_root(config: RunConfig) -> Store:
    """Where runs and data live; never the throw-away working directory of a Ray job."""
    if config.storage:
        return Store(config.storage)
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return Store(str(Path.home() / "certified-pretrain"))
    return Store("runs")


def _embedded_mlflow(storage: Store) -> str:
    folder = storage.local_path() or Path.home() / "certified-pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


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
        write_shard_set(_SOURCES[source](), shards.url)
    return shards


def _new_name(config: RunConfig) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{config.preset}-{now:%Y%m%d-%H%M%S}"


def _newest_run(config: RunConfig, storage: Store) -> str:
    names = sorted(
        (entry for entry in storage.ls("") if entry.startswith(f"{config.preset}-")), reverse=True
    )
    for name in names:
        if storage.child(name).exists(_RECORD):
            return name
    raise PipelineError(f"--resume: no run of preset {config.preset!r} under {storage.url}")


def _open_folder(config: RunConfig, run: Store) -> None:
    """Create the run folder, or check that an existing one may be continued with this config."""
    if not run.exists(_RECORD):
        if config.resume:
            raise PipelineError(f"--resume: there is no run {run.url}")
        run.write(_RECORD, config.to_json().encode())
        return
    if not config.resume:
        raise PipelineError(
            f"run {run.url} exists: give --resume to continue it, or another --name"
        )
    before = RunConfig.from_json(run.read(_RECORD).decode())
    changes = changed_mathematics(before, config)
    if changes:
        raise PipelineError(
            "--resume would change the mathematics of the run: " + "; ".join(changes)
        )
    if not committed(run.child("checkpoints")):
        raise PipelineError(f"--resume: {run.url} has no committed checkpoint")


def code_version() -> dict[str, str]:
    """Package version and, in a git checkout, the commit (with `+` when files are modified)."""
    version = {"package": importlib.metadata.version("certified-pretrain")}
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        version["commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        version["commit"] = "unknown"
    return version
