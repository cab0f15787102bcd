"""The one place that says where things lie in a run's folder, as names relative to it.

    run.json                               resolved configuration
    config.yaml                            the same for `--config`
    tracking.key                           by which MLflow knows the run, on any machine
    events.jsonl                           everything that is not a metric
    memory-0001.json, rollbacks-0001.json  micro-batches that did not fit, samples left out
    run-0002.json                          settings that a later execution has changed
    lease/                                 who writes the run now, and who did before
    checkpoints/step-00000500/writer-0001/ rank-*.safetensors and commit.json, of one writer
    checkpoints/step-00000500/pinned       keeps the checkpoint for good
    artifacts/step-00000500/               the model artifact; evaluation/SPLIT/ beside its files
    tracking/spool.jsonl                   metrics on their way to MLflow, on the driver's disk
    damaged/, hangs/, profile/             damaged samples, stacks of stuck ranks, traces
    ray-*/                                 what Ray Train writes for itself while it runs

All are plain names: they join to a `Store` (`run.child(layout.checkpoint(500))`) and to a `Path`.
What a model artifact holds is decided by `model.artifact.artifact`.
"""

import re
from collections.abc import Callable

CONFIG = "run.json"
SETTINGS = "config.yaml"
TRACKING_KEY = "tracking.key"
EVENTS = "events.jsonl"
OUT_OF_MEMORY = "memory.json"
ROLLBACKS = "rollbacks.json"

RECORDS = (CONFIG, OUT_OF_MEMORY, ROLLBACKS)
"""Files that are rewritten, so that each writer has its own (`record`)."""

LEASES = "lease"

CHECKPOINTS = "checkpoints"
COMMIT = "commit.json"
"""Written last: a folder of a writer without it is ignored by readers."""
DAMAGED_COMMIT = "commit.damaged.json"
"""The commit of a checkpoint that could not be loaded."""
PINNED = "pinned"
"""An object of this name in a checkpoint's folder keeps it for good."""

ARTIFACTS = "artifacts"
CERTIFICATE, SAMPLES, SUMMARY = "certificate.json", "samples.parquet", "summary.json"
PROGRESS = "progress.json"
CRA_FIGURE, RADIUS_FIGURE, BOUNDS_FIGURE = "cra.png", "radius.png", "bounds.png"
CLOSEST_FIGURE = "closest.png"
"""Files of an evaluation."""

TRACKING = "tracking"
SPOOL = "spool.jsonl"

_STEP = re.compile(r"step-([0-9]{8,})")
_RAY = re.compile(r"ray-[0-9a-f]{8}")
_WRITER = re.compile(r"writer-([0-9]{4,})")


def step_folder(step: int) -> str:
    """Name of the folder of a step, such as `step-00000500`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a folder, by its exact name; None for every other name.

    People and tools leave copies beside the folders (`step-00000500.bak`, `.DS_Store`): what is not
    exactly the name that `step_folder` gives is no step, so no two names mean the same one.

    Args:
        name: of the folder, or its path or URL.
    """
    return _number(_STEP, step_folder, name)


def _number(pattern: re.Pattern[str], folder: Callable[[int], str], name: str) -> int | None:
    last = name.rstrip("/").rpartition("/")[2]
    match = pattern.fullmatch(last)
    number = int(match[1]) if match else None
    return number if number is not None and folder(number) == last else None


def writer_folder(writer: int) -> str:
    """Name of the folder of one writer: the number of its lease, 0 for one that holds none.

    Each writes into its own, so one that was away for longer than its lease and goes on all the
    same touches no file of its successor.
    """
    return f"writer-{writer:04d}"


def writer_of(name: str) -> int | None:
    """The writer of a folder, by its exact name, as `step_of`."""
    return _number(_WRITER, writer_folder, name)


def record(name: str, writer: int) -> str:
    """What one writer has written of a file of RECORDS: such as `rollbacks-0001.json`."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{writer:04d}.{suffix}" if writer else name


def checkpoint(step: int) -> str:
    """Folder of the checkpoint after a step, of all writers."""
    return f"{CHECKPOINTS}/{step_folder(step)}"


def written_checkpoint(step: int, writer: int) -> str:
    """What one writer has written of the checkpoint after a step."""
    return f"{checkpoint(step)}/{writer_folder(writer)}"


def artifact(step: int) -> str:
    """Folder of the model artifact after a step."""
    return f"{ARTIFACTS}/{step_folder(step)}"


def evaluation(name: str) -> str:
    """Folder of an evaluation, relative to that of the artifact."""
    return f"evaluation/{name}"


def rank_file(rank: int, world_size: int) -> str:
    """What one rank writes of a checkpoint, relative to the checkpoint's folder."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def rank_report(rank: int, world_size: int) -> str:
    """That a rank has written its file; rank 0 reads it and removes it."""
    return f"report-{rank:05d}-of-{world_size:05d}.json"


def damaged_samples(step: int, rank: int) -> str:
    """Damaged samples that a rank met after it started at a step."""
    return f"damaged/{step_folder(step)}-rank-{rank:05d}.jsonl"


def hang_report(step: int, rank: int) -> str:
    """Stacks of a rank that stood still in a step."""
    return f"hangs/{step_folder(step)}-rank-{rank:05d}.txt"


def profile(step: int, kind: str) -> str:
    """A file of the trace that begins with a step, such as kind `trace.json.gz`."""
    return f"profile/{step_folder(step)}.{kind}"


def ray_folder(execution: str) -> str:
    """What Ray Train writes for itself during one execution of the ranks, by eight hex digits."""
    return f"ray-{execution}"


def is_ray_folder(name: str) -> bool:
    """Whether it is one of `ray_folder`."""
    return _RAY.fullmatch(name) is not None
