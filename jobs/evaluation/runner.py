"""Compute an evaluation: tasks, merge, certificate, files. Nothing here knows MLflow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_shards.format.shard_index import ShardIndex, load_index, named_classes
from data_shards.storage.store import Store
from jobs.errors import EvaluationError
from jobs.evaluation.attack_task import attack_tasks, merge_attack
from jobs.evaluation.certificate_file import certificate, to_json
from jobs.evaluation.certifier_version import certifier_digest
from jobs.evaluation.certify_tasks import (
    ArtifactTask,
    exact_program,
    forget,
    matrix_tasks,
    shard_tasks,
)
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.executor import map_inline, map_shards
from jobs.evaluation.figures import remove_pictures
from jobs.evaluation.progress import Counting, OnProgress
from jobs.evaluation.sample_records import (
    COLUMNS,
    ShardRecords,
    column_of,
    confusions,
    labels_of,
    merge,
    per_class_scores,
    samples_parquet,
    scores,
)
from jobs.evaluation.stored_result import read_result, require_bound
from jobs.evaluation.suites import NO_ATTACK
from model.artifact.artifact import ArtifactInfo, read_info, read_without_parameters
from model.certification.eps import check_reach
from model.certification.matrix_bounds import MatrixBound
from model.certification.rounding import PROGRAMS
from model.empirical_lipschitz import refute
from model.errors import ModelError
from model.networks.base import LipschitzBound
from pipeline.run.evaluation_summary import AttackScores, ColumnScores, EvaluationSummary, LayerRow
from pipeline.run.layout import (
    CERTIFICATE,
    CONFIG,
    PROGRESS,
    SAMPLES,
    SUMMARY,
    evaluation,
)
from pipeline.run.malloc import keep_freed_memory
from pipeline.run.ray_session import ray_session
from pipeline.run.relative_urls import resolve

DEVICE_KINDS = ("cpu", "cuda")
Run = Callable[[Sequence[Any]], list[Any]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """What the tasks found, merged and checked."""

    records: list[ShardRecords]
    matrices: list[MatrixBound]
    bound: LipschitzBound
    columns: dict[str, ColumnScores]
    attack: AttackScores | None

    @property
    def observed_lipschitz(self) -> float:
        """Largest constant that a gradient showed on any shard."""
        return _observed(self.records)


def _observed(records: Sequence[ShardRecords]) -> float:
    return max(part.observed_lipschitz for part in records)


def compute(
    config: EvaluationConfig, *, step: int | None = None, on_progress: OnProgress | None = None
) -> EvaluationSummary:
    """Evaluate an artifact and write the result without pictures; see `jobs.evaluate_cra`."""
    info = artifact_info(config.artifact)
    config = config.for_norm(info.norm)
    index = _fitting_index(config, info)
    out = output(config)
    device = task_device(config.device, launcher=config.launcher, num_gpus=config.num_gpus)
    key = _eval_key(config, info, index, device)
    if out.exists(SUMMARY) and (present := _finished(config, info, index, key)):
        return present
    found = _find(config, info, index, device, on_progress)
    samples = samples_parquet(found.records)
    body = certificate(
        info=info,
        index=index,
        split=config.split,
        eps=config.eps,
        matrices=found.matrices,
        bound=found.bound,
        largest_factor=found.records[0].largest_factor,
        observed_lipschitz=found.observed_lipschitz,
        columns=found.columns,
        samples=len(labels_of(found.records)),
        samples_sha256=hashlib.sha256(samples).hexdigest(),
    )
    trained = int(info.context.get("step") or 0)
    summary = EvaluationSummary(
        norm=info.norm,
        eval_key=key,
        artifact_url=str(Store(config.artifact)),
        artifact_digest=info.digest,
        shards_url=str(index.store),
        dataset=f"{index.header.name}-{config.split}",
        index_digest=index.digest,
        split=config.split,
        out_url=str(out),
        step=trained if step is None else step,
        samples=len(labels_of(found.records)),
        columns=found.columns,
        per_class=_per_class(config, index, found.records),
        orthogonality_residual=info.largest_residual,
        network_bound=found.bound.value,
        observed_lipschitz=found.observed_lipschitz,
        layers=tuple(LayerRow(m.name, m.upper, m.lower) for m in found.matrices),
        attack=found.attack,
        certificate_digest=body["digest"],
        family=info.network.kind,
        class_names=named_classes(index.header),
        confusions=confusions(column_of(found.records, "sound"), labels_of(found.records)),
    )
    out.write(SAMPLES, samples)
    out.write(CERTIFICATE, to_json(body))
    remove_pictures(out)
    out.write(SUMMARY, summary.to_json())  # last: it says that the others are complete
    out.remove(PROGRESS)
    return summary


def _find(
    config: EvaluationConfig,
    info: ArtifactInfo,
    index: ShardIndex,
    device: str,
    on_progress: OnProgress | None,
) -> Findings:
    """Run all tasks: bounds of the matrices, certificates of the samples, attacks."""
    artifact = ArtifactTask(url=Store(config.artifact).url, digest=info.digest, device=device)
    bounding = matrix_tasks(artifact, info)
    passes = 1 if config.attack == NO_ATTACK else 2
    total = len(bounding) + passes * len(index.shards_of(config.split))
    counting = Counting(output(config), total, config.eps, on_progress)
    with _runner(config, counting.add) as run:
        matrices = [matrix for part in run(bounding) for matrix in part]
        tasks = shard_tasks(
            artifact,
            index,
            config.split,
            config.batch_size,
            matrices=matrices,
            deployed=config.deployed,
        )
        records = merge(run(tasks), {task.shard.file: task.keys for task in tasks})
        bound = _bound(config, info, matrices, records)
        columns = {name: _scores(name, records, config, bound, info.norm) for name in COLUMNS}
        attack = None
        if config.attack != NO_ATTACK:
            attack = merge_attack(run(attack_tasks(config, tasks, records)), columns["sound"].cra)
    return Findings(records, matrices, bound, columns, attack)


def artifact_info(url: str) -> ArtifactInfo:
    """Description of the artifact at a URL.

    Raises:
        EvaluationError: there is none.
        ModelError: it is damaged.
    """
    store = Store(url)
    try:
        return read_info(store.open)
    except FileNotFoundError as error:
        # Of a run: it has not come to its first checkpoint, or it writes none.
        why = ", and a run with --checkpoint.none has none" if store.exists(CONFIG) else ""
        raise EvaluationError(f"no artifact at {store}: there is no artifact.json{why}") from error


def _fitting_index(
    config: EvaluationConfig, info: ArtifactInfo, load: Callable[[str], ShardIndex] = load_index
) -> ShardIndex:
    stated = info.context.get("shards_url")
    url = config.shards or (stated and resolve(stated, base=config.artifact))
    if not url:
        raise EvaluationError(
            f"artifact {config.artifact} does not say which shard set it belongs to: "
            "give --data.shards"
        )
    index = load(url)
    index.require(info.native_input_shape, info.network.num_classes)
    try:
        check_reach(config.eps, info.norm, info.native_input_shape)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    return index


def _finished(
    config: EvaluationConfig, info: ArtifactInfo, index: ShardIndex, key: str
) -> EvaluationSummary | None:
    """The same evaluation where it was made before; None if it must be made (again).

    Its numbers are those of the certificate and the samples that lie there.
    """
    out = output(config)
    if _stored_key(out) != key:
        return None
    try:
        result = read_result(out)
        require_bound(result, info, read_without_parameters(Store(config.artifact).open, info))
        rows = index.select(config.split)
        files = [index.shards[number].file for number in index.rows.shard[rows]]
        keys = [name.decode() for name in index.rows.key[rows]]
        if result.keys != tuple(zip(files, keys, strict=True)) or not np.array_equal(
            result.label, index.rows.label[rows]
        ):
            raise EvaluationError(f"{SAMPLES} lists other samples than {index.store}")
    except (EvaluationError, ModelError) as error:
        logger.warning("%s: %s; the evaluation is made again", out, error)
        return None
    return dataclasses.replace(
        result.summary,
        artifact_url=str(Store(config.artifact)),
        shards_url=str(index.store),
        out_url=str(out),
        orthogonality_residual=info.largest_residual,
    )


def _stored_key(out: Store) -> str | None:
    """Key of a finished evaluation, None if its summary is of another version of this program."""
    try:
        return str(out.read_object(SUMMARY)["eval_key"])
    except (KeyError, ValueError):
        return None


def output(config: EvaluationConfig) -> Store:
    """Where the files of an evaluation lie."""
    if config.out:
        return Store(config.out)
    return Store(config.artifact).child(evaluation(config.split))


def evaluation_keys(
    config: EvaluationConfig, load: Callable[[str], ShardIndex] = load_index
) -> tuple[str, ...]:
    """Identify the results of an evaluation that need not have been made.

    One for each kind of device that it may be made on: only `device=auto` leaves a choice, which is
    that of the machine where it runs.

    Args:
        config: the evaluation.
        load: opens the index of a shard set; one that remembers saves time.

    Raises:
        EvaluationError, ModelError, ShardError: as `compute`.
        FileNotFoundError: the shard set is not there.
    """
    info = artifact_info(config.artifact)
    config = config.for_norm(info.norm)
    index = _fitting_index(config, info, load)
    kinds = DEVICE_KINDS if config.device == "auto" else (config.device,)
    return tuple(_eval_key(config, info, index, kind) for kind in kinds)


def _eval_key(config: EvaluationConfig, info: ArtifactInfo, index: ShardIndex, device: str) -> str:
    """Identify the result: everything that may change a number, and nothing else."""
    parts = {
        "certifier": certifier_digest(),
        "device": device,
        "columns": COLUMNS,
        "deployed": config.deployed,
        "attack": (config.attack, config.attack_seed),
        "artifact": info.digest,
        "index": index.digest,
        "split": config.split,
        "eps": config.eps,
        "batch_size": config.batch_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def task_device(device: str, *, launcher: str, num_gpus: float) -> str:
    """Where a task computes; auto: on the GPUs it asks Ray for, or those that this process sees.

    Raises:
        EvaluationError: cuda is asked of this process, which sees none.
    """
    here = launcher != "ray"
    if device == "cuda" and here and not torch.cuda.is_available():
        raise EvaluationError("device=cuda: this machine has no GPU that torch can use")
    if device != "auto":
        return device
    return "cuda" if (torch.cuda.is_available() if here else num_gpus > 0) else "cpu"


@contextmanager
def _runner(config: EvaluationConfig, on_done: Callable[[Any], object]) -> Iterator[Run]:
    """Yield what runs a list of tasks and returns their results in order."""

    def on_ray(tasks: Sequence[Any]) -> list[Any]:
        return map_shards(
            run_in_worker,
            tasks,
            max_in_flight=config.max_in_flight,
            max_retries=config.max_retries,
            num_gpus=config.num_gpus,
            placement=config.placement,
            on_done=on_done,
        )

    if config.launcher == "ray":
        with ray_session():
            yield on_ray
        return
    try:
        yield lambda tasks: map_inline(run_task, tasks, on_done)
    finally:
        forget()


def run_task(task: Any) -> Any:
    """Run one task of any kind."""
    with exact_program(task.artifact.device):
        return task.run()


def run_in_worker(task: Any) -> Any:
    """Run one task in a process of Ray, which needs a plain function."""
    keep_freed_memory()
    return run_task(task)


def _bound(
    config: EvaluationConfig,
    info: ArtifactInfo,
    matrices: Sequence[MatrixBound],
    records: Sequence[ShardRecords],
) -> LipschitzBound:
    """The proved bound, after what was observed did not refute it."""
    network = read_without_parameters(Store(config.artifact).open, info)
    bound = network.lipschitz_upper_bound({matrix.name: matrix for matrix in matrices})
    refute(bound, _observed(records))
    return bound


def _scores(
    name: str,
    records: Sequence[ShardRecords],
    config: EvaluationConfig,
    bound: LipschitzBound,
    norm: str,
) -> ColumnScores:
    program = {"nominal": "float32", "sound": "float64", "deployed": config.deployed}[name]
    return scores(
        column_of(records, name),
        labels_of(records),
        config.eps,
        program=program,
        lipschitz=1.0 if name == "nominal" else bound.value,
        unit_roundoff=PROGRAMS[program].activation,
        norm=norm,
    )


def _per_class(
    config: EvaluationConfig, index: ShardIndex, records: Sequence[ShardRecords]
) -> tuple[dict[str, float], ...]:
    sound = column_of(records, "sound")
    return per_class_scores(sound, labels_of(records), config.eps, index.num_classes)
